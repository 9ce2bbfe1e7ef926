"""Run by test_recipe.py, alone or under torchrun: `update_worker.py OUT FLAG ...`. One update of train.py with these
flags; rank 0 writes its gradient, before it is clipped, in full, and what the log tells of it."""

import json
import sys

import torch
from safetensors.torch import save_file

import command
import prepare
import train
from engine.memory import parallel
from engine.model import tensors

out = sys.argv[1]
a, model = command.read([*sys.argv[2:], "--clip", "1e6"])
world = parallel.World()
prepare.settle(a, model, world)
run = prepare.set_up(a, model, world)
gradient = {}


def keep():
    """In place of a step of AdamW."""
    for name, parameter in run.net.transformer.named_parameters():
        gradient[name] = tensors.full(parameter.grad).clone()


run.optimizer.step = keep
told = train.update(a, run, 1)
if world.main:
    save_file(gradient | {"images": torch.tensor([run.share.images])}, out, {"told": json.dumps(told)})
world.close()
