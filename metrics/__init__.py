"""Scorers that are not rewards: nothing is ever trained on them.

A scorer is made from a path (`fetch` of its file gives it) and is called with B PIL pictures (RGB, any size)
and their B prompts; it gives a dict {column: [B] float32 on the CPU}. imagereward.py, geneval.py and deqa.py
hold one each.
"""

import torch.nn.functional as F

STATISTICS = ("saturation", "redness", "brightness", "texture")


def pixel_statistics(images):
    """Plain numbers of B pictures [B, 3, H, W] in [0, 1]: a dict of [B] tensors.

    saturation  mean HSV saturation, [0, 1]
    redness     mean of R - (G + B) / 2, [-1, 1]: the cast that a reward biased towards red buys
    brightness  mean luma (Rec. 601), [0, 1]
    texture     mean distance of the luma from its 3 x 3 mean, [0, 1]: grain and detail raise it,
                smoothing lowers it
    """
    high, low = images.max(1).values, images.min(1).values
    r, g, b = images.unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    smooth = F.avg_pool2d(F.pad(luma[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]
    return {"saturation": ((high - low) / high.clamp(min=1e-6)).mean((1, 2)),
            "redness": (r - (g + b) / 2).mean((1, 2)),
            "brightness": luma.mean((1, 2)),
            "texture": (luma - smooth).abs().mean((1, 2))}
