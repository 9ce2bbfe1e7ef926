"""How every part of the miniature is trained, and how results are kept in the build's folder."""

import io
import math
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from engine.errors import UserError, one_line
from engine.files import write_whole

SEED = 0
EVERY = 250  # steps between two saves of a stage


def save(path, value):
    """torch.save that never leaves a partial file: after an interruption, the file from before is still there."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [buffer.getbuffer()])


def load(path):
    """The dict that `save` wrote. Raises UserError for another file."""
    try:
        return torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # an unpickler may raise anything for a damaged file
        raise UserError(f"{path}: not what a stage of the build writes ({one_line(error)}); delete it") from error


class Workshop(NamedTuple):
    """A build: the folder of its results, and how much work it does."""
    folder: Path
    share: float = 1.0  # of the real build's steps and pictures; less makes a toy

    def amount(self, n):
        """How many of n steps or batches this build does; at least one."""
        return max(1, round(n * self.share))

    def kept(self, name, make, *arguments):
        """The dict of tensors from make(*arguments). It is made once and kept in the folder."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            save(path, make(*arguments))
        return load(path)

    def fit(self, name, modules, loss_of, steps, lr, every=EVERY):
        """Train `modules` {name: module} on loss_of(step) with AdamW and a cosine schedule. In the end the modules hold
        the running average of their weights.

        The state is saved every `every` steps, and a build that was stopped resumes from it. Everything random in a
        step follows from the step's number, so a resumed build ends with the same weights.
        """
        path = self.folder / f"{name}.pt"
        steps = self.amount(steps)
        parameters = []
        ema = {}
        for key, module in modules.items():
            parameters += [p for p in module.parameters() if p.requires_grad]
            ema[key] = {n: tensor.detach().clone() for n, tensor in module.state_dict().items()}
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
        start = 0
        if path.exists():
            state = load(path)
            start = state["step"]
            ema = state["ema"]
            optimizer.load_state_dict(state["optimizer"])
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])

        bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(lr, step, steps)
            torch.manual_seed(SEED * 1_000_003 + step)
            loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            update_average(ema, modules, step)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if (step + 1) % every == 0 or step + 1 == steps:
                weights = {key: module.state_dict() for key, module in modules.items()}
                save(path, {"step": step + 1, "modules": weights, "ema": ema,
                            "optimizer": optimizer.state_dict()})

        for key, module in modules.items():
            module.load_state_dict(ema[key])
            module.eval()


def learning_rate(lr, step, steps):
    """The learning rate of a step: 100 steps of warm-up, and a cosine from lr down to lr / 50."""
    warm_up = min(1, (step + 1) / 100)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return lr * warm_up * (0.02 + 0.98 * cosine)


@torch.no_grad()
def update_average(ema, modules, step):
    """Move the running averages `ema` {module: {name: tensor}} towards the weights after a step."""
    decay = min(0.998, (step + 1) / (step + 10))
    for key, module in modules.items():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                ema[key][name].lerp_(tensor, 1 - decay)
            else:
                ema[key][name].copy_(tensor)
