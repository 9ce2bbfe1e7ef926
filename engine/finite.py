"""No NaN and no infinity reaches the weights, a checkpoint or a picture: where it comes from is said
instead."""

import sys
from typing import NamedTuple

from engine import checkpoint
from engine.errors import printable


class NotFinite(NamedTuple):
    """What was not finite, and the prompt that it belongs to, or None where it belongs to no single one."""
    what: str
    prompt: str


def first_not_finite(prompts, **tensors):
    """The `NotFinite` of the first of the tensors [B, ...] with a NaN or an infinity in it, and of the first
    of its B prompts that has one; None if all are finite."""
    for what, tensor in tensors.items():
        bad = ~tensor.detach().isfinite().reshape(len(tensor), -1).all(1)
        if bad.any():
            return NotFinite(what, prompts[int(bad.nonzero()[0])])
    return None


def stop_if_not_finite(world, trouble, step, transformer, folder, dtype):
    """Leave with exit status 1 if any process met a `NotFinite`, before it reaches the weights: those of the
    step before are exported to `folder`."""
    found = [theirs for theirs in world.gather(trouble) if theirs is not None]
    if not found:
        return
    if world.main:
        print(f"\ntrain.py: step {step}, prompt {printable(found[0].prompt)!r}: {found[0].what} is not "
              f"finite; the weights of step {step - 1} are kept. Try a smaller --lr, or another --seed.",
              file=sys.stderr)
    checkpoint.export(transformer, folder, world, dtype)
    sys.exit(1)
