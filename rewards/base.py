"""The base class of all rewards, and the types with which a reward's file describes itself."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from engine.errors import UserError
from engine.files import fits
from engine.hub import fetched
from engine.memory.lean import keep_only_what_is_used
from engine.model.tensors import are_finite
from rewards.pictures import differentiable, exact
from srpo_reward import Seen, preference, sums, texts_of

ALIKE = 1e-6  # features of norm 1 that differ by less are of texts that a reward cannot tell apart


class Column(NamedTuple):
    """A column of evaluate.py's table."""
    title: str
    format: str    # the format of its numbers, such as ".3f"; ".1%" shows percent


class ImageNetwork(NamedTuple):
    """A reward's network without weights, from which --plan counts memory and FLOP."""
    network: nn.Module
    call: Callable    # call(grad=False): one call of its image side; grad: with a gradient in the pixels
    times: int        # calls for each image; 0 for a held-out reward
    texts: bool = False    # whether a call also reads a text, so that each text takes a call


def on_zeros(look, size):
    """The `call` of an `ImageNetwork`. look: its image side, pixels [1, 3, size, size] -> features."""
    def call(grad=False):
        return look(torch.zeros(1, 3, size, size, requires_grad=grad))
    return call


def fill(network, state):
    """Put the tensors of a state dict in the place of a network's. Raises UserError, in one line, if one is missing,
    unknown or of another shape."""
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(" ".join(str(error).split())) from error


class Files(NamedTuple):
    """The paths of a reward's weights and of its tokenizer."""
    weights: Path
    tokenizer: Path  # a folder


def fetch(where, file, vocabularies, tokenizer, tokenizer_files):
    """The `Files`. where: the file of the weights, a folder that holds it, or a hub repository. The tokenizer is the
    one beside the file, if one of `vocabularies` is there; otherwise the files of the hub's `tokenizer`. Raises
    UserError if a file is neither here nor on the hub."""
    found = fetched(where, [file])
    path = found / file if found.is_dir() else found
    if not path.is_file():
        raise UserError(f"{found}: holds no {file}")
    if any((path.parent / name).is_file() for name in vocabularies):
        return Files(path, path.parent)
    return Files(path, fetched(tokenizer, tokenizer_files))


class Reward:
    """RM(x, p): a reward of pictures and texts, differentiable in the pictures.

    A subclass defines `score`, and `features` if a picture can be read before its text is known. size, mean, std and
    fit say how its pictures are prepared (rewards/pictures.py). One unit of r is `unit` units of the metric.
    """
    unit = 1.0
    fit = "crop"
    is_dot_product = False

    def __init__(self, network, size, mean, std):
        """network: a module with weights, which is frozen here. size: pixels of a side. mean, std: three numbers each,
        which normalise pixels in [0, 1]. Raises UserError if they are not, a std is not above 0, or network has no
        parameters: its device would not be known."""
        if not fits([*mean, *std], [float]) or not len(mean) == len(std) == 3 or min(std) <= 0:
            raise UserError(f"its pictures' mean {mean} and std {std} must be three numbers each, and std above 0")
        if next(network.parameters(), None) is None:
            raise UserError("its network has no parameters; a formula's constants can be its parameters")
        self.model = network.eval().requires_grad_(False)
        self.size = size
        self.mean = list(mean)
        self.std = list(std)
        self.device = next(network.parameters()).device
        self.cache = {}    # {text: its C [D]}
        self.path = None   # the path of its weights; load_reward sets it

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> what is known of B pictures before their texts are, with gradient. It
        is made once, and scored with every text."""
        return pixels

    def score(self, f, texts):
        """Features f of B pictures, and B texts -> RM(x, p) [B] float32, with gradient."""
        raise NotImplementedError

    def does_not_know(self, text):
        """Whether its tokenizer does not know a word of a text. False where that cannot be told."""
        return False

    def reads_alike(self, one, other):
        """Whether it reads two texts alike, so that it gives a picture the same reward for both."""
        return one == other

    def image_features(self, images):
        """f for training: images [B, 3, H, W] in [0, 1], of any device -> `features`, with gradient."""
        images = images.to(self.device)
        return self.features(differentiable(images, self.size, self.mean, self.std, self.fit))

    def picture_features(self, pictures):
        """f for evaluation: B PIL pictures, prepared as the scorer's authors do -> `features`."""
        pixels = [exact(picture, self.size, self.mean, self.std, self.fit) for picture in pictures]
        return self.features(torch.stack(pixels).to(self.device))

    def of(self, images, texts):
        """(r0, r1, r2), each a `srpo_reward.Sum`, of images [B, 3, H, W] in [0, 1] and `srpo_reward.Texts`."""
        return sums(Seen([(self, 1, self.image_features(images))], texts, images.device))

    def of_pictures(self, pictures, texts):
        """The same of B PIL pictures."""
        return sums(Seen([(self, 1, self.picture_features(pictures))], texts, self.device))

    def is_finite(self):
        """Whether every number of its networks is finite."""
        networks = [value for value in vars(self).values() if isinstance(value, nn.Module)]
        return all(are_finite(network.state_dict().values()) for network in networks)

    def read(self, texts):
        """Read `srpo_reward.Texts` before `compact` is called."""

    def compact(self, dtype):
        """Keep on the device only what scoring runs, in `dtype`; move the rest to the host's memory."""
        keep_only_what_is_used(self.model, self.score_nothing, dtype)

    def score_nothing(self):
        """Score an empty picture with an empty text, so that it is known what runs."""
        pixels = torch.zeros(1, 3, self.size, self.size, device=self.device)
        return self.score(self.features(pixels), [""])


class DotProduct(Reward):
    """A CLIP-like reward: RM(x, p) = f.C (Eq. 7), with f of the picture and C of the text.

    A subclass defines `features` of prepared pixels, [B, D] float32 with gradient, and `encode_text`.
    """
    is_dot_product = True

    def encode_text(self, texts):
        """A list of B texts -> C [B, D] float32."""
        raise NotImplementedError

    def score(self, f, texts):
        return preference(f, self.text_features(texts))

    @torch.no_grad()
    def text_features(self, texts):
        """C of a list of B texts: [B, D] float32, without gradient. Each text is encoded once and cached.

        A text is encoded alone. In a batch, its last bits would depend on the other texts, so a resumed run could
        differ from one that was not stopped."""
        for text in texts:
            if text not in self.cache:
                self.cache[text] = self.encode_text([text])[0]
        return torch.stack([self.cache[text] for text in texts])

    def condition(self, texts, n):
        """C [B, D] of the n-th of `srpo_reward.Texts`: C0, C1 or C2."""
        return self.text_features(texts[n])

    def conditions(self, prompts, control, neg):
        """(C0, C1, C2), [B, D] each: of B prompts, of "<control>. <prompt>" and of "<neg>. <prompt>"."""
        texts = texts_of(prompts, control, neg)
        return tuple(self.condition(texts, n) for n in range(len(texts)))

    def reads_alike(self, one, other):
        C1, C2 = self.text_features([one, other])
        return (C1 - C2).abs().max().item() < ALIKE

    def read(self, texts):
        for n in range(len(texts)):
            self.condition(texts, n)

    def compact(self, dtype):
        """Keep on the device only what a picture passes through, in `dtype`; move the rest to the host's memory. After
        this, only texts that have been encoded before can be used."""
        pixels = torch.zeros(1, 3, self.size, self.size, device=self.device)
        keep_only_what_is_used(self.model, partial(self.features, pixels), dtype)
