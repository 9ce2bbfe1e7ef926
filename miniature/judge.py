"""The miniature's judge: a small network in place of the paper's human raters. It takes no part in any training.

It answers three questions that the drawn world makes answerable. Is the picture a photo? Which things are where? Is
the picture damaged?
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from miniature import world

FEATURES = ["size", "colour", "shape"]  # the features of a thing
SLOTS = ["first", "second"]


def features_of(kinds):
    """Indices of world.KINDS, in a tensor of any shape or an int -> indices of world.SIZES, COLOURS and SHAPES."""
    shapes = len(world.SHAPES)
    colours = len(world.COLOURS)
    return kinds // (shapes * colours), kinds // shapes % colours, kinds % shapes


def block(inputs, outputs, stride):
    """A 3 x 3 convolution, its norm and its nonlinearity."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.SiLU()]


class Judge(nn.Module):
    """Pictures [B, 3, 64, 64] in [0, 1] -> logits {name: tensor}: realism, painting and broken [B], layout [B, 3], and
    "first size" [B, 3], "second colour" [B, 5] and so on, in the order of the world's lists."""

    size = world.SIZE  # pixels of a side of its pictures

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
        """For B pictures [B, 3, 64, 64] in [0, 1] and their prompts: {name: [B] float}, 1 for yes and 0 for no.

        realism    the look is in the world's range of photos (u above 0.75)
        painting   the look is in the world's range of paintings
        alignment  things, sizes, colours and places are those of the prompt; NaN for a prompt outside this world
        broken     the picture has damaged parts: two blended scenes, melted or clipped regions, noise
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
    """1.0 if the seen things are those that the prompt asks for, 0.0 if not; NaN for a prompt outside this world.
    layout: an index of world.LAYOUTS. first, second: [size, colour, shape], indices of the world's lists."""
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
