"""A NaN or an infinity stops a run before it reaches the weights, a checkpoint or a picture. The message says where it
comes from."""

from typing import NamedTuple

from engine.errors import NotFinite
from engine.model import lora
from engine.model.tensors import are_finite
from engine.run import checkpoint


class Trouble(NamedTuple):
    """What was not finite, such as "reward"; and whose it was: one prompt's, or that of all prompts."""
    what: str
    whose: str


def first_not_finite(prompts, **tensors):
    """The `Trouble` of the first tensor [B, ...] that holds a NaN or an infinity; it names the first of the B prompts
    whose row holds one. None if all are finite."""
    for what, tensor in tensors.items():
        bad = ~tensor.detach().isfinite().reshape(len(tensor), -1).all(1)
        if bad.any():
            return Trouble(what, f"prompt {prompts[int(bad.nonzero()[0])]!r}")
    return None


def weights_are_finite(parameters, world=None):
    """Whether every number of the parameters is finite, on all processes if a `parallel.World` is given."""
    mine = are_finite(parameters)
    return mine if world is None else all(world.gather(mine))


def trouble_in(term):
    """The `Trouble` of a loss `Term`; None if it is finite."""
    looked_at = {"x_t": term.x_t, "v_theta": term.v_theta, "image": term.image, "reward": term.reward}
    there = {what: tensor for what, tensor in looked_at.items() if tensor is not None}
    return first_not_finite(term.prompts, **there)


def stop_before_the_step(trouble, norm, step, run):
    """Raise NotFinite if any process has a `Trouble`, or the gradient's norm is not finite. The optimizer has not
    stepped yet, so the weights of the step before are exported to the run's folder, if it has one."""
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
    """Raise NotFinite if the optimizer's step made a weight that is not finite. Nothing is written then."""
    if weights_are_finite(parameters, run.world):
        return
    text = f"step {step}: the update made weights that are not finite"
    if run.folder is not None:
        done = checkpoint.checkpoints(run.folder.out, run.folder.id)
        text += f"; {done[-1]} stays" if done else "; there is no checkpoint before it"
    raise NotFinite(f"{text}; try a smaller --lr")
