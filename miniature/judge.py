"""The miniature's judge: a small network that no training ever sees, in place of the paper's human
evaluators.

It answers what the drawn world makes answerable: is the picture a photo, which things stand where, is it
damaged?
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from . import world


class Judge(nn.Module):
    """Pictures [B, 3, 64, 64] in [0, 1] -> logits of what is seen, a dict: realism [B], broken [B],
    layout [B, 3], first and second [B, 15] (indices of world.LAYOUTS and world.KINDS)."""

    def __init__(self, width=32):
        super().__init__()
        block = lambda i, o, stride: [nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(4, o), nn.SiLU()]
        self.trunk = nn.Sequential(
            *block(3, width, 2), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 1),
            *block(2 * width, 3 * width, 2), *block(3 * width, 3 * width, 2),
            nn.Flatten(), nn.Linear(3 * width * 16, 128), nn.SiLU())
        self.sizes = {"realism": 1, "broken": 1, "layout": len(world.LAYOUTS), "first": len(world.KINDS),
                      "second": len(world.KINDS)}
        self.head = nn.Linear(128, sum(self.sizes.values()))

    def forward(self, images):
        parts = self.head(self.trunk(2 * images - 1)).split(list(self.sizes.values()), dim=-1)
        return {k: p.squeeze(-1) if p.shape[-1] == 1 else p for k, p in zip(self.sizes, parts)}

    @torch.no_grad()
    def verdicts(self, images, prompts):
        """For B pictures and their prompts: a dict of [B] float tensors, 1 for yes and 0 for no.

        realism    more photo than CG (u above 0.5)
        alignment  things, colours and places are the prompt's; NaN for a prompt that is not of this world
        broken     damaged: ghosts, melted or clipped regions, noise
        """
        seen = self(images)
        layout, first, second = (seen[k].argmax(-1) for k in ("layout", "first", "second"))
        aligned = []
        for i, prompt in enumerate(prompts):
            truth = world.parse(prompt)
            if truth is None:
                aligned.append(float("nan"))
                continue
            kind, place = truth
            aligned.append(float(layout[i] == place and first[i] == kind[0]
                                 and (place == 0 or second[i] == kind[1])))
        return {"realism": (seen["realism"] > 0).float(), "alignment": torch.tensor(aligned),
                "broken": (seen["broken"] > 0).float()}


def load_judge(folder):
    """The trained `Judge` of a model folder (folder/judge/judge.safetensors)."""
    judge = Judge().eval().requires_grad_(False)
    judge.load_state_dict({k: v.float() for k, v in
                           load_file(Path(folder) / "judge" / "judge.safetensors").items()})
    return judge
