"""The miniature's judge as a metric. It lies in a model's folder, and only the miniature has one."""

import importlib
from pathlib import Path

import torch

from engine.errors import UserError, one_line
from rewards.base import Column
from rewards.pictures import pixels

COLUMNS = {"realism": Column("realism", ".1%"),
           "painting": Column("painting", ".1%"),
           "alignment": Column("alignment", ".1%"),
           "broken": Column("broken", ".1%")}
UNDEFINED = ("alignment",)  # which a prompt outside the miniature's world does not have


def load_judge(model, side=None):
    """The `miniature.judge.Judge` that lies in a model's folder, or None. Raises UserError if it cannot be read, or
    does not see pictures of side x side pixels. Nothing of the miniature is imported for a model without a judge."""
    if not (Path(model) / "judge").is_dir():
        return None
    try:
        judge = importlib.import_module("miniature.judge").load_judge(model)
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
    """The judge, on the CPU, for PIL pictures."""

    def __init__(self, network):
        self.network = network

    def __call__(self, pictures, prompts):
        """B PIL pictures and B prompts -> {column: [B]}, 1 for yes, 0 for no. Raises UserError for a picture
        that is not of the miniature's size."""
        for picture in pictures:
            if picture.size != (self.network.size, self.network.size):
                raise UserError(f"it sees {self.network.size} x {self.network.size} pixels, "
                                f"not {picture.width} x {picture.height}")
        return self.network.verdicts(torch.stack([pixels(picture) for picture in pictures]), prompts)
