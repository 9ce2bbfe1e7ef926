"""A picture as a scorer sees it, in two ways that agree: on tensors with a gradient, for training, and on
8-bit PIL pictures exactly as the scorers' authors do it, for evaluation.

`fit` says what becomes of a picture that is not square: "crop" (short side to size, centre crop: open_clip,
ImageReward), "crop-floor" (the same, but half a pixel is rounded down: transformers' CLIP), "letterbox" (long
side to size, black borders: HPSv2's evaluator), "stretch" (both sides to size: SigLIP).
"""

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from engine.errors import UserError, one_line

BICUBIC = TF.InterpolationMode.BICUBIC


def fitted(image, size, fit, antialias=True):
    """A PIL picture, or a tensor [..., H, W], at size x size pixels by bicubic resizing. Of a tensor this has
    a gradient; without antialias it is not what PIL does. A side never falls below one pixel."""
    if fit == "stretch":
        return TF.resize(image, [size, size], BICUBIC, antialias=antialias)

    if fit == "letterbox":
        height, width = TF.get_size(image)
        scale = size / max(height, width)
        h = max(1, round(height * scale))
        w = max(1, round(width * scale))
        top = (size - h) // 2
        left = (size - w) // 2
        image = TF.resize(image, [h, w], BICUBIC, antialias=antialias)
        return TF.pad(image, [left, top, size - w - left, size - h - top])

    if fit not in ("crop", "crop-floor"):
        raise ValueError(f"{fit}: not a way to fit a picture")
    image = TF.resize(image, [size], BICUBIC, antialias=antialias)    # the short side
    height, width = TF.get_size(image)
    whole = int if fit == "crop-floor" else round
    top = whole((height - size) / 2)
    left = whole((width - size) / 2)
    return TF.crop(image, top, left, size, size)


def differentiable(images, size, mean, std, fit="crop"):
    """images [B, 3, H, W] in [0, 1] -> [B, 3, size, size] normalised by mean and std, with gradient."""
    return TF.normalize(fitted(images, size, fit), mean, std)


def exact(picture, size, mean, std, fit="crop"):
    """A PIL picture (RGB) -> [3, size, size], as the scorers' authors prepare it: resized in 8 bits by PIL,
    then normalised."""
    return TF.normalize(pixels(fitted(picture, size, fit)), mean, std)


def pixels(picture):
    """A PIL picture -> [3, H, W] in [0, 1]."""
    return TF.to_dtype(TF.to_image(picture), torch.float32, scale=True)


def read_picture(path):
    """The picture of a file as PIL RGB: grey becomes three equal channels, alpha is dropped, as the scorers'
    authors do. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = one_line(error).split(" '")[0]    # PIL names the file once more, in quotes
        raise UserError(f"{path}: cannot be read as a picture: {why}") from error
