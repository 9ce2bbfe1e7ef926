"""A second judge of the miniature, of another kind than its network: two regressions on twelve plain statistics of a
picture (evaluation/metrics/frechet.py), fitted to drawn pictures whose look is known.

    python -m evaluation.metrics.look --model miniature        fits it again, and writes judge/look.safetensors

u is the look, from 0 (CG render) to 1 (photo), by least squares. A picture counts as a photo by logistic regression of
whether u > 0.75, the world's own range of photos.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from engine.command_line import Parser
from engine.errors import UserError, frame
from engine.files import write_whole
from engine.model.tensors import are_finite
from evaluation.metrics.frechet import plain_statistics, truth
from rewards.base import Column
from rewards.pictures import pixels

COLUMNS = {"look": Column("look u", ".3f"), "realism_2": Column("realism, second judge", ".1%")}
WHERE = "model"
FILE = "judge/look.safetensors"
DRAWN = 8192         # pictures, of every look
SEED = 40_000_000    # of these pictures, which nothing else uses
RIDGE = 1.0          # added to the diagonal of the normal equations
NEWTON = 25          # steps of the logistic regression


def features(x, mean, std):
    """1, the standardised statistics and their products: statistics x [B, 12] -> [B, 91] float64."""
    z = ((x - mean) / std).double()
    i, j = torch.triu_indices(z.shape[1], z.shape[1])
    return torch.cat([torch.ones(len(z), 1), z, z[:, i] * z[:, j]], 1)


def fit(model):
    """Fit both regressions to drawn pictures, and write them into a model's folder."""
    world = truth()
    images, scenes = world.draw(world.sample_labelled, DRAWN, SEED, True)
    x = torch.cat([plain_statistics(part) for part in images.split(256)])
    u = scenes.look[:, world.PHOTO].double()
    mean = x.mean(0)
    std = x.std(0)
    F = features(x, mean, std)
    ridge = RIDGE * torch.eye(F.shape[1], dtype=torch.float64)
    linear = torch.linalg.solve(F.T @ F + ridge, F.T @ u)
    is_photo = (u > world.PHOTO_U).double()
    logistic = torch.zeros_like(linear)
    for _ in range(NEWTON):
        p = torch.sigmoid(F @ logistic)
        gradient = F.T @ (p - is_photo) + RIDGE * logistic
        curvature = F.T @ (F * (p * (1 - p))[:, None]) + ridge
        logistic = logistic - torch.linalg.solve(curvature, gradient)
    found = {"mean": mean, "std": std, "linear": linear, "logistic": logistic}
    write_whole(Path(model) / FILE, save(found))


class Look:
    """The two regressions, for pictures as tensors."""

    def __init__(self, fitted):
        """fitted: {"mean", "std" [12], "linear", "logistic" [91]}."""
        self.fitted = fitted

    def verdicts(self, images):
        """Pictures [B, 3, H, W] in [0, 1] -> {"look": u [B] in [0, 1], "realism_2": [B], 1 for a photo, 0 for none}."""
        F = features(plain_statistics(images), self.fitted["mean"], self.fitted["std"])
        return {"look": (F @ self.fitted["linear"]).clamp(0, 1).float(),
                "realism_2": (F @ self.fitted["logistic"] > 0).float()}


def load_look(model):
    """The `Look` of a model's folder. Raises UserError if there is none."""
    return load(fetch(model), None, None).look


def fetch(where=None):
    """The file of the regressions in `where`, a model's folder. Raises UserError if there is none."""
    file = Path(where) / FILE
    if not file.is_file():
        raise UserError(f"there is none in {where}; only the miniature has one")
    return file


def load(file, args, device):
    """The `Scorer` of the file of the regressions. Raises UserError if they are not finite."""
    found = load_file(file)
    if not are_finite(found.values()):
        raise UserError(f"{file}: holds numbers that are not finite")
    return Scorer(Look(found))


class Scorer:
    """A `Look` for PIL pictures."""

    def __init__(self, look):
        self.look = look

    def __call__(self, pictures, prompts):
        """B PIL pictures, each of its own size, and B prompts -> {column: [B]}."""
        each = [self.look.verdicts(pixels(picture)[None]) for picture in pictures]
        return {column: torch.cat([verdict[column] for verdict in each]) for column in COLUMNS}


def main(argv=None):
    with frame("look"):
        parser = Parser(__doc__)
        parser.add_argument("--model", default="miniature", help="the miniature's folder")
        fit(parser.parse_args(argv).model)


if __name__ == "__main__":
    main()
