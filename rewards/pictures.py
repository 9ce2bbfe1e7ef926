"""How a picture is prepared for a scorer, in two ways that nearly agree; and statistics of its pixels.

For training, tensors are prepared with a gradient. For evaluation, 8-bit PIL pictures are prepared exactly as the
scorers' authors do. `fit` says how a picture that is not square becomes square:

crop        short side to size, then a centre crop: open_clip, ImageReward
crop-floor  the same, but half a pixel is rounded down: transformers' CLIP
letterbox   long side to size, with black borders: HPSv2's evaluator
stretch     both sides to size: SigLIP
"""

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

BICUBIC = TF.InterpolationMode.BICUBIC


def fitted(image, size, fit, antialias=True):
    """A PIL picture, or a tensor [..., H, W], resized bicubically to size x size pixels. A tensor keeps its gradient.
    PIL always uses antialias; tensors agree with it only if antialias is True. Raises ValueError for an unknown
    `fit`."""
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
    return normalised(fitted(images, size, fit), mean, std)


def normalised(images, mean, std):
    """images [B, 3, H, W] -> (images - mean) / std for each channel.

    TF.normalize would copy mean and std to the GPU in every call, and wait until it knows that std is not 0."""
    channels = zip(images.unbind(1), mean, std, strict=True)
    return torch.stack([(channel - middle) / spread for channel, middle, spread in channels], 1)


def exact(picture, size, mean, std, fit="crop"):
    """A PIL picture (RGB) -> [3, size, size] as the scorers' authors prepare it: PIL resizes it in 8 bits, then it is
    normalised by mean and std."""
    return TF.normalize(pixels(fitted(picture, size, fit)), mean, std)


def pixels(picture):
    """A PIL picture (RGB) -> [3, H, W] float32 in [0, 1]."""
    return TF.to_dtype(TF.to_image(picture), torch.float32, scale=True)


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
