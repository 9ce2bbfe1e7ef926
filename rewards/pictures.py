"""A picture as a scorer sees it, in two ways that agree: on tensors with a gradient, for training, and on
8-bit PIL pictures exactly as the scorers' authors do it, for evaluation.

`fit` says what becomes of a picture that is not square: "crop" (short side to size, centre crop: open_clip,
ImageReward), "crop-floor" (the same, but half a pixel is rounded down: transformers' CLIP), "letterbox" (long
side to size, black borders: HPSv2's evaluator), "stretch" (both sides to size: SigLIP).
"""

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

BICUBIC = TF.InterpolationMode.BICUBIC


def fitted(image, size, fit, antialias=True):
    """A PIL picture, or a tensor [..., H, W], at size x size pixels by bicubic resizing. Of a tensor this has
    a gradient; without antialias it is not what PIL does. A side never falls below one pixel."""
    height, width = TF.get_size(image)
    if fit == "stretch":
        return TF.resize(image, [size, size], BICUBIC, antialias=antialias)
    if fit.startswith("crop"):
        image = TF.resize(image, [size], BICUBIC, antialias=antialias)
        h, w = TF.get_size(image)
        top, left = (h - size) / 2, (w - size) / 2
        whole = int if fit == "crop-floor" else round
        return TF.crop(image, whole(top), whole(left), size, size)
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
    return TF.normalize(pixels(fitted(picture, size, fit)), mean, std)


def pixels(picture):
    """A PIL picture -> [3, H, W] in [0, 1]."""
    return TF.to_dtype(TF.to_image(picture), torch.float32, scale=True)


def read_picture(path):
    """The picture of a file as PIL RGB: grey becomes three equal channels, alpha is dropped, as the scorers'
    authors do. Raises ValueError, one line, if it cannot be read."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = str(error).splitlines()[0].split(" '")[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read as a picture: {why}") from error


def save_grid(images, path, columns=8):
    """Write pictures [P, 3, H, W] as one PNG; small ones enlarged to 128 pixels, so that they can be seen."""
    scale = max(1, 128 // images.shape[-1])
    save_image(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), path, nrow=columns)
