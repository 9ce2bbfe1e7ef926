"""A NaN or an infinity stops a run before it reaches the weights, a checkpoint or a picture. The message says where it
comes from."""

import math
from typing import NamedTuple

import torch

from engine.errors import NotFinite
from engine.model import lora
from engine.model.tensors import are_finite, read
from engine.run import checkpoint


class Trouble(NamedTuple):
    """What was not finite, such as "reward"; and whose it was: one prompt's, or that of all prompts."""
    what: str
    whose: str


class Check(NamedTuple):
    """Which rows of K tensors of B prompts hold a NaN or an infinity. It stays on the GPU until it is read."""
    prompts: list
    names: list
    bad: torch.Tensor  # [K, B] bool

    def trouble(self, flags):
        """The `Trouble` of the first tensor that has some, and its first prompt; None if all are finite. flags: the
        K B numbers of `bad`, as `tensors.read` returns them."""
        if not any(flags):
            return None
        row, column = divmod(flags.index(1), len(self.prompts))
        return Trouble(self.names[row], f"prompt {self.prompts[column]!r}")


def check(term):
    """The `Check` of a loss `Term`."""
    tensors = {"x_t": term.x_t, "v_theta": term.v_theta, "image": term.image, "reward": term.reward}
    there = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    bad = [~tensor.isfinite().reshape(len(tensor), -1).all(1) for tensor in there.values()]
    return Check(term.prompts, list(there), torch.stack(bad))


def weights_are_finite(parameters, world=None):
    """Whether every number of the parameters is finite, on all processes if a `parallel.World` is given."""
    mine = are_finite(parameters)
    return mine if world is None else all(world.gather(mine))


def stop_before_the_step(checks, norm, step, run):
    """Returns the gradient's norm, a number. Raises NotFinite if it is not finite, or any `Check` of any process found
    trouble. The optimizer has not stepped yet, so the weights of the step before are exported to the run's folder, if
    it has one."""
    *flags, (norm,) = read([*(each.bad for each in checks), norm])
    found = [each.trouble(its) for each, its in zip(checks, flags, strict=True)]
    trouble = next((one for one in found if one is not None), None)
    if trouble is None and not math.isfinite(norm):
        trouble = Trouble("the gradient", "all its prompts together")
    found = [theirs for theirs in run.world.gather(trouble) if theirs is not None]
    if not found:
        return norm
    text = f"step {step}, {found[0].whose}: {found[0].what} is not finite"
    if run.folder is not None:
        folder = run.folder.out / "weights"
        lora.export(run.net.transformer, folder, run.world, run.net.dtype)
        text += f"; the weights of step {step - 1} are kept, in {folder}"
    if step == 1:
        raise NotFinite(f"{text}; nothing is trained yet, so look at the flags and the reward")
    raise NotFinite(f"{text}; try a smaller --lr, or another --seed")


def stop_after_the_step(parameters, step, run):
    """Raise NotFinite if the optimizer's step made a weight that is not finite. Nothing is written then."""
    if weights_are_finite(parameters, run.world):
        return
    text = f"step {step}: the update made weights that are not finite"
    if run.folder is not None:
        done = checkpoint.checkpoints(run.folder.out, run.folder.id)
        text += f"; {done[-1]} stays" if done else "; there is no checkpoint before it"
    raise NotFinite(f"{text}; try a smaller --lr")
