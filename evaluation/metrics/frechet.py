"""How far a set of pictures is from true photos of the same prompts: the Frechet distance over twelve statistics.

The statistics are plain functions of the pixels, so no trained network takes part. The distance belongs to a set of
pictures, not to a single one. It exists only for the miniature, the small model of a drawn world, because only there
true photos can be drawn.
"""

import importlib
from functools import cache

import torch
import torch.nn.functional as F

from engine.errors import UserError
from evaluation.metrics import statistics
from rewards.base import Column
from rewards.pictures import pixel_statistics, pixels

PLAIN = ("brightness", "contrast", "darkest", "lightest", "saturation", "colourfulness", "redness",
         "blueness", "texture", "coarse texture", "streaks", "vignette")
COLUMNS = {f"frechet: {name}": Column(name, "+.3f") for name in PLAIN}  # of each picture; kept, not shown
SET_COLUMNS = {"frechet": Column("Frechet", ".1f")}
PHOTOS = 4  # true photos of each prompt
SEED = 50_000_000
RESAMPLED = 200  # bootstrap samples for the standard error
FEWEST = 24  # pictures; with fewer, the covariance of twelve statistics is unreliable


SMALLEST = 4  # pixels of a side, below which some of the statistics do not exist


def truth():
    """The module miniature.world. It is imported only when it is needed, so not for other models."""
    return importlib.import_module("miniature.world")


def plain_statistics(images):
    """The twelve numbers of PLAIN, [B, 12], of B pictures [B, 3, H, W] in [0, 1].

    brightness, contrast, darkest, lightest  mean, standard deviation, and 2nd and 98th percentile of the luma
    saturation, colourfulness                mean and standard deviation of the HSV saturation
    redness, blueness                        mean of R - (G + B) / 2, and of B - (R + G) / 2
    texture, coarse texture                  mean distance of the luma from its 3 x 3 mean, at full and half size
    streaks                                  mean vertical change of the luma minus its mean horizontal change
    vignette                                 mean luma of the inner quarter minus that of the whole

    Raises UserError for pictures of fewer than SMALLEST pixels a side.
    """
    if min(images.shape[-2:]) < SMALLEST:
        raise UserError(f"it needs {SMALLEST} pixels a side, and a picture has {images.shape[-1]} x {images.shape[-2]}")
    world = truth()
    luma = world.luma(images)  # [B, H, W]
    high = images.max(1).values
    saturation = (high - images.min(1).values) / high.clamp(min=1e-6)
    r, g, b = images.unbind(1)
    h, w = luma.shape[1:]
    inner = luma[:, h // 4:h - h // 4, w // 4:w - w // 4]
    ends = torch.quantile(luma.flatten(1), torch.tensor([0.02, 0.98]), dim=1)  # [2, B]
    half = F.avg_pool2d(images, 2)
    downwards = luma.diff(dim=1).abs().mean((1, 2))
    sideways = luma.diff(dim=2).abs().mean((1, 2))
    return torch.stack([
        luma.mean((1, 2)), luma.std((1, 2)), ends[0], ends[1],
        saturation.mean((1, 2)), saturation.std((1, 2)),
        pixel_statistics(images)["redness"], (b - (r + g) / 2).mean((1, 2)),
        pixel_statistics(images)["texture"], pixel_statistics(half)["texture"],
        downwards - sideways, inner.mean((1, 2)) - luma.mean((1, 2))], 1)


@cache
def photo_statistics(prompts):
    """`plain_statistics` of PHOTOS true photos for each of the prompts (a tuple), drawn from one seed: [n, 12]."""
    world = truth()
    scenes = [world.parse(prompt) for prompt in prompts for _ in range(PHOTOS)]
    kind = torch.tensor([kind for kind, _ in scenes])
    layout = torch.tensor([layout for _, layout in scenes])
    images, _ = world.draw(world.scenes_of, len(scenes), SEED, kind, layout, "realistic photo")
    return torch.cat([plain_statistics(part) for part in images.split(256)])


def gaussian(x):
    """The mean [..., 12] and the covariance [..., 12, 12] of statistics x [..., n, 12]."""
    mean = x.mean(-2)
    apart = x - mean[..., None, :]
    return mean, apart.mT @ apart / (x.shape[-2] - 1)


def distance(x, y):
    """The Frechet distance [...] between the Gaussians fitted to x [..., n, 12] and to y [m, 12], both float64:
    |mean - mean'|^2 + trace(S + S' - 2 (S^1/2 S' S^1/2)^1/2), with the covariances S and S'."""
    mean, covariance = gaussian(x)
    their_mean, their_covariance = gaussian(y)
    values, vectors = torch.linalg.eigh(their_covariance)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.mT
    between = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum(-1)
    traces = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + their_covariance.trace()
    return (mean - their_mean).square().sum(-1) + traces - 2 * between


def of_set(values, prompts):
    """The distance of P pictures from true photos of their P prompts: {"frechet": {"mean", "se", "n"}}. The value is
    None if fewer than FEWEST pictures have finite scores and a prompt of the miniature's world.

    values: {column of COLUMNS: [P]}. Each statistic is divided by its standard deviation among the photos. So a shift
    of one statistic by d standard deviations gives a distance of d^2. se: the standard deviation over bootstrap
    samples of the pictures.
    """
    x = torch.stack([values[column].double() for column in COLUMNS], 1)  # [P, 12]
    known = torch.tensor([truth().parse(prompt) is not None for prompt in prompts], dtype=torch.bool)
    known &= x.isfinite().all(1)
    if known.sum() < FEWEST:
        return {"frechet": None}
    x = x[known]
    asked = tuple(prompt for prompt, is_known in zip(prompts, known.tolist(), strict=True) if is_known)
    photos = photo_statistics(asked).double()
    x = x / photos.std(0)
    photos = photos / photos.std(0)
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randint(len(x), (RESAMPLED, len(x)), generator=generator)
    return {"frechet": {"mean": distance(x, photos).item(), "se": distance(x[rows], photos).std().item(),
                        "n": len(x)}}


def of_pictures(images, prompts):
    """`of_set` of P pictures [P, 3, H, W] in [0, 1] and their P prompts."""
    return of_set(dict(zip(COLUMNS, plain_statistics(images).unbind(1), strict=True)), prompts)


fetch = statistics.fetch  # this metric has no files either


def load(files, args, device):
    return score


def score(pictures, prompts):
    """B PIL pictures, each of its own size -> {column: [B]}."""
    each = torch.cat([plain_statistics(pixels(picture)[None]) for picture in pictures])
    return dict(zip(COLUMNS, each.unbind(1), strict=True))
