"""The miniature's judge: a small network that no training ever sees, in place of the paper's human
evaluators.

It answers what the drawn world makes answerable: is the picture a photo, which things stand where, is it
damaged?
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from miniature import world

FEATURES = ["size", "colour", "shape"]  # of a thing
SLOTS = ["first", "second"]


def features_of(kinds):
    """Indices of world.KINDS, any shape -> those of world.SIZES, world.COLOURS and world.SHAPES."""
    shapes = len(world.SHAPES)
    colours = len(world.COLOURS)
    return kinds // (shapes * colours), kinds // shapes % colours, kinds % shapes


def block(inputs, outputs, stride):
    """A 3 x 3 convolution, its norm and its nonlinearity."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.SiLU()]


class Judge(nn.Module):
    """Pictures [B, 3, 64, 64] in [0, 1] -> logits of what is seen, a dict: realism, painting and broken [B],
    layout [B, 3], and "first size" [B, 3], "second colour" [B, 5] and so on: indices of the world's lists."""

    size = world.SIZE  # pixels a side of what it sees

    def __init__(self, width=32):
        super().__init__()
        self.trunk = nn.Sequential(
            *block(3, width, 2), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 1),
            *block(2 * width, 3 * width, 2), *block(3 * width, 3 * width, 2),
            nn.Flatten(), nn.Linear(3 * width * 16, 128), nn.SiLU())
        self.sizes = {"realism": 1, "painting": 1, "broken": 1, "layout": len(world.LAYOUTS)}
        for slot in SLOTS:
            choices = [len(world.SIZES), len(world.COLOURS), len(world.SHAPES)]
            for feature, n in zip(FEATURES, choices, strict=True):
                self.sizes[f"{slot} {feature}"] = n
        self.head = nn.Linear(128, sum(self.sizes.values()))

    def forward(self, images):
        logits = self.head(self.trunk(2 * images - 1))  # [B, 28]
        out = {}
        for name, part in zip(self.sizes, logits.split(list(self.sizes.values()), dim=-1), strict=True):
            out[name] = part.squeeze(-1) if self.sizes[name] == 1 else part
        return out

    @torch.no_grad()
    def verdicts(self, images, prompts):
        """For B pictures and their prompts: a dict of [B] float tensors, 1 for yes and 0 for no.

        realism    in the world's own range of photos (u above 0.75)
        painting   in its range of paintings
        alignment  things, sizes, colours and places are the prompt's; NaN for a prompt that is not of this
                   world
        broken     damaged: ghosts, melted or clipped regions, noise
        """
        out = self(images)
        layouts = out["layout"].argmax(-1).tolist()
        things = []
        for slot in SLOTS:
            seen = [out[f"{slot} {feature}"].argmax(-1) for feature in FEATURES]
            things.append(torch.stack(seen, 1).tolist())
        alignment = [aligned(*each) for each in zip(prompts, layouts, *things, strict=True)]
        realism, painting, broken = ((out[name] > 0).float() for name in ("realism", "painting", "broken"))
        return {"realism": realism, "painting": painting, "alignment": torch.tensor(alignment),
                "broken": broken}


def aligned(prompt, layout, first, second):
    """1 if what is seen is what the prompt asks for, 0 if not; NaN for a prompt that is not of this world.
    layout: an index of world.LAYOUTS; first, second: [size, colour, shape], likewise."""
    truth = world.parse(prompt)
    if truth is None:
        return float("nan")
    kind, wanted_layout = truth
    if layout != wanted_layout or first != list(features_of(kind[0])):
        return 0.0
    alone = layout == world.LAYOUTS.index("alone")
    return float(alone or second == list(features_of(kind[1])))


def load_judge(folder):
    """The trained `Judge` of a model folder (folder/judge/judge.safetensors)."""
    judge = Judge().eval().requires_grad_(False)
    weights = load_file(Path(folder) / "judge" / "judge.safetensors")
    judge.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return judge
