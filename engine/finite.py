"""No NaN and no infinity reaches the weights, a checkpoint or a picture: where it comes from is said
instead."""

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from engine import checkpoint, lora
from engine.errors import NotFinite


class Trouble(NamedTuple):
    """What was not finite, and whose: a prompt's, or several prompts'."""
    what: str
    whose: str


def first_not_finite(prompts, **tensors):
    """The `Trouble` of the first of the tensors [B, ...] with a NaN or an infinity in it, and of the first of
    its B prompts that has one; None if all are finite."""
    for what, tensor in tensors.items():
        bad = ~tensor.detach().isfinite().reshape(len(tensor), -1).all(1)
        if bad.any():
            return Trouble(what, f"prompt {prompts[int(bad.nonzero()[0])]!r}")
    return None


def are_finite(tensors):
    """Whether every number of some tensors is finite, of this process's part of them."""
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.dtype.itemsize == 1:
            local = local.to(torch.bfloat16)  # torch cannot ask a float8
        if not local.detach().isfinite().all():
            return False
    return True


def weights_are_finite(parameters, world=None):
    """Whether every number of the parameters is finite, on all processes of a world."""
    mine = are_finite(parameters)
    return mine if world is None else all(world.gather(mine))


def stop_before_the_step(trouble, step, world, transformer, folder, dtype):
    """Raise NotFinite if any process met a `Trouble`, before it reaches the weights: those of the step before
    are exported to `folder`."""
    found = [theirs for theirs in world.gather(trouble) if theirs is not None]
    if not found:
        return
    lora.export(transformer, folder, world, dtype)
    if step == 1:
        cause = "nothing is trained yet, so look at the flags and the reward"
    else:
        cause = "try a smaller --lr, or another --seed"
    raise NotFinite(f"step {step}, {found[0].whose}: {found[0].what} is not finite; the weights of step "
                    f"{step - 1} are kept, in {folder}; {cause}")


def stop_after_the_step(parameters, step, out, run, world):
    """Raise NotFinite if the step made a weight that is not finite: nothing is written any more."""
    if weights_are_finite(parameters, world):
        return
    done = checkpoint.checkpoints(out, run)
    stays = f"{done[-1]} stays" if done else "there is no checkpoint before it"
    raise NotFinite(f"step {step}: the update made weights that are not finite; {stays}; try a smaller --lr")
