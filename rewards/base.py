"""What every reward is made of: the class that all are, and what its file tells the table and the plan."""

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
    format: str    # how Python formats a number of it, such as ".3f"


class ImageNetwork(NamedTuple):
    """What the plan counts of a reward: its network, without weights."""
    network: nn.Module
    call: Callable    # call(grad=False): one call of its image side, with or without a gradient in the pixels
    times: int        # how many such calls an image takes; 0 for a reward that is held out


def on_zeros(look, size):
    """The `call` of an `ImageNetwork` whose image side is `look`, pixels [1, 3, size, size] -> features."""
    def call(grad=False):
        return look(torch.zeros(1, 3, size, size, requires_grad=grad))
    return call


class Reward:
    """f of pictures and C0, C1, C2 of prompts, so that r = f.C (Eq. 7).

    A subclass computes `features` of prepared pixels and `encode_text` of texts. It says how it wants its
    pictures prepared (size, mean, std, fit: rewards/pictures.py), and in `unit` how many of the metric's own
    units one unit of r is.
    """
    unit = 1.0
    fit = "crop"

    def __init__(self, network, size, mean, std):
        """network: a module with weights, frozen here; size: pixels a side; mean, std: three numbers each."""
        self.model = network.eval().requires_grad_(False)
        self.size = size
        self.mean = list(mean)
        self.std = list(std)
        self.device = next(network.parameters()).device
        self.cache = {}    # text: its C [D]
        self.path = None   # of its weights, if it is loaded by its name

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> f [B, D] float32, with gradient."""
        raise NotImplementedError

    def encode_text(self, texts):
        """A list of B texts -> C [B, D] float32."""
        raise NotImplementedError

    def image_features(self, images):
        """f_img for training: images [B, 3, H, W] in [0, 1] -> f [B, D] float32, with gradient."""
        return self.features(differentiable(images, self.size, self.mean, self.std, self.fit))

    def picture_features(self, pictures):
        """f_img for evaluation: B PIL pictures, prepared as the scorer's authors do -> f [B, D] float32."""
        pixels = [exact(picture, self.size, self.mean, self.std, self.fit) for picture in pictures]
        return self.features(torch.stack(pixels).to(self.device))

    def is_finite(self):
        """Whether every number of its networks is finite."""
        networks = [value for value in vars(self).values() if isinstance(value, nn.Module)]
        return all(are_finite(network.state_dict().values()) for network in networks)

    def keep_image_side(self, dtype):
        """Leave on the device what a picture passes through, in dtype; the rest goes to the host. From now on
        only those texts are known that have been encoded already."""
        pixels = torch.zeros(1, 3, self.size, self.size, device=self.device)
        keep_only_what_is_used(self.model, partial(self.features, pixels), dtype)

    @torch.no_grad()
    def text_features(self, texts):
        """C: a list of B texts -> [B, D] float32, no gradient; each text is encoded once and cached. It is
        encoded alone: in a batch its last bits would depend on the others, and so on where a run was stopped
        and resumed."""
        for text in texts:
            if text not in self.cache:
                self.cache[text] = self.encode_text([text])[0]
        return torch.stack([self.cache[text] for text in texts])

    def conditions(self, prompts, control, neg):
        """(C0, C1, C2) [B, D] each: of B prompts, of "<control>. <prompt>" and of "<neg>. <prompt>"."""
        C0 = self.text_features(prompts)
        C1 = self.text_features(with_words(control, prompts))
        C2 = self.text_features(with_words(neg, prompts))
        return C0, C1, C2
