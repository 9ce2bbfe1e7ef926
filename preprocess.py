"""A picture as a scorer sees it, in two ways that agree: on tensors with a gradient, for training, and on
8-bit PIL pictures exactly as the scorers' authors do it, for evaluation.

`fit` says what becomes of a picture that is not square: "crop" (short side to size, centre crop: open_clip,
ImageReward), "letterbox" (long side to size, black borders: HPSv2's evaluator), "stretch" (both sides to
size: SigLIP).
"""

import hashlib
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

BICUBIC = TF.InterpolationMode.BICUBIC


def fitted(image, size, fit, antialias=True):
    """A PIL picture, or a tensor [..., H, W], at size x size pixels by bicubic resizing. Of a tensor this has
    a gradient; without antialias it is not what PIL does. A side never falls below one pixel."""
    height, width = TF.get_size(image)
    if fit == "stretch":
        return TF.resize(image, [size, size], BICUBIC, antialias=antialias)
    if fit == "crop":
        return TF.center_crop(TF.resize(image, [size], BICUBIC, antialias=antialias), [size, size])
    scale = size / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    left, top = (size - w) // 2, (size - h) // 2
    return TF.pad(TF.resize(image, [h, w], BICUBIC, antialias=antialias),
                  [left, top, size - w - left, size - h - top])


def differentiable(images, size, mean, std, fit="crop"):
    """images [B, 3, H, W] in [0, 1] -> [B, 3, size, size] normalised by mean and std, with gradient."""
    return TF.normalize(fitted(images, size, fit), mean, std)


def exact(picture, size, mean, std, fit="crop"):
    """A PIL picture (RGB) -> [3, size, size], as the scorers' authors prepare it: resized in 8 bits by PIL,
    then normalised."""
    pixels = TF.to_dtype(TF.to_image(fitted(picture, size, fit)), torch.float32, scale=True)
    return TF.normalize(pixels, mean, std)


def read_picture(path):
    """(the picture of a file as PIL RGB, a digest of its bytes). Grey becomes three equal channels, alpha is
    dropped, as the scorers' authors do. ValueError with one line if it cannot be read."""
    data = b""
    try:
        data = Path(path).read_bytes()
        with Image.open(BytesIO(data)) as picture:
            return picture.convert("RGB"), hashlib.sha256(data).hexdigest()[:16]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = "empty file" if not data else str(error).splitlines()[0].split(" <")[0]
        raise ValueError(f"{path}: cannot be read as a picture: {what}") from error
