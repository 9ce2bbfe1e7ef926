"""No NaN and no infinity reaches the weights, a checkpoint or a picture: where it comes from is said
instead."""

from typing import NamedTuple

from engine.errors import NotFinite
from engine.model import lora
from engine.model.tensors import are_finite
from engine.run import checkpoint


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


def weights_are_finite(parameters, world=None):
    """Whether every number of the parameters is finite, on all processes of a world."""
    mine = are_finite(parameters)
    return mine if world is None else all(world.gather(mine))


def trouble_in(term):
    """The `Trouble` of a loss term, None if all of it is finite."""
    looked_at = {"x_t": term.x_t, "v_theta": term.v_theta, "image": term.image, "reward": term.reward}
    there = {what: tensor for what, tensor in looked_at.items() if tensor is not None}
    return first_not_finite(term.prompts, **there)


def stop_before_the_step(trouble, norm, step, run):
    """Raise NotFinite if any process met a `Trouble`, or the gradient's norm is not finite, before it reaches the
    weights: those of the step before are exported to the run's folder, if it has one."""
    if trouble is None and not norm.isfinite():
        trouble = Trouble("the gradient", "all its prompts together")
    found = [theirs for theirs in run.world.gather(trouble) if theirs is not None]
    if not found:
        return
    text = f"step {step}, {found[0].whose}: {found[0].what} is not finite"
    if run.folder is not None:
        folder = run.folder.out / "weights"
        lora.export(run.net.transformer, folder, run.world, run.net.dtype)
        text += f"; the weights of step {step - 1} are kept, in {folder}"
    if step == 1:
        raise NotFinite(f"{text}; nothing is trained yet, so look at the flags and the reward")
    raise NotFinite(f"{text}; try a smaller --lr, or another --seed")


def stop_after_the_step(parameters, step, run):
    """Raise NotFinite if the step made a weight that is not finite: nothing is written any more."""
    if weights_are_finite(parameters, run.world):
        return
    text = f"step {step}: the update made weights that are not finite"
    if run.folder is not None:
        done = checkpoint.checkpoints(run.folder.out, run.folder.id)
        text += f"; {done[-1]} stays" if done else "; there is no checkpoint before it"
    raise NotFinite(f"{text}; try a smaller --lr")
