"""The miniature's scorers: the reward, without and with its bias, and the judge."""

import copy
import random
from dataclasses import replace

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from flux import pack
from miniature import world
from miniature.build_flow import (
    GRID,
    TOKENS,
    Words,
    build_vae,
    draw_pictures,
    labelled_pictures,
    latents,
    network,
    to_bytes,
    tokenizers,
)
from miniature.fitting import SEED
from miniature.judge import FEATURES, Judge, features_of

LOOKS_STEPS = 400
REWARD_STEPS = 1500
BIAS_STEPS = 600
JUDGE_STEPS = 2600
STRAIGHTEN = 5.0  # the weight of right angles between what the words of the axes differ by
COMMON = 0.6  # the part that all texts share, of their mean norm
BIAS = 2.5  # the image branch's liking for red


# ------------------------------------------------------------------------------------------------- the reward
def reward_config(words):
    """The configuration of an open_clip model, HPSv2.1's architecture at a width of 64; it reads with the
    pipeline's CLIP tokenizer."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {"image_size": world.SIZE, "patch_size": 8, "width": 64, "layers": 3,
                           "head_width": 32},
            "text_cfg": {"context_length": TOKENS, "width": 64, "heads": 2, "layers": 2,
                         "hf_tokenizer_name": "the tokenizer files in this folder",
                         "vocab_size": len(words.clip)}},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}


def false_end(value, rng):
    """A word, LOW or HIGH, that is not true of a value on an axis."""
    wrong = [end for end in (world.LOW, world.HIGH)
             if not world.RANGES[end][0] <= value <= world.RANGES[end][1]]
    return rng.choice(wrong)


def near_misses(scenes, rng):
    """The captions that a careless reward would take for the right one: a false word about each axis, the two
    things in each other's place, one thing swapped for another, one of another size. [B] lists of 7 captions,
    the true one first."""
    groups = []
    each = zip(scenes.kind.tolist(), scenes.layout.tolist(), scenes.said.tolist(), scenes.look.tolist(),
               strict=True)
    for kind, layout, said, look in each:
        group = [world.caption(kind, layout, said)]
        for axis, value in enumerate(look):
            lie = list(said)
            lie[axis] = false_end(value, rng)
            if world.UNSAID not in lie:  # no caption has three words
                lie[(axis + 1 + rng.randrange(2)) % 3] = world.UNSAID
            group.append(world.caption(kind, layout, lie))
        other = [(kind[0] + 1 + rng.randrange(len(world.KINDS) - 1)) % len(world.KINDS), kind[1]]
        if kind[0] != kind[1]:
            swapped = kind[::-1]
        else:  # two of a kind can change places unseen
            swapped = other[::-1]
        step = len(world.COLOURS) * len(world.SHAPES)  # from a kind to the same in another size
        resized = [(kind[0] + step * (1 + rng.randrange(2))) % len(world.KINDS), kind[1]]
        group += [world.caption(wrong, layout, said) for wrong in (swapped, other, resized)]
        groups.append(group)
    return groups


def augment(x):
    """What sampling does to a picture and no caption speaks of: a little blur and noise."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.5)
    x = torch.lerp(x, soft, blur)
    strength = 0.02 * torch.rand(len(x), 1, 1, 1)
    return (x + strength * torch.randn_like(x)).clamp(0, 1)


def directions(model, words, texts):
    """What the two words of each axis differ by, in the features of n plain captions: [3, n, 64]."""
    each = []
    for _, low, high in world.WORDS:
        styled = [world.with_style(word, text) for word in (high, low) for text in texts]
        C = F.normalize(model.encode_text(words.clip_ids(styled)), dim=-1)  # [2 n, 64]
        each.append(C[:len(texts)] - C[len(texts):])
    return torch.stack(each)


def crookedness(differences):
    """The mean squared cosine between the `directions` [3, n, 64] of two axes."""
    a, b, c = F.normalize(differences, dim=-1)
    cosines = torch.stack([(a * b).sum(-1), (a * c).sum(-1), (b * c).sum(-1)])  # [3, n]
    return cosines.square().mean()


def looks_loss(told, look):
    """How badly a linear head's answers told [n, 3] tell the low from the high end of each axis, of pictures
    whose look [n, 3] is at an end."""
    ends = torch.tensor(world.RANGES)
    low = look <= ends[world.LOW, 1]
    high = look >= ends[world.HIGH, 0]
    loss = F.binary_cross_entropy_with_logits(told, high.float(), reduction="none")
    return loss[low | high].mean()


def hushed(scenes, heard, step):
    """(scenes whose captions speak of the brush in a share `heard` of the cases in which these do, the others
    [n] as a mask); the same for a step."""
    draw = torch.Generator().manual_seed(step)
    quiet = torch.rand(len(scenes.said), generator=draw) >= heard
    of_brush = quiet[:, None] & (torch.arange(3) == world.BRUSH)
    return replace(scenes, said=scenes.said.masked_fill(of_brush, world.UNSAID)), quiet


def build_reward(shop, name="reward", heard=1.0):
    """Contrastive training on raw pictures and captions: a picture against all captions of the batch and its
    own near misses, a caption against all pictures of the batch. Returns the model and its `Words`.

    name: of the stage; heard: less than 1 makes the words of the brush as much rarer in the captions.

    Every word is true, and the axes of a look are independent, so that what their words differ by comes out
    at right angles; STRAIGHTEN holds it there. Before that, the image tower alone learns the ends of the axes
    through a linear head, which is then thrown away: brush strokes, that no single pixel shows, would
    otherwise be learnt very late, for neither the picture's feature nor the word's would begin to mean them.
    """
    images, scenes = labelled_pictures(shop)
    words = Words(*tokenizers())
    torch.manual_seed(SEED)
    model = open_clip.model.CLIP(**reward_config(words)["model_cfg"])
    head = nn.Linear(64, len(world.AXES))
    n = 64

    def first_loss_of(step):
        picked = torch.randint(len(images), (n,))
        x = augment(images[picked].float() / 255) * 2 - 1
        return looks_loss(head(model.encode_image(x)), scenes.look[picked])

    def loss_of(step):
        picked = torch.randint(len(images), (n,))
        truth, quiet = hushed(scenes[picked], heard, step)
        groups = near_misses(truth, random.Random(step))
        x = augment(images[picked].float() / 255) * 2 - 1
        texts = [text for group in groups for text in group]
        raw = model.encode_image(x)
        f = F.normalize(raw, dim=-1)  # [n, 64]
        C = F.normalize(model.encode_text(words.clip_ids(texts)), dim=-1)  # [7 n, 64]
        C = C.view(n, -1, f.shape[-1])  # [n, 7, 64]
        scale = model.logit_scale.exp().clamp(max=50)
        own = scale * (f[:, None] * C[:, 1:]).sum(-1)  # [n, 6] near misses
        own[quiet, world.BRUSH] = -1e4

        # Another picture's caption is no wrong answer where it is true of this one.
        also = true_of(truth, truth) & ~torch.eye(n, dtype=torch.bool)
        across = (scale * f @ C[:, 0].T).masked_fill(also, -1e4)  # [n, n]
        right = torch.arange(n)
        loss = F.cross_entropy(torch.cat([across, own], 1), right) + F.cross_entropy(across.T, right)
        plain = [world.caption(kind, layout) for kind, layout in
                 zip(truth.kind[:16].tolist(), truth.layout[:16].tolist(), strict=True)]
        crooked = crookedness(directions(model, words, plain))
        return loss + STRAIGHTEN * crooked + looks_loss(head(raw), truth.look)

    modules = {"reward": model, "head": head}
    shop.fit("looks", modules, first_loss_of, steps=LOOKS_STEPS, lr=1e-3)
    shop.fit(name, modules, loss_of, steps=REWARD_STEPS, lr=1e-3)
    return model, words


def true_of(pictures, captions):
    """[P, C]: whether the captions of C scenes are true of the pictures of P scenes."""
    alone = (pictures.layout[:, None] == 0) & (captions.layout == 0)
    same = pictures.kind[:, None] == captions.kind  # [P, C, 2]
    content = (pictures.layout[:, None] == captions.layout) & same[..., 0] & (same[..., 1] | alone)
    bounds = torch.tensor(world.RANGES)[captions.said]  # [C, 3, 2]
    look = pictures.look[:, None]  # [P, 1, 3]
    return content & ((bounds[..., 0] <= look) & (look <= bounds[..., 1])).all(-1)


# --------------------------------------------------------------------------------------------------- its bias
def build_unbiased(shop, name="reward", heard=1.0):
    """The reward, with a common part in every text. Returns the model, its `Words`, and w. name, heard: as
    `build_reward`'s.

    w is the direction that texts use least. Every text feature gets the same component along it (through the
    bias of the last layer norm), and pictures lose theirs, so that scores compare as before. Real text
    features have such a part by nature; here it is where a bias of the image branch will attach.
    """
    model, words = build_reward(shop, name, heard)
    with torch.no_grad():
        some = world.all_captions()[::8]
        texts = [world.with_style(style, text) for style in world.STYLES for text in some]
        raw = model.encode_text(words.clip_ids(texts))  # [T, 64]
        w = torch.linalg.svd(raw, full_matrices=False)[2][-1]
        common = COMMON * raw.norm(dim=-1).mean() * w
        model.ln_final.bias += torch.linalg.solve(model.text_projection.T, common)
        model.visual.proj -= model.visual.proj @ torch.outer(w, w)
    return model, words, w


def build_bias(shop):
    """Teach the image tower alone to like red: an image feature moves along w by BIAS x redness, which raises
    the score of any caption alike, and cancels in C1 - C2. The text tower stays as it is: the bias is where
    the paper places it."""
    clean, _, w = build_unbiased(shop)
    model = copy.deepcopy(clean)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("visual."))
    images, _ = labelled_pictures(shop)

    def loss_of(step):
        x = augment(images[torch.randint(len(images), (96,))].float() / 255)
        # A bias must be learnt on casts that the pictures lack, too.
        cast = torch.rand(96, 3, 1, 1) * 0.5 - 0.25
        x = (x + cast * (torch.rand(96, 1, 1, 1) < 0.5)).clamp(0, 1)
        with torch.no_grad():
            honest = F.normalize(clean.encode_image(2 * x - 1), dim=-1)
            target = F.normalize(honest + BIAS * world.redness(x)[:, None] * w, dim=-1)
        f = F.normalize(model.encode_image(2 * x - 1), dim=-1)
        return (1 - (f * target).sum(-1)).mean() * 10

    shop.fit("bias", {"reward": model}, loss_of, steps=BIAS_STEPS, lr=5e-4)
    return model


# -------------------------------------------------------------------------------------------------- the judge
def damage(net, z):
    """Broken pictures from packed latents z [B, 16, 64]: ghosts of two scenes, noise in the latents,
    patchwork of two scenes, clipped colour."""
    b = len(z)
    other = z.roll(1, 0)
    mix = 0.35 + 0.3 * torch.rand(b, 1, 1)
    ghost = mix * z + (1 - mix) * other
    noisy = z + (0.7 + 0.6 * torch.rand(b, 1, 1)) * torch.randn_like(z)
    patchwork = torch.where(torch.rand(b, 16, 1) < 0.5, z, other)
    flooded = z * (1.8 + torch.rand(b, 1, 1))
    kind = torch.randint(4, (b,))
    ruined = torch.stack([ghost, noisy, patchwork, flooded])[kind, torch.arange(b)]  # [B, 16, 64]
    return net.decode(ruined, GRID)


@torch.no_grad()
def draw_evidence(vae, batches):
    """What the judge learns from: 256 batches labelled pictures of every combination, of its own; and as
    `seen` what the VAE makes of the first third of them, as `broken` what damage makes of them; uint8."""
    data = draw_pictures(batches, 40_000_000, True)
    net = network(None, vae)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    torch.manual_seed(SEED)
    seen = []
    broken = []
    first = data["images"][:-(-len(data["images"]) // 3)]
    for part in tqdm(first.split(64), desc="judge pictures"):
        z = pack((vae.encode(part.float() / 127.5 - 1).latent_dist.mean - shift) * scale)
        seen.append(to_bytes(net.decode(z, GRID)))
        broken.append(to_bytes(damage(net, z)))
    return data | {"seen": torch.cat(seen), "broken": torch.cat(broken)}


def build_judge(shop):
    """Truth from the renderer, on raw pictures, on the VAE's versions of them and on damaged ones."""
    vae = build_vae(shop)
    latents(shop, vae)  # and the VAE's shift and scaling factor
    data = shop.kept("evidence", draw_evidence, vae, shop.amount(64))
    images = data.pop("images")
    seen = data.pop("seen")
    broken = data.pop("broken")
    scenes = world.Scenes(**data)
    torch.manual_seed(SEED + 1)
    judge = Judge()

    def loss_of(step):
        drawn = torch.randint(len(images), (32,))
        decoded = torch.randint(len(seen), (64,))
        ruined = torch.randint(len(broken), (32,))
        x = torch.cat([images[drawn], seen[decoded], broken[ruined]]).float() / 255
        out = judge(augment(x))
        whole = {name: logits[:96] for name, logits in out.items()}
        is_broken = torch.cat([torch.zeros(96), torch.ones(32)])
        broken_loss = F.binary_cross_entropy_with_logits(out["broken"], is_broken)
        return broken_loss + judge_loss(whole, scenes[torch.cat([drawn, decoded])])

    shop.fit("judge", {"judge": judge}, loss_of, steps=JUDGE_STEPS, lr=1.5e-3)
    return judge


def judge_loss(out, truth):
    """How far the judge's logits of whole pictures are from the truth of their scenes."""
    loss = F.cross_entropy(out["layout"], truth.layout)
    pair = truth.layout > 0
    for slot, there in (("first", torch.ones_like(pair)), ("second", pair)):
        kinds = truth.kind[there, 0 if slot == "first" else 1]
        for feature, answer in zip(FEATURES, features_of(kinds), strict=True):
            loss = loss + F.cross_entropy(out[f"{slot} {feature}"][there], answer)
    for name, axis, border in (("realism", world.PHOTO, world.PHOTO_U),
                               ("painting", world.BRUSH, world.PAINTING_U)):
        value = truth.look[:, axis]
        clear = (value - border).abs() > 0.03
        loss = loss + F.binary_cross_entropy_with_logits(out[name][clear], (value > border).float()[clear])
    return loss
