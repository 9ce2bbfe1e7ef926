"""The miniature's judge as a metric. It lies in the model's folder judge/, and only the miniature has one.

The miniature is the small model of a drawn world (miniature/README.md). broken: the picture has melted or damaged
parts.
"""

import importlib
from pathlib import Path

import torch

from engine.errors import UserError, one_line
from engine.model.tensors import are_finite
from rewards.base import Column
from rewards.pictures import pixels

COLUMNS = {"realism": Column("realism", ".1%"),
           "painting": Column("painting", ".1%"),
           "alignment": Column("alignment", ".1%"),
           "broken": Column("broken", ".1%")}
UNDEFINED = ("alignment",)  # NaN for a prompt outside the miniature's world


def load_judge(model, side=None):
    """The `miniature.judge.Judge` in a model's folder; None if there is none. Raises UserError if it cannot be read, or
    if it does not take pictures of side x side pixels. For a model without a judge, nothing of the miniature is
    imported."""
    if not (Path(model) / "judge").is_dir():
        return None
    try:
        judge = importlib.import_module("miniature.judge").load_judge(model)
        if not are_finite(judge.state_dict().values()):
            raise UserError("it holds numbers that are not finite")
    except Exception as error:
        raise UserError(f"{model}/judge: not the miniature's judge: {one_line(error)}") from error
    if side not in (None, judge.size):
        raise UserError(f"--size {side}: the judge in {model} sees {judge.size} x {judge.size} pixels; "
                        "without that folder any size can be watched")
    return judge


WHERE = "model"


def fetch(where=None):
    """The folder judge/ of `where`, a model's folder. Raises UserError if there is none."""
    model = Path(where)
    if not (model / "judge").is_dir():
        raise UserError(f"there is none in {model}; only the miniature has one")
    return model / "judge"


def load(folder, args, device):
    return Scorer(load_judge(folder.parent))


class Scorer:
    """The judge as a scorer of PIL pictures, on the CPU."""

    def __init__(self, network):
        self.network = network

    def __call__(self, pictures, prompts):
        """B PIL pictures and B prompts -> {column: [B]}, 1 for yes, 0 for no. Raises UserError for a picture of another
        size than the miniature's."""
        for picture in pictures:
            if picture.size != (self.network.size, self.network.size):
                side = self.network.size
                raise UserError(f"it takes pictures of {side} x {side} pixels only, and one has "
                                f"{picture.width} x {picture.height}; it can be left out of --metrics")
        return self.network.verdicts(torch.stack([pixels(picture) for picture in pictures]), prompts)
