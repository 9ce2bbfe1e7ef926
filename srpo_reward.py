"""Semantic-Relative Preference: section 3.2 of the paper (arXiv 2509.06942), Eqs. 7-13, for any reward that reads a
picture and a text.

Symbols, the paper's:  RM(x, p) the reward of picture x for text p;  r0 = RM(x, p0) of the bare prompt;  r1 = RM(x, p1)
of "<control>. <prompt>" (wanted);  r2 = RM(x, p2) of "<neg>. <prompt>" (unwanted). All are [B], for B pictures.

A CLIP-like reward is a dot product, RM(x, p) = f.C. Here f = f_img(x) [B, D] is the image feature and C = f_txt(p)
[B, D] the text feature, both of norm 1. HPSv2.1's scores are such cosines, about 0.28, with no logit scale. Every form
below is a weighted sum of r0, r1 and r2. For a CLIP-like reward it is one dot product, with the same sum of text
features (Eq. 10). The networks are in rewards/.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


# ----------------------------------------------------------------------------------------------- Eqs. 7 to 11
def preference(f, C):
    """Eq. 7 of a CLIP-like reward with the bare prompt, and Eq. 8 (SGP) with "<control>. <prompt>":
    r = f_img(x)^T f_txt(p).   f, C [B, D] -> r [B], in [-1, 1] for features of norm 1."""
    return (f * C).sum(-1)


def relative(r1, r2):
    """Eq. 9 (SRP):  r = r1 - r2.   [B] each. For a CLIP-like reward it is Eq. 10, f_img(x)^T (C1 - C2)."""
    return r1 - r2


def relative_cfg(r1, r2, k):
    """Eq. 11 (CFG-like), as printed:  r = (1 - k) r2 + k r1.   r1, r2 [B], k a number -> r [B].

    k = 1 is r1 alone; k > 1 pushes away from r2, by k - 1.
    """
    return (1 - k) * r2 + k * r1


def relative_released(r1, r2, d):
    """Eq. 11 as released:  r = (1 + d) r1 - r2.   r1, r2 [B], d [B] or a number -> r [B].

    Differs from the paper: the weight of the wanted side is the late-timestep discount
    `direct_align.discount`, and that of the unwanted side stays 1. At d = 0 it is Eq. 9.
    """
    return (1 + d) * r1 - r2


# --------------------------------------------------------------------------------------------- Eqs. 12 and 13
def branch_reward(form, branch, r0, r1, r2, d, k):
    """Eqs. 12 and 13: the reward of one branch, to be maximised in both: r0, r1, r2 [B] -> r [B].

    form      denoise (Eq. 12)       invert (Eq. 13)
    released  (1 + d) r1 - r2        (1 + d) r2 - r1      the released code: whole relative reward in both
    srp       r1 - r2                r2 - r1              Eqs. 9 and 10 in both
    cfg       (1 - k) r2 + k r1      (1 - k) r1 + k r2    Eq. 11 as printed, in both
    branches  r1                     r2                   Eqs. 12, 13 as printed: one side in each branch
    sgp       r1                    -r1                   Eq. 8: control words, but nothing relative
    plain     r0                    -r0                   Eq. 7: no control words (plain Direct-Align)

    In the inverting branch the network's term in `direct_align.recover` has the opposite sign. To raise r2 there lowers
    the r2 of what the sampler makes ("which has the opposite effect", section 3.2). So r1 and r2 change places.
    """
    if branch == "denoise":
        wanted, unwanted = r1, r2
        sign = 1
    else:
        wanted, unwanted = r2, r1
        sign = -1

    if form == "released":
        return relative_released(wanted, unwanted, d)
    if form == "srp":
        return relative(wanted, unwanted)
    if form == "cfg":
        return relative_cfg(wanted, unwanted, k)
    if form == "branches":
        return wanted
    if form == "sgp":
        return sign * r1
    if form == "plain":
        return sign * r0
    raise ValueError(f"{form}: not a row of the table")


def loss(r, threshold=None):
    """What is minimised, [B]: -r (Eq. 6), or relu(threshold - r) (released code: 0.7, from ReFL). Above the threshold
    the gradient is 0. The cosines of HPSv2.1 do not reach 0.7."""
    return -r if threshold is None else F.relu(threshold - r)


# ------------------------------------------------------------------------------------------------- the texts
class Texts(NamedTuple):
    """What a reward reads for B prompts: B texts each."""
    p0: list    # the prompts
    p1: list    # "<control>. <prompt>", wanted
    p2: list    # "<neg>. <prompt>", unwanted


def with_words(words, prompts):
    """"<words>. <prompt>" for every prompt (section 3.2)."""
    return [f"{words}. {prompt}" for prompt in prompts]


def texts_of(prompts, control, neg):
    """The `Texts` of prompts, with the wanted and the unwanted words."""
    return Texts(list(prompts), with_words(control, prompts), with_words(neg, prompts))


# ----------------------------------------------------------------------------------- r0, r1 and r2 of pictures
class Sum:
    """w_0 r0 + w_1 r1 + w_2 r2 of B pictures, which is computed by `value`.

    r0, r1 and r2 are such sums themselves. They can be added, subtracted, and multiplied by a number or by numbers [B].
    So every equation above works with them as with tensors. They are computed only at the end, for two reasons: a text
    that a form does not read is never scored, and a CLIP-like reward needs one dot product (Eq. 10).
    """

    def __init__(self, seen, weights):
        """seen: the `Seen` pictures; weights: {number of a text: its weight}. A weight of 0 is left out."""
        self.seen = seen
        self.weights = {text: w for text, w in weights.items() if torch.is_tensor(w) or w != 0}

    def __rmul__(self, w):
        return Sum(self.seen, {text: w * own for text, own in self.weights.items()})

    def __neg__(self):
        return -1 * self

    def __add__(self, other):
        weights = dict(self.weights)
        for text, w in other.weights.items():
            weights[text] = weights[text] + w if text in weights else w
        return Sum(self.seen, weights)

    def __sub__(self, other):
        return self + -other

    def value(self):
        """[B] float32, with gradient in the pictures."""
        return self.seen.value(self.weights)

    @torch.no_grad()
    def known(self):
        """[B] float32 without gradient; None if a text would have to be scored for it."""
        return self.seen.value(self.weights) if self.seen.knows(self.weights) else None


class Seen:
    """B pictures as several rewards see them, and the texts to be scored."""

    def __init__(self, parts, texts, device):
        """parts: a list of (reward, weight, its features of the pictures); texts: `Texts`; device: of the scores."""
        self.parts = parts
        self.texts = texts
        self.device = device
        self.scores = {}    # {(number of a part, number of a text): RM(x, p) [B]}, of rewards that are no dot product

    def knows(self, weights):
        """Whether a sum of texts can be computed without scoring a text."""
        return all(reward.is_dot_product or (part, text) in self.scores
                   for part, (reward, _, _) in enumerate(self.parts) for text in weights)

    def score(self, part, text):
        """RM(x, p) [B] of a part that is no dot product; each text is scored once."""
        if (part, text) not in self.scores:
            reward, _, f = self.parts[part]
            self.scores[part, text] = reward.score(f, self.texts[text])
        return self.scores[part, text]

    def value(self, weights):
        """sum over parts and texts of their weights times RM(x, p): [B]."""
        image = []
        text = []
        r = 0
        for part, (reward, weight, f) in enumerate(self.parts):
            if reward.is_dot_product:
                image.append(weight * f)
                text.append(weighted({n: reward.condition(self.texts, n) for n in weights}, weights))
            else:
                r = r + weight * weighted({n: self.score(part, n) for n in weights}, weights)
        if image:
            # A weighted sum of dot products is one dot product, of (w_1 f_1, w_2 f_2, ...) with (C_1, C_2, ...).
            r = r + preference(torch.cat(image, -1), torch.cat(text, -1))
        return r.to(self.device)


def weighted(values, weights):
    """sum_n w_n value_n, of values {n: [B] or [B, D]} and weights {n: a number or [B]}."""
    total = 0
    for n, value in values.items():
        w = weights[n]
        if torch.is_tensor(w):
            w = w.to(value).view(-1, *[1] * (value.ndim - 1))
        total = total + w * value
    return total


class Rewards:
    """Several rewards as one: r is their weighted sum, so every equation above holds for it unchanged. A reward of
    weight 0 is held out: not trained on, but in `parts`, to be watched.
    """
    unit = 1.0

    def __init__(self, parts):
        """parts: {label: (reward, weight)}; a reward is a `rewards.base.Reward`."""
        self.parts = parts
        self.trained = [(reward, weight) for reward, weight in parts.values() if weight]

    def see(self, images):
        """What `Seen` needs of images [B, 3, H, W] in [0, 1], with gradient: [(reward, weight, features)]."""
        return [(reward, weight, reward.image_features(images)) for reward, weight in self.trained]

    def of(self, images, texts):
        """RM(x, p) for three texts (Eq. 7):  r0, r1 and r2, each a `Sum`, of images [B, 3, H, W] in [0, 1] with
        gradient, and of their `Texts`. A reward that is no dot product is asked once for each text that is read."""
        return sums(Seen(self.see(images), texts, images.device))

    def of_pictures(self, pictures, texts):
        """The same for evaluation: of B PIL pictures."""
        seen = [(reward, weight, reward.picture_features(pictures)) for reward, weight in self.trained]
        return sums(Seen(seen, texts, self.trained[0][0].device))


def sums(seen):
    """(r0, r1, r2) of `Seen` pictures."""
    return tuple(Sum(seen, {text: 1}) for text in range(len(Texts._fields)))


def texts_read(form, k):
    """How many of the three texts a form of `branch_reward` reads in one branch. k: of Eq. 11."""
    return len(branch_reward(form, "denoise", *sums(None), 0.0, k).weights)
