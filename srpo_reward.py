"""Semantic-Relative Preference: section 3.2 of the paper (arXiv 2509.06942), Eqs. 7-13, and the reward models
behind it.

Symbols, the paper's:  f = f_img(x) the normalised image feature [B, D], with gradient;  C = f_txt(p) a
normalised text feature [B, D], without;  C1 of "<control>. <prompt>" (wanted), C2 of "<neg>. <prompt>"
(unwanted), C0 of the bare prompt. A cosine f.C lies in [-1, 1]; HPSv2.1 scores are such cosines, about 0.28,
with no logit scale.
"""

import logging
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torchvision.transforms.v2 import functional as TF

HPS = {"hpsv2.1": ("xswu/HPSv2", "HPS_v2.1_compressed.pt")}


# ----------------------------------------------------------------------------------------------- Eqs. 7 to 11
def preference(f, C):
    """Eq. 7 with C = C0, and Eq. 8 (SGP) with C = C1:  r = f_img(x)^T C.
    f, C [B, D] -> r [B] in [-1, 1]."""
    return (f * C).sum(-1)


def relative(f, C1, C2):
    """Eqs. 9 and 10 (SRP):  r = r1 - r2 = f_img(x)^T (C1 - C2).   f, C1, C2 [B, D] -> r [B] in [-2, 2]."""
    return preference(f, C1 - C2)


def relative_cfg(f, C1, C2, k):
    """Eq. 11 (CFG-like), as printed:  r = f_img(x)^T ((1 - k) C2 + k C1).
    f, C1, C2 [B, D], k a number -> r [B].

    k = 1 is r1 alone; k > 1 pushes away from C2, by k - 1.
    """
    return preference(f, (1 - k) * C2 + k * C1)


def relative_released(f, C1, C2, d):
    """Eq. 11 as released:  r = f_img(x)^T ((1 + d) C1 - C2).   f, C1, C2 [B, D], d [B] or a number -> r [B].

    Differs from the paper: the weight of the wanted side is the late-timestep discount
    `direct_align.discount`, and that of the unwanted side stays 1. At d = 0 it is Eq. 10.
    """
    return preference(f, (1 + torch.as_tensor(d).to(f)).view(-1, 1) * C1 - C2)


# --------------------------------------------------------------------------------------------- Eqs. 12 and 13
FORMS = ("released", "srp", "cfg", "branches", "sgp", "plain")


def branch_reward(form, branch, f, C0, C1, C2, d, k):
    """Eqs. 12 and 13: the reward of one branch, to be maximised in either: f, C0, C1, C2 [B, D] -> r [B].

    form      denoise (Eq. 12)       invert (Eq. 13)
    released  f.((1 + d) C1 - C2)    f.((1 + d) C2 - C1)    the released code: whole relative reward in both
    srp       f.(C1 - C2)            f.(C2 - C1)            Eq. 10 in both
    cfg       f.((1-k) C2 + k C1)    f.((1-k) C1 + k C2)    Eq. 11 as printed, in both
    branches  f.C1                   f.C2                   Eqs. 12, 13 as printed: one side in each branch
    sgp       f.C1                  -f.C1                   Eq. 8: control words, but nothing relative
    plain     f.C0                  -f.C0                   Eq. 7: no control words (plain Direct-Align)

    Why the sides change places: in `direct_align.recover` the network's term has the other sign when
    inverting, so ascending r2 there is descending it for the sampler ("which has the opposite effect",
    section 3.2).
    """
    wanted, unwanted, sign = (C1, C2, 1) if branch == "denoise" else (C2, C1, -1)
    return {
        "released": lambda: relative_released(f, wanted, unwanted, d),
        "srp": lambda: relative(f, wanted, unwanted),
        "cfg": lambda: relative_cfg(f, wanted, unwanted, k),
        "branches": lambda: preference(f, wanted),
        "sgp": lambda: sign * preference(f, C1),
        "plain": lambda: sign * preference(f, C0),
    }[form]()


def loss(r, threshold=None):
    """What is minimised, [B]: -r (Eq. 6), or relu(threshold - r) (released code: 0.7, a habit of ReFL; it
    stops the gradient of a reward above it, which an HPS cosine never is)."""
    return -r if threshold is None else F.relu(threshold - r)


# ------------------------------------------------------------------------------------------ the reward models
def preprocess(images, size, mean, std):
    """images [B, 3, H, W] in [0, 1] -> [B, 3, size, size], with gradient: bicubic antialiased resize of the
    short side, centre crop, mean and std. What the scores' authors do to PIL pictures, on tensors (without
    antialias it is not)."""
    images = TF.resize(images, [size], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.normalize(TF.center_crop(images, [size, size]), mean, std)


class ClipReward:
    """An open_clip model as a reward: HPSv2.1 and the miniature's are two sets of weights for this one
    class."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        visual = model.visual
        self.size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        self.mean, self.std = visual.image_mean, visual.image_std
        self.device = next(model.parameters()).device
        self.cache = {}

    def image_features(self, images):
        """f_img: images [B, 3, H, W] in [0, 1] -> unit features [B, D] float32, with gradient."""
        images = preprocess(images, self.size, self.mean, self.std)
        return F.normalize(self.model.encode_image(images).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, texts):
        """C: a list of B texts -> unit features [B, D] float32, no gradient; each text is encoded once and
        cached."""
        new = [t for t in dict.fromkeys(texts) if t not in self.cache]
        if new:
            features = F.normalize(
                self.model.encode_text(self.tokenizer(new).to(self.device)).float(), dim=-1)
            self.cache.update(zip(new, features))
        return torch.stack([self.cache[t] for t in texts])


def with_words(words, prompts):
    """"<control>. <prompt>" for every prompt (section 3.2)."""
    return [f"{words}. {p}" for p in prompts]


def load_reward(name, device="cpu", arch="ViT-H-14"):
    """A `ClipReward` from "hpsv2.1" (fetched from the hub), a checkpoint in HPSv2.1's file layout (.pt with a
    "state_dict", loaded strictly into open_clip's `arch`), or a folder with open_clip_config.json and
    weights.

    Raises ValueError with one line when the file is not a reward.
    """
    logging.getLogger("open_clip").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    if name not in HPS and not Path(name).exists():
        raise ValueError(f"--reward {name}: no such file or folder, and not one of {', '.join(HPS)}")
    try:
        path = Path(hf_hub_download(*HPS[name]) if name in HPS else name)
        if path.is_dir():
            model, tokenizer = (open_clip.create_model(f"local-dir:{path}"),
                                open_clip.get_tokenizer(f"local-dir:{path}"))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            model, tokenizer = open_clip.create_model(arch, pretrained=None), open_clip.get_tokenizer(arch)
            model.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"--reward {name}: not a reward model (a folder with open_clip_config.json, or a "
                         f".pt with a state_dict for {arch}): {reason}") from error
    return ClipReward(model.to(device), tokenizer)
