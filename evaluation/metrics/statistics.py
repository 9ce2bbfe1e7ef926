"""Plain statistics of a picture's pixels, without a network and without the prompt."""

import torch

from engine.errors import UserError
from rewards.base import Column
from rewards.pictures import pixel_statistics, pixels

STATISTICS = ("saturation", "redness", "brightness", "texture")
COLUMNS = {name: Column(name, "+.4f" if name == "texture" else "+.3f") for name in STATISTICS}


def fetch(where=None):
    """None, because this metric has no files. Raises UserError if a path is given."""
    if where is not None:
        raise UserError(f"it has no files, so {where} would not be read; leave out =PATH")
    return None


def load(files, args, device):
    return score


def score(pictures, prompts):
    """B PIL pictures, each of its own size -> {statistic: [B]}."""
    each = [pixel_statistics(pixels(picture)[None]) for picture in pictures]
    return {name: torch.cat([told[name] for told in each]) for name in STATISTICS}
