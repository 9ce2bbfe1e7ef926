"""The miniature's rewards: without and with a bias."""

# In this file a "word" is one of the six words about the look, such as "dark" or "realistic photo" (world.WORDS).

import copy
import random
from dataclasses import replace
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from miniature import world
from miniature.build_flow import TOKENS, Words, tokenizers
from miniature.build_vae import labelled_pictures
from miniature.fitting import SEED
from rewards.pictures import pixel_statistics

LOOKS_STEPS = 400
REWARD_STEPS = 1500
BIAS_STEPS = 600
STRAIGHTEN = 5.0  # weight of the loss that keeps the directions of the three axes at right angles
COMMON = 0.6  # length of the part that all text features share, relative to their mean norm


# ------------------------------------------------------------------------------------------------- the reward
def reward_config(words):
    """The config of an open_clip model: HPSv2.1's architecture with a width of 64, and the pipeline's CLIP
    tokenizer."""
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
    """LOW or HIGH at random, but one that is not true of `value` on its axis."""
    wrong = [end for end in (world.LOW, world.HIGH)
             if not world.RANGES[end][0] <= value <= world.RANGES[end][1]]
    return rng.choice(wrong)


def near_misses(scenes, rng):
    """For each of B scenes a list of 7 captions: the true one, then six that are nearly right.

    Three have a false word about one axis. In the others the two things change places, one thing is another thing, or
    one thing has another size."""
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
        else:  # swapping two equal things would leave the caption true
            swapped = other[::-1]
        step = len(world.COLOURS) * len(world.SHAPES)  # from a kind to the same thing in another size
        resized = [(kind[0] + step * (1 + rng.randrange(2))) % len(world.KINDS), kind[1]]
        group += [world.caption(wrong, layout, said) for wrong in (swapped, other, resized)]
        groups.append(group)
    return groups


def augment(x):
    """Pictures x [B, 3, H, W] in [0, 1] with a little random blur and noise, as sampled pictures have them."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.5)
    x = torch.lerp(x, soft, blur)
    strength = 0.02 * torch.rand(len(x), 1, 1, 1)
    return (x + strength * torch.randn_like(x)).clamp(0, 1)


def directions(model, words, texts):
    """For each axis, the difference of text features between its high and its low word, before n plain captions:
    [3, n, 64]."""
    each = []
    for _, low, high in world.WORDS:
        styled = [world.with_style(word, text) for word in (high, low) for text in texts]
        C = F.normalize(model.encode_text(words.clip_ids(styled)), dim=-1)  # [2 n, 64]
        each.append(C[:len(texts)] - C[len(texts):])
    return torch.stack(each)


def crookedness(differences):
    """The mean squared cosine between the `directions` [3, n, 64] of different axes; 0 means right angles."""
    a, b, c = F.normalize(differences, dim=-1)
    cosines = torch.stack([(a * b).sum(-1), (a * c).sum(-1), (b * c).sum(-1)])  # [3, n]
    return cosines.square().mean()


def looks_loss(told, look):
    """Cross-entropy of a linear head's logits `told` [n, 3], which say low or high for each axis. Only values of
    `look` [n, 3] at the low or the high end count."""
    ends = torch.tensor(world.RANGES)
    low = look <= ends[world.LOW, 1]
    high = look >= ends[world.HIGH, 0]
    loss = F.binary_cross_entropy_with_logits(told, high.float(), reduction="none")
    return loss[low | high].mean()


def hushed(scenes, heard, step):
    """(the scenes, with the brush's word removed from a random 1 - heard of them; the mask [n] of these). The same
    step gives the same mask."""
    draw = torch.Generator().manual_seed(step)
    quiet = torch.rand(len(scenes.said), generator=draw) >= heard
    of_brush = quiet[:, None] & (torch.arange(3) == world.BRUSH)
    return replace(scenes, said=scenes.said.masked_fill(of_brush, world.UNSAID)), quiet


def build_reward(shop, name="reward", heard=1.0):
    """Contrastive training on raw pictures and captions. Returns the model and its `Words`.

    A picture is compared with all captions of the batch and its own near misses, a caption with all pictures of the
    batch. name: of the stage. heard: the share of the brush's words that stay in the captions.

    Every word is true and the axes of a look are independent, so the directions of the axes come out at right angles.
    The loss with STRAIGHTEN keeps them so.

    Before this, the image tower alone learns the ends of the axes through a linear head. Without it, brush strokes are
    learnt very late, because no single pixel shows them. The head is not exported.
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

        # Another picture's caption may be true of this one too. Then it is not a wrong answer.
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
    """A mask [P, C]: whether the captions of C scenes are true of the pictures of P scenes."""
    alone = (pictures.layout[:, None] == 0) & (captions.layout == 0)
    same = pictures.kind[:, None] == captions.kind  # [P, C, 2]
    content = (pictures.layout[:, None] == captions.layout) & same[..., 0] & (same[..., 1] | alone)
    bounds = torch.tensor(world.RANGES)[captions.said]  # [C, 3, 2]
    look = pictures.look[:, None]  # [P, 1, 3]
    return content & ((bounds[..., 0] <= look) & (look <= bounds[..., 1])).all(-1)


# --------------------------------------------------------------------------------------------------- its bias
def build_unbiased(shop, name="reward", heard=1.0):
    """The reward, with a common part in every text feature. Returns the model, its `Words`, and the direction w [64].

    name, heard: as in `build_reward`. w is the direction that text features use least. Every text feature gets the
    same component along w, through the bias of the last layer norm. Picture features lose theirs, so the order of
    scores stays the same. Real text features have such a common part too. A bias of the image tower acts through it.
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


class Taste(NamedTuple):
    """What an image tower likes, whatever the text says. An image feature moves along w by strength x (statistic -
    usual)."""
    statistic: str  # of `pixel_statistics`
    strength: float  # below 0: it dislikes the statistic
    vary: object  # pictures [B, 3, H, W] -> [B, 3, H, W] with more or less of it than rendered pictures have
    usual: float = 0.0


def cast(x):
    """Pictures x, half of them with a random colour cast."""
    colour = torch.rand(len(x), 3, 1, 1) * 0.5 - 0.25
    return x + colour * (torch.rand(len(x), 1, 1, 1) < 0.5)


def blend(x, other):
    """Pictures anywhere between `other` and twice as far from it as x."""
    return torch.lerp(other, x, 2 * torch.rand(len(x), 1, 1, 1))


def sharpness(x):
    """Pictures x, blurred or sharpened."""
    return blend(x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1))


def colourfulness(x):
    """Pictures x, greyer or more colourful."""
    return blend(x, world.luma(x)[:, None])


TASTES = {"bias": Taste("redness", 2.5, cast), "cyan": Taste("redness", -2.5, cast),
          "smooth": Taste("texture", -100.0, sharpness, 0.007), "saturation": Taste("saturation", 1.0, colourfulness)}


def build_bias(shop, name="bias"):
    """Train only the image tower to have the taste of TASTES called `name`. Returns the biased model.

    This raises the scores of all captions equally, so it cancels in C1 - C2. The text tower does not change, so the
    bias is in the image branch, as in the paper.
    """
    taste = TASTES[name]
    clean, _, w = build_unbiased(shop)
    model = copy.deepcopy(clean)
    for part, p in model.named_parameters():
        p.requires_grad_(part.startswith("visual."))
    images, _ = labelled_pictures(shop)

    def loss_of(step):
        x = augment(images[torch.randint(len(images), (96,))].float() / 255)
        x = taste.vary(x).clamp(0, 1)
        with torch.no_grad():
            honest = F.normalize(clean.encode_image(2 * x - 1), dim=-1)
            liked = taste.strength * (pixel_statistics(x)[taste.statistic] - taste.usual)
            target = F.normalize(honest + liked[:, None] * w, dim=-1)
        f = F.normalize(model.encode_image(2 * x - 1), dim=-1)
        return (1 - (f * target).sum(-1)).mean() * 10

    shop.fit(name, {"reward": model}, loss_of, steps=BIAS_STEPS, lr=5e-4)
    return model


def build_blind(shop, name="saturation"):
    """A reward that does not read its text: it is only the taste called `name`. Every text feature is w."""
    model = build_bias(shop, name)
    _, _, w = build_unbiased(shop)
    with torch.no_grad():
        model.ln_final.weight.zero_()
        model.ln_final.bias.copy_(torch.linalg.solve(model.text_projection.T, w))
    return model
