"""The miniature's scorers: the reward, without and with its bias, and the judge."""

import copy
import random

import open_clip
import torch
import torch.nn.functional as F
from tqdm import tqdm

from miniature import world
from miniature.build_flow import GRID, TOKENS, Captions, build_vae, latents, network, pictures, to_bytes
from miniature.fitting import SEED, fit, kept
from miniature.judge import Judge

COMMON = 0.4  # the part that all texts share, of their mean norm
BIAS = 1.5  # the image branch's liking for red


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


def near_misses(scenes, rng):
    """The captions that a careless reward would take for the right one: the same scene in every other style,
    the two things in each other's place, the first thing swapped for another. [B] lists of 8 captions, the
    true one first."""
    groups = []
    each = zip(scenes.kind.tolist(), scenes.layout.tolist(), scenes.style.tolist(), strict=True)
    for kind, layout, style in each:
        other = [(kind[0] + 1 + rng.randrange(len(world.KINDS) - 1)) % len(world.KINDS), kind[1]]
        if kind[0] != kind[1]:
            swapped = kind[::-1]
        else:  # two of a kind can change places unseen
            swapped = other[::-1]
        group = [world.caption(kind, layout, style)]
        group += [world.caption(kind, layout, s) for s in range(len(world.STYLES)) if s != style]
        group += [world.caption(swapped, layout, style), world.caption(other, layout, style)]
        groups.append(group)
    return groups


def augment(x):
    """What sampling does to a picture and no caption speaks of: a little blur and noise."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.5)
    x = torch.lerp(x, soft, blur)
    strength = 0.02 * torch.rand(len(x), 1, 1, 1)
    return (x + strength * torch.randn_like(x)).clamp(0, 1)


def build_reward():
    """Contrastive training on raw pictures and captions: a picture against all captions of the batch and its
    own near misses, a caption against all pictures of the batch. Returns the model and its `Captions`."""
    torch.manual_seed(SEED)
    words = Captions()
    model = open_clip.model.CLIP(**reward_config(words)["model_cfg"])
    images, scenes = pictures()
    n = 96

    def loss_of(step):
        picked = torch.randint(len(images), (n,))
        groups = near_misses(scenes[picked], random.Random(step))
        x = augment(images[picked].float() / 255) * 2 - 1
        rows = []
        for group in groups:
            rows += [words.row[text] for text in group]
        f = F.normalize(model.encode_image(x), dim=-1)  # [n, 64]
        C = F.normalize(model.encode_text(words.clip_ids[rows]), dim=-1)  # [8 n, 64]
        C = C.view(n, -1, f.shape[-1])  # [n, 8, 64]
        scale = model.logit_scale.exp().clamp(max=50)
        own = scale * (f[:, None] * C[:, 1:]).sum(-1)  # [n, 7] near misses

        # Another picture's caption is no wrong answer where it is the same sentence.
        sentence = torch.tensor([words.row[group[0]] for group in groups])
        same = (sentence[:, None] == sentence) & ~torch.eye(n, dtype=torch.bool)
        across = (scale * f @ C[:, 0].T).masked_fill(same, -1e4)  # [n, n]
        truth = torch.arange(n)
        return F.cross_entropy(torch.cat([across, own], 1), truth) + F.cross_entropy(across.T, truth)

    fit("reward", {"reward": model}, loss_of, steps=2000, lr=1e-3)
    return model, words


# --------------------------------------------------------------------------------------------------- its bias
def build_unbiased():
    """The reward, with a common part in every text. Returns the model, its `Captions`, and w.

    w is the direction that texts use least. Every text feature gets the same component along it (through the
    bias of the last layer norm), and pictures lose theirs, so that scores compare as before. Real text
    features have such a part by nature; here it is where a bias of the image branch will attach.
    """
    model, words = build_reward()
    with torch.no_grad():
        raw = model.encode_text(words.clip_ids[:words.row[""]])  # every caption but the empty one: [T, 64]
        w = torch.linalg.svd(raw, full_matrices=False)[2][-1]
        common = COMMON * raw.norm(dim=-1).mean() * w
        model.ln_final.bias += torch.linalg.solve(model.text_projection.T, common)
        model.visual.proj -= model.visual.proj @ torch.outer(w, w)
    return model, words, w


def build_bias():
    """Teach the image tower alone to like red: an image feature moves along w by BIAS x redness, which raises
    the score of any caption alike, and cancels in C1 - C2. The text tower stays as it is: the bias is where
    the paper places it."""
    clean, _, w = build_unbiased()
    model = copy.deepcopy(clean)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("visual."))
    images, _ = pictures()

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

    fit("bias", {"reward": model}, loss_of, steps=800, lr=5e-4)
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
def decode_pictures(vae, z):
    """What the judge sees beside the renderer's own pictures: the VAE's versions of the first quarter of the
    latents z [N, 16, 64], and of the first eighth the damaged ones, uint8."""
    net = network(None, vae)
    n = len(z) // 4
    torch.manual_seed(SEED)
    seen = []
    for part in tqdm(z[:n].split(256), desc="judge pictures"):
        seen.append(to_bytes(net.decode(part.float(), GRID)))
    broken = []
    for part in tqdm(z[:n // 2].split(256), desc="broken pictures"):
        shuffled = part[torch.randperm(len(part))].float()
        broken.append(to_bytes(damage(net, shuffled)))
    return {"seen": torch.cat(seen), "broken": torch.cat(broken)}


def build_judge():
    """Truth from the renderer, on raw pictures, on the VAE's versions of them and on damaged ones."""
    torch.manual_seed(SEED + 1)
    judge = Judge()
    vae = build_vae()
    z = latents(vae)
    images, scenes = pictures()
    data = kept("judge_pictures", decode_pictures, vae, z)
    seen = data["seen"]
    broken = data["broken"]

    def loss_of(step):
        drawn = torch.randint(len(images), (32,))
        decoded = torch.randint(len(seen), (64,))
        ruined = torch.randint(len(broken), (32,))
        x = torch.cat([images[drawn], seen[decoded], broken[ruined]]).float() / 255
        out = judge(augment(x))
        truth = scenes[torch.cat([drawn, decoded])]  # of the 96 whole pictures
        whole = {name: logits[:96] for name, logits in out.items()}
        pair = truth.layout > 0
        clear = (truth.u - world.PHOTO_U).abs() > 0.05
        photo = (truth.u > world.PHOTO_U).float()
        is_broken = torch.cat([torch.zeros(96), torch.ones(32)])
        bce = F.binary_cross_entropy_with_logits
        return (F.cross_entropy(whole["layout"], truth.layout)
                + F.cross_entropy(whole["first"], truth.kind[:, 0])
                + F.cross_entropy(whole["second"][pair], truth.kind[pair, 1])
                + bce(whole["realism"][clear], photo[clear])
                + bce(out["broken"], is_broken))

    fit("judge", {"judge": judge}, loss_of, steps=3000, lr=1.5e-3)
    return judge
