"""Where a run's numbers and pictures also go, if the user asks: TensorBoard's files (--tensorboard), Weights & Biases
(--wandb). Both packages are optional."""

import os

import numpy as np

from engine.data.pictures import read_picture
from engine.errors import UserError

GROUPS = {"watch": "watched pictures", "drift": "drift of watched pictures"}
SPEED = ("seconds_", "images_per_", "tflop_", "share_of_peak", "peak_gib")


def telling(line):
    """{"group/name": number} of a line of the log, as boards show it: "watched pictures/sgp", "training/grad_norm",
    "speed/images_per_second"."""
    found = {}
    for name, value in line.items():
        if name in GROUPS:
            found |= {f"{GROUPS[name]}/{inner}": number for inner, number in value.items()}
        elif name == "hacking":
            found["watched pictures/drift warnings"] = len(value)
        elif name != "step":
            found[f"{'speed' if name.startswith(SPEED) else 'training'}/{name}"] = value
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


class TensorBoard:
    """TensorBoard's files, in a run's folder. Raises UserError if the package is not installed."""

    def __init__(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--tensorboard: the package is not installed; pip install tensorboard") from error
        self.writer = SummaryWriter

    def begin(self, out, run, args):
        self.writer = self.writer(out / "tensorboard")

    def numbers(self, step, line):
        for name, value in telling(line).items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step, name, path):
        self.writer.add_image(name, np.asarray(read_picture(path)), step, dataformats="HWC")


class WeightsAndBiases:
    """A run on Weights & Biases, with the id of the run, so that --resume continues it. Raises UserError if the package
    is not installed, or nobody is logged in: it would ask while others wait."""

    def __init__(self):
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb: the package is not installed; pip install wandb") from error
        if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.api.api_key:
            raise UserError("--wandb: not logged in; wandb login, or set WANDB_MODE=offline")
        self.wandb = wandb
        self.run = None

    def begin(self, out, run, args):
        self.run = self.wandb.init(project="SRPO", name=out.resolve().name, id=run, dir=out, config=args,
                                   resume="allow")

    def numbers(self, step, line):
        self.run.log(telling(line), step=step)

    def picture(self, step, name, path):
        self.run.log({name: self.wandb.Image(str(path))}, step=step)


def asked(args):
    """The boards that the flags, a dict, ask for. Nothing is written before `begin`. Raises UserError."""
    boards = []
    if args.get("tensorboard"):
        boards.append(TensorBoard())
    if args.get("wandb"):
        boards.append(WeightsAndBiases())
    return boards
