"""Semantic-Relative Preference: section 3.2 of the paper (arXiv 2509.06942), Eqs. 7-13, and a weighted sum of
rewards.

Symbols, the paper's:  f = f_img(x) the normalised image feature [B, D], with gradient;  C = f_txt(p) a
normalised text feature [B, D], without;  C1 of "<control>. <prompt>" (wanted), C2 of "<neg>. <prompt>"
(unwanted), C0 of the bare prompt. A cosine f.C lies in [-1, 1]; HPSv2.1 scores are such cosines, about 0.28,
with no logit scale. The networks that compute f and C are in rewards/.
"""

import torch
import torch.nn.functional as F


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
    weight = 1 + (d.to(f) if torch.is_tensor(d) else f.new_full((), d))    # [B], or one number
    return preference(f, weight.view(-1, 1) * C1 - C2)


# --------------------------------------------------------------------------------------------- Eqs. 12 and 13
def branch_reward(form, branch, f, C0, C1, C2, d, k):
    """Eqs. 12 and 13: the reward of one branch, to be maximised in both: f, C0, C1, C2 [B, D] -> r [B].

    form      denoise (Eq. 12)       invert (Eq. 13)
    released  f.((1 + d) C1 - C2)    f.((1 + d) C2 - C1)    the released code: whole relative reward in both
    srp       f.(C1 - C2)            f.(C2 - C1)            Eq. 10 in both
    cfg       f.((1-k) C2 + k C1)    f.((1-k) C1 + k C2)    Eq. 11 as printed, in both
    branches  f.C1                   f.C2                   Eqs. 12, 13 as printed: one side in each branch
    sgp       f.C1                  -f.C1                   Eq. 8: control words, but nothing relative
    plain     f.C0                  -f.C0                   Eq. 7: no control words (plain Direct-Align)

    When inverting, the network's term in `direct_align.recover` has the opposite sign. Raising r2 there lowers it
    for the sampler ("which has the opposite effect", section 3.2). So the sides change places.
    """
    if branch == "denoise":
        wanted, unwanted = C1, C2
        sign = 1
    else:
        wanted, unwanted = C2, C1
        sign = -1

    if form == "released":
        return relative_released(f, wanted, unwanted, d)
    if form == "srp":
        return relative(f, wanted, unwanted)
    if form == "cfg":
        return relative_cfg(f, wanted, unwanted, k)
    if form == "branches":
        return preference(f, wanted)
    if form == "sgp":
        return sign * preference(f, C1)
    if form == "plain":
        return sign * preference(f, C0)
    raise ValueError(f"{form}: not a row of the table")


def loss(r, threshold=None):
    """What is minimised, [B]: -r (Eq. 6), or relu(threshold - r) (released code: 0.7, from ReFL). Above
    the threshold the gradient is 0; cosines of an HPS stay below 0.7."""
    return -r if threshold is None else F.relu(threshold - r)


# ------------------------------------------------------------------------- control words, and several rewards
def with_words(words, prompts):
    """"<words>. <prompt>" for every prompt (section 3.2)."""
    return [f"{words}. {prompt}" for prompt in prompts]


class Rewards:
    """Several rewards as one. r = sum of w_i f_i.C_i is again a dot product, of (w_1 f_1, w_2 f_2, ...) with
    (C_1, C_2, ...), so every equation above holds for it unchanged. A reward of weight 0 is held out: not
    trained on, but in `parts`, to be watched.
    """
    unit = 1.0

    def __init__(self, parts):
        """parts: {label: (reward, weight)}; a reward offers image_features, picture_features and conditions,
        as `rewards.base.Reward` does and this class itself."""
        self.parts = parts
        self.trained = [(reward, weight) for reward, weight in parts.values() if weight]

    def image_features(self, images):
        """f_img: images [B, 3, H, W] in [0, 1] -> weighted features [B, D] float32, with gradient."""
        weighted = [weight * reward.image_features(images) for reward, weight in self.trained]
        return torch.cat(weighted, -1)

    def picture_features(self, pictures):
        """f_img for evaluation: B PIL pictures -> weighted features [B, D] float32."""
        weighted = [weight * reward.picture_features(pictures) for reward, weight in self.trained]
        return torch.cat(weighted, -1)

    def conditions(self, prompts, control, neg):
        """C0, C1, C2 [B, D] each, no gradient: text features of the prompts, of "<control>. <prompt>" and of
        "<neg>. <prompt>" (section 3.2)."""
        each = [reward.conditions(prompts, control, neg) for reward, _ in self.trained]
        C0, C1, C2 = (torch.cat(side, -1) for side in zip(*each, strict=True))
        return C0, C1, C2
