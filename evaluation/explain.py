"""`train.py --explain`: one step told as it happens, each call with its equation, symbols, shapes and ranges.

The text is not written a second time: it is the functions' own signatures and docstrings, in the order of the
calls.
"""

import inspect
from functools import wraps

import torch

import direct_align as da
import flux
import srpo_reward as sr

_inside = False  # only the outermost call is told: a rollout, not its 25 velocities


def _shown(value):
    """A tensor as shape and range, a list by its first entry, anything else as it is."""
    if torch.is_tensor(value):
        low, high = value.min().item(), value.max().item()
        grad = "  with gradient" if value.requires_grad else ""
        return (f"{str(list(value.shape)):16}"
                + (f"{low:.4g} .. {high:.4g}" if low != high else f"{low:.4g}") + grad)
    if isinstance(value, tuple) and value and all(map(torch.is_tensor, value)):
        return "; ".join(" ".join(_shown(v).split()) for v in value)
    if isinstance(value, (list, tuple)) and len(value) > 3:
        return f"[{value[0]!r}, ...] ({len(value)})"
    if hasattr(value, "__dataclass_fields__"):
        return "; ".join(f"{k} {' '.join(_shown(getattr(value, k)).split())}"
                         for k in value.__dataclass_fields__ if torch.is_tensor(getattr(value, k)))
    return (str(value) if isinstance(value, (int, float, str, list, tuple, type(None)))
            else type(value).__name__)


def told(function):
    """`function`, saying on every outermost call what it is given, which equation it is, and what it
    returns."""
    @wraps(function)
    def wrapper(*args, **kwargs):
        global _inside
        if _inside:
            return function(*args, **kwargs)
        _inside = True
        try:
            result = function(*args, **kwargs)
        finally:
            _inside = False
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        print(f"\n{function.__module__}.{function.__name__}({', '.join(bound)})")
        print("    " + inspect.getdoc(function).split("\n\n")[0].replace("\n", "\n    "))
        for name, value in [*bound.items(), ("->", result)]:
            print(f"      {name:10} {_shown(value)}")
        return result
    return wrapper


def tell_everything(reward):
    """From now on, the functions that one update calls tell what they do."""
    for room, names in ((flux, ("rollout", "velocity", "decode")),
                        (reward, ("image_features", "conditions")),
                        (da, ("training_grid", "place", "inject", "recover", "recover_epsilon", "epsilon",
                              "discount", "lam", "aggregate")),
                        (sr, ("branch_reward", "loss"))):
        for name in names:
            setattr(room, name, told(getattr(room, name)))
