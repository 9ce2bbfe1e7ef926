"""Semantic-Relative Preference: section 3.2 of the paper (arXiv 2509.06942), Eqs. 7-13, and the reward models
behind it.

Symbols, the paper's:  f = f_img(x) the normalised image feature [B, D], with gradient;  C = f_txt(p) a
normalised text feature [B, D], without;  C1 of "<control>. <prompt>" (wanted), C2 of "<neg>. <prompt>"
(unwanted), C0 of the bare prompt. A cosine f.C lies in [-1, 1]; HPSv2.1 scores are such cosines, about 0.28,
with no logit scale.
"""

import logging
from collections import OrderedDict
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, CLIPTokenizerFast, SiglipVisionModel

from rewards.pictures import differentiable, exact
from engine.files import fetched, one_line, strict


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
class Reward:
    """What every reward model offers: f of pictures, and C0, C1, C2 of prompts, so that r = f.C.

    A model says how it wants its pictures (size, mean, std, fit) and computes `features` of such pixels and
    `encode_text` of texts; `unit` is what one unit of r is in the metric's own unit.
    """
    unit, fit = 1.0, "crop"

    def __init__(self, network, size, mean, std):
        self.model = network.eval().requires_grad_(False)
        self.size, self.mean, self.std = size, list(mean), list(std)
        self.device = next(network.parameters()).device
        self.cache = {}

    def image_features(self, images):
        """f_img for training: images [B, 3, H, W] in [0, 1] -> f [B, D] float32, with gradient."""
        return self.features(differentiable(images, self.size, self.mean, self.std, self.fit))

    def picture_features(self, pictures):
        """f_img for evaluation: B PIL pictures, prepared as the scorer's authors do -> f [B, D] float32."""
        pixels = [exact(p, self.size, self.mean, self.std, self.fit) for p in pictures]
        return self.features(torch.stack(pixels).to(self.device))

    @torch.no_grad()
    def text_features(self, texts):
        """C: a list of B texts -> [B, D] float32, no gradient; each text is encoded once and cached."""
        new = [t for t in dict.fromkeys(texts) if t not in self.cache]
        if new:
            self.cache.update(zip(new, self.encode_text(new)))
        return torch.stack([self.cache[t] for t in texts])

    def conditions(self, prompts, control, neg):
        """(C0, C1, C2) [B, D] each: of B prompts, of "<control>. <prompt>" and of "<neg>. <prompt>"."""
        return tuple(self.text_features(t) for t in (prompts, with_words(control, prompts),
                                                     with_words(neg, prompts)))


class ClipReward(Reward):
    """An open_clip model: HPSv2.1, CLIP ViT-H/14 and the miniature's are weights for this one class. r is a
    cosine."""

    def __init__(self, model, tokenizer, fit="crop"):
        size = model.visual.image_size
        super().__init__(model, size if isinstance(size, int) else size[0],
                         model.visual.image_mean, model.visual.image_std)
        self.tokenizer, self.fit = tokenizer, fit

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> unit f [B, D] float32."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def encode_text(self, texts):
        """B texts -> unit C [B, D] float32; what is beyond 77 tokens is cut."""
        return F.normalize(self.model.encode_text(self.tokenizer(texts).to(self.device)).float(), dim=-1)


class PickReward(Reward):
    """PickScore v1: its metric is exp(logit_scale) cos, about 22, and r a twentieth of it (released code)."""
    unit, fit = 20.0, "crop-floor"

    def __init__(self, model, tokenizer):
        super().__init__(model, model.config.vision_config.image_size, open_clip.OPENAI_DATASET_MEAN,
                         open_clip.OPENAI_DATASET_STD)
        self.tokenizer = tokenizer

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> unit f [B, D] float32."""
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def encode_text(self, texts):
        """B texts, cut at the encoder's 77 tokens -> C [B, D] float32 of length exp(logit_scale) / 20."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                                max_length=self.model.config.text_config.max_position_embeddings)
        C = self.model.get_text_features(**tokens.to(self.device)).pooler_output.float()
        return self.model.logit_scale.exp() / self.unit * F.normalize(C, dim=-1)


class AestheticReward(Reward):
    """Aesthetic predictor v2.5, A(x) about 5.9 of 10, r a tenth of it. It reads no text, so the relative
    reward is between the picture and the same picture with a little noise (S1 of the paper's supplement):
    f = (A(x), A(x + noise)), and C0 = C1 = (1, 0), C2 = (0, 1) make Eqs. 7-13 say just that. Control words
    change nothing.

    The noise is one fixed pattern of standard deviation NOISE, on pixels in [0, 1] at the model's size
    [ours: the paper gives no number].
    """
    unit, fit, NOISE = 10.0, "stretch", 0.1

    def __init__(self, model, head):
        size = model.config.image_size
        super().__init__(model, size, [0.5] * 3, [0.5] * 3)
        self.head = head.eval().requires_grad_(False)
        pattern = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))
        self.noise = (self.NOISE / 0.5 * pattern).to(self.device)

    def score(self, pixels):
        """A(x) / 10: pixels [B, 3, H, W] -> [B]."""
        return self.head(F.normalize(self.model(pixels).pooler_output, dim=-1)).squeeze(-1) / self.unit

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> f [B, 2] float32: clean, noised."""
        return torch.stack([self.score(pixels), self.score(pixels + self.noise)], -1)

    def conditions(self, prompts, control, neg):
        """(C0, C1, C2) [B, 2] each: the clean, the clean and the noised picture's side."""
        return tuple(torch.eye(2, device=self.device)[side].expand(len(prompts), 2) for side in (0, 0, 1))


class Rewards:
    """Several rewards as one. r = sum of w_i f_i.C_i is again a dot product, of (w_1 f_1, w_2 f_2, ...) with
    (C_1, C_2, ...), so every equation above holds for it as it stands. A reward of weight 0 is held out: not
    trained on, but in `parts`, to be watched."""

    unit = 1.0

    def __init__(self, parts):
        """parts: {label: (Reward, weight)}."""
        self.parts = parts
        self.trained = [(reward, weight) for reward, weight in parts.values() if weight]

    def image_features(self, images):
        """f_img: images [B, 3, H, W] in [0, 1] -> weighted features [B, D] float32, with gradient."""
        return torch.cat([weight * reward.image_features(images) for reward, weight in self.trained], -1)

    def picture_features(self, pictures):
        """f_img for evaluation: B PIL pictures -> weighted features [B, D] float32."""
        return torch.cat([weight * reward.picture_features(pictures) for reward, weight in self.trained], -1)

    def conditions(self, prompts, control, neg):
        """C0, C1, C2 [B, D] each, no gradient: text features of the prompts, of "<control>. <prompt>" and of
        "<neg>. <prompt>" (section 3.2)."""
        each = [reward.conditions(prompts, control, neg) for reward, _ in self.trained]
        return tuple(torch.cat(side, -1) for side in zip(*each))


def with_words(words, prompts):
    """"<control>. <prompt>" for every prompt (section 3.2)."""
    return [f"{words}. {p}" for p in prompts]


# ------------------------------------------------------------------------------------- loading reward models
HEAD = "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HUB = {"hpsv2.1": ("xswu/HPSv2", ["HPS_v2.1_compressed.pt"]),
       "pickscore": ("yuvalkirstain/PickScore_v1", ["*.json", "*.txt", "*.safetensors"]),
       "clip": (CLIP_H, ["open_clip*"]),
       "aesthetic": ("google/siglip-so400m-patch14-384", ["*.json", "*.safetensors"])}


def fetch(name, where=None):
    """The local path of a reward's weights: `where` (a local path or a hub id), or the authors' place for a
    name of HUB. Raises ValueError, one line, if they cannot be had."""
    if name not in HUB and not Path(name).exists():
        raise ValueError(f"{name}: no such file or folder, and not one of {', '.join(HUB)}")
    place, files = HUB.get(name, (name, []))
    try:
        path = fetched(where or place, files)
        {"pickscore": tokenizer_of, "aesthetic": head_of}.get(name, Path)(path)  # so that neither fails later
        return path
    except ValueError as error:
        raise ValueError(f"{name}: {error}; give {name}=PATH") from error


def load_clip(path, device, arch="ViT-H-14"):
    """A `ClipReward` from a checkpoint in HPSv2.1's file layout (.pt with a "state_dict", loaded strictly
    into open_clip's `arch`; letterboxed as HPSv2 does), a folder with that file, or one with
    open_clip_config.json and weights."""
    logging.getLogger("open_clip").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    if (path / "open_clip_config.json").exists():
        where = f"local-dir:{path}"
        model = open_clip.create_model(where, require_pretrained=True)
        return ClipReward(model.to(device), open_clip.get_tokenizer(where))
    path = path / HUB["hpsv2.1"][1][0] if path.is_dir() else path
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = open_clip.create_model(arch, pretrained=None)
    model.load_state_dict(state)
    return ClipReward(model.to(device), open_clip.get_tokenizer(arch), "letterbox")


def tokenizer_of(path):
    """The folder of PickScore's tokenizer: its own folder, or CLIP ViT-H's where that has none."""
    own = (path / "tokenizer_config.json").exists()
    return path if own else fetched(CLIP_H, ["tokenizer*", "vocab.json", "merges.txt", "special_tokens*"])


def load_pickscore(path, device):
    """A `PickReward` from a transformers CLIPModel folder."""
    return PickReward(strict(CLIPModel, path, torch.float32).to(device),
                      CLIPTokenizerFast.from_pretrained(tokenizer_of(path)))


def head_of(path):
    """The weights of the aesthetic predictor's head: aesthetic_predictor_v2_5.pth in SigLIP's folder, else
    fetched from its repository (AGPL: nothing of it is kept here). ValueError, one line, if it is nowhere."""
    own = path / Path(HEAD).name
    try:
        return (torch.load(own, map_location="cpu", weights_only=True) if own.exists() else
                torch.hub.load_state_dict_from_url(HEAD, map_location="cpu", weights_only=True,
                                                   progress=False))
    except Exception as error:
        raise ValueError(f"{own if own.exists() else HEAD}: cannot be had: {one_line(error)}") from error


def load_aesthetic(path, device):
    """An `AestheticReward` from a SigLIP folder and the predictor's head."""
    state = {k.removeprefix("scoring_head."): v for k, v in head_of(path).items()}
    head = nn.Sequential(OrderedDict(  # at 1, 3, 5 and 7 are dropouts; there is no activation
        (at, nn.Linear(*reversed(state[f"{at}.weight"].shape))) for at in ("0", "2", "4", "6", "8")))
    head.load_state_dict(state)
    network = strict(SiglipVisionModel, path, torch.float32, unread=("text_model.", "logit_"))
    return AestheticReward(network.to(device), head.to(device))


def load_reward(name, device="cpu", where=None, arch="ViT-H-14"):
    """One reward model: a name of HUB, its weights from `where` (None: the authors' place); or a path in
    place of the name, for weights of `ClipReward`.

    Raises ValueError with one line when the weights cannot be had or are not such a reward.
    """
    path = fetch(name, where)
    try:
        load = {"pickscore": load_pickscore, "aesthetic": load_aesthetic}.get(name)
        return load(path, device) if load else load_clip(path, device, arch)
    except Exception as error:
        raise ValueError(f"{name}: not a reward model, in {path}: {one_line(error)}") from error


def parse_rewards(spec):
    """"hpsv2.1:0.7,pickscore=PATH:0.3" -> {label: (name, where or None, weight)}; a weight left out is 1, and
    0 holds the reward out. Raises ValueError with one line."""
    parts = {}
    for item in spec.split(","):
        label, colon, weight = item.strip().rpartition(":")
        label, weight = (label, weight) if colon else (weight, "1")
        name, _, where = label.partition("=")
        try:
            number = float(weight)
        except ValueError:
            raise ValueError(f"--reward {item}: give NAME, NAME=PATH, or either with :WEIGHT") from None
        if not 0 <= number < float("inf") or not name or label in parts:
            raise ValueError(f"--reward {item}: " + ("named twice" if label in parts else
                                                     "a weight must be 0 (held out) or above, and finite"))
        parts[label] = (name, where or None, number)
    if not any(weight for _, _, weight in parts.values()):
        raise ValueError(f"--reward {spec}: every weight is 0; one reward at least must be trained on")
    return parts


def load_rewards(spec, device="cpu"):
    """The `Rewards` of a specification that `parse_rewards` reads. Raises ValueError with one line."""
    try:
        return Rewards({label: (load_reward(name, device, where), weight)
                        for label, (name, where, weight) in parse_rewards(spec).items()})
    except ValueError as error:
        raise ValueError("--reward " + str(error).removeprefix("--reward ")) from error
