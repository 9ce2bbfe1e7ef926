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


class Look(NamedTuple):
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


def look_at(prompts, **tensors):
    """The `Look` at tensors [B, ...] of B prompts."""
    bad = [~tensor.detach().isfinite().reshape(len(tensor), -1).all(1) for tensor in tensors.values()]
    return Look(prompts, list(tensors), torch.stack(bad))


def weights_are_finite(parameters, world=None):
    """Whether every number of the parameters is finite, on all processes if a `parallel.World` is given."""
    mine = are_finite(parameters)
    return mine if world is None else all(world.gather(mine))


def look_at_term(term):
    """The `Look` at a loss `Term`."""
    looked_at = {"x_t": term.x_t, "v_theta": term.v_theta, "image": term.image, "reward": term.reward}
    there = {what: tensor for what, tensor in looked_at.items() if tensor is not None}
    return look_at(term.prompts, **there)


def stop_before_the_step(looks, norm, step, run):
    """Returns the gradient's norm, a number. Raises NotFinite if it is not finite, or any `Look` of any process found
    trouble. The optimizer has not stepped yet, so the weights of the step before are exported to the run's folder, if
    it has one."""
    *flags, (norm,) = read([*(look.bad for look in looks), norm])
    found = [look.trouble(its) for look, its in zip(looks, flags, strict=True)]
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
