"""The base class of all rewards, and the types with which a reward's file describes itself."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from engine.memory.lean import keep_only_what_is_used
from engine.model.tensors import are_finite
from rewards.pictures import differentiable, exact
from srpo_reward import with_words


class Column(NamedTuple):
    """A column of evaluate.py's table."""
    title: str
    format: str    # the format of its numbers, such as ".3f"; ".1%" shows percent


class ImageNetwork(NamedTuple):
    """A reward's network without weights, from which --plan counts memory and FLOP."""
    network: nn.Module
    call: Callable    # call(grad=False): one call of its image side; grad: with a gradient in the pixels
    times: int        # calls for each image; 0 for a held-out reward


def on_zeros(look, size):
    """The `call` of an `ImageNetwork`. look: its image side, pixels [1, 3, size, size] -> features."""
    def call(grad=False):
        return look(torch.zeros(1, 3, size, size, requires_grad=grad))
    return call


class Reward:
    """f of pictures and C0, C1, C2 of prompts, so that r = f.C (Eq. 7).

    A subclass defines `features` of prepared pixels and `encode_text` of texts. size, mean, std and fit say how its
    pictures are prepared (rewards/pictures.py). One unit of r is `unit` units of the metric.
    """
    unit = 1.0
    fit = "crop"

    def __init__(self, network, size, mean, std):
        """network: a module with weights, which is frozen here. size: pixels of a side. mean, std: three numbers each,
        which normalise pixels in [0, 1]."""
        self.model = network.eval().requires_grad_(False)
        self.size = size
        self.mean = list(mean)
        self.std = list(std)
        self.device = next(network.parameters()).device
        self.cache = {}    # {text: its C [D]}
        self.path = None   # the path of its weights; load_reward sets it

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> f [B, D] float32, with gradient."""
        raise NotImplementedError

    def encode_text(self, texts):
        """A list of B texts -> C [B, D] float32."""
        raise NotImplementedError

    def does_not_know(self, text):
        """Whether its tokenizer does not know a word of a text. False where that cannot be told."""
        return False

    def image_features(self, images):
        """f for training: images [B, 3, H, W] in [0, 1] -> f [B, D] float32, with gradient."""
        return self.features(differentiable(images, self.size, self.mean, self.std, self.fit))

    def picture_features(self, pictures):
        """f for evaluation: B PIL pictures, prepared as the scorer's authors do -> f [B, D] float32."""
        pixels = [exact(picture, self.size, self.mean, self.std, self.fit) for picture in pictures]
        return self.features(torch.stack(pixels).to(self.device))

    def is_finite(self):
        """Whether every number of its networks is finite."""
        networks = [value for value in vars(self).values() if isinstance(value, nn.Module)]
        return all(are_finite(network.state_dict().values()) for network in networks)

    def keep_image_side(self, dtype):
        """Keep on the device only what a picture passes through, in `dtype`; move the rest to the host's memory. After
        this, only texts that have been encoded before can be used."""
        pixels = torch.zeros(1, 3, self.size, self.size, device=self.device)
        keep_only_what_is_used(self.model, partial(self.features, pixels), dtype)

    @torch.no_grad()
    def text_features(self, texts):
        """C of a list of B texts: [B, D] float32, without gradient. Each text is encoded once and cached.

        A text is encoded alone. In a batch, its last bits would depend on the other texts, so a resumed run could
        differ from one that was not stopped."""
        for text in texts:
            if text not in self.cache:
                self.cache[text] = self.encode_text([text])[0]
        return torch.stack([self.cache[text] for text in texts])

    def conditions(self, prompts, control, neg):
        """(C0, C1, C2), [B, D] each: of B prompts, of "<control>. <prompt>" and of "<neg>. <prompt>"."""
        C0 = self.text_features(prompts)
        C1 = self.text_features(with_words(control, prompts))
        C2 = self.text_features(with_words(neg, prompts))
        return C0, C1, C2
