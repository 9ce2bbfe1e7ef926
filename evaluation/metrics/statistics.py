"""Plain statistics of a picture's pixels, without a network and without the prompt."""

import torch
import torch.nn.functional as F

from engine.errors import UserError
from rewards.base import Column
from rewards.pictures import pixels

STATISTICS = ("saturation", "redness", "brightness", "texture")
COLUMNS = {name: Column(name, "+.3f") for name in STATISTICS}


def pixel_statistics(images):
    """Statistics of B pictures [B, 3, H, W] in [0, 1]: {name: [B]}.

    saturation  mean HSV saturation, [0, 1]
    redness     mean of R - (G + B) / 2, [-1, 1]; a reward that likes red raises it
    brightness  mean luma (Rec. 601), [0, 1]
    texture     mean distance of the luma from its 3 x 3 mean, [0, 1]; grain and detail raise it, smoothing lowers it
    """
    high = images.max(1).values
    low = images.min(1).values
    r, g, b = images.unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    smooth = F.avg_pool2d(F.pad(luma[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]
    return {"saturation": ((high - low) / high.clamp(min=1e-6)).mean((1, 2)),
            "redness": (r - (g + b) / 2).mean((1, 2)),
            "brightness": luma.mean((1, 2)),
            "texture": (luma - smooth).abs().mean((1, 2))}


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
