"""Every reward by its name: each is a file of this folder, `hpsv2_1.py` for "hpsv2.1". Nothing else names
them: to add a reward, add its file. A file is imported when its reward is asked for, not before; nor is torch.

A reward's file offers

COLUMNS
    {name: Column(title, format)}, its columns in evaluate.py's table: one to three, in this order. r of the
    bare prompt (Eq. 7) in the metric's own unit; the SGP gap f.(C1 - C2) (Eq. 10); that gap on the authors'
    display scale, 100 (gap + 0.01).
fetch(where=None) -> path
    Where its weights are on this machine: those of `where` (a path or a hub repository), or of the authors'
    place, downloaded if they are not here yet. What loading needs besides, such as a tokenizer, is fetched
    too, so that nothing fails later. Raises UserError if something cannot be had.
load(path, device) -> base.Reward
    The reward of the path that fetch gave. `load_reward` says in one line whatever it raises.
image_network(where=None) -> base.ImageNetwork
    For the plan: its network in float32 without weights, made under whatever mode (meta device, fake tensors)
    the caller is in.
"""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError, one_line
from engine.paths import items_of, leads_somewhere, named_path

LIGHTEST, HEAVIEST = 1e-6, 1e6  # of the weights; beyond them float32 would lose one reward or all
HELPERS = ("base", "pictures", "clip_model")    # the files of this folder that are no reward


# ------------------------------------------------------------------------------------------------- the folder
def files():
    """{name: its module} of the rewards in this folder, by name. "_" between two digits stands for "."."""
    found = {}
    for file in pkgutil.iter_modules(__path__):
        if file.name not in HELPERS:
            name = re.sub(r"(?<=\d)_(?=\d)", ".", file.name)
            found[name] = f"{__name__}.{file.name}"
    return found


def names():
    """The rewards that have a name."""
    return list(files())


def module(name):
    """The module of a reward, imported now: by its name, or clip_model for a path in place of one.

    Raises UserError for what is neither.
    """
    known = files()
    if name in known:
        return importlib.import_module(known[name])
    if Path(name).exists():
        return importlib.import_module(f"{__name__}.clip_model")
    raise UserError(f"{name}: no such file or folder, and not one of {', '.join(known)}")


def place(name, where):
    """Where a reward's weights are to be taken from: a path in place of a name says it itself."""
    if where is None and name not in names():
        return name
    return where


# -------------------------------------------------------------------------------------------------------- one
def fetch(name, where=None):
    """The path of a reward's weights on this machine, downloaded if they are not here yet: of `where` (a path
    or a hub repository), or of the authors' place. Raises UserError if they cannot be had."""
    reward = module(name)
    try:
        return reward.fetch(place(name, where))
    except UserError as error:
        raise UserError(f"{name}: {error}; give {name}=PATH") from error


def load_reward(name, device="cpu", where=None, **options):
    """One reward by its name, its weights from `where` (None: the authors' place); or a path in place of the
    name, for open_clip weights. options go to its file's `load`: arch for open_clip weights in a .pt.

    Raises UserError when the weights cannot be had or are not such a reward.
    """
    path = fetch(name, where)
    try:
        reward = module(name).load(path, device, **options)
    except Exception as error:
        raise UserError(f"{name}: not a reward model, in {path}: {one_line(error)}") from error
    if not reward.is_finite():
        raise UserError(f"{name}: {path} holds numbers that are not finite")
    reward.path = path
    return reward


# ---------------------------------------------------------------------------------------------------- several
class Part(NamedTuple):
    """One reward of --reward."""
    label: str            # as it is named in logs: what was given, without the weight
    name: str             # one of names(), or a path
    where: str | None     # its weights, or None for the authors' place
    weight: float         # 0 holds it out: watched, never trained on


def parse_rewards(spec):
    """"hpsv2.1:0.7,pickscore=PATH:0.3" -> a list of `Part`; a weight that is left out is 1. Raises
    UserError."""
    parts = []
    for item in items_of(spec, weighted=True):
        part = parse_part(item)
        if part.label in [other.label for other in parts]:
            raise UserError(f"--reward {item}: named twice")
        parts.append(part)
    if not any(part.weight for part in parts):
        raise UserError(f"--reward {spec}: every weight is 0; one reward at least must be trained on")
    return parts


def parse_part(item):
    """"NAME", "NAME=PATH", or either with ":WEIGHT" -> its `Part`. A path that exists is taken as it stands.
    Raises UserError."""
    item = item.strip()
    label, colon, weight = item.rpartition(":")
    if not colon or leads_somewhere(item):
        label = item
        weight = "1"
    try:
        weight = float(weight)
        name, where = named_path(label)
    except ValueError:
        raise UserError(f"--reward {item}: give NAME, NAME=PATH, or either with :WEIGHT") from None
    if name is None:    # no "=": what stands there is the reward's name, or the path of open_clip weights
        name = where
        where = None
    if not name:
        raise UserError(f'--reward "{item}": an empty name; give NAME, NAME=PATH, or either with :WEIGHT')
    if not (weight == 0 or LIGHTEST <= weight <= HEAVIEST):
        raise UserError(f"--reward {item}: a weight must be 0 (held out) or above, and finite: "
                        f"from {LIGHTEST:g} to {HEAVIEST:g}")
    return Part(label, name, where, weight)


def load_rewards(spec, device="cpu"):
    """The `Rewards` of a specification that `parse_rewards` reads. Raises UserError."""
    parts = {}
    for part in parse_rewards(spec):
        try:
            parts[part.label] = (load_reward(part.name, device, part.where), part.weight)
        except UserError as error:
            raise UserError(f"--reward {error}") from error
    return importlib.import_module("srpo_reward").Rewards(parts)


def image_networks(spec):
    """A list of `base.ImageNetwork`, one for each reward of a specification, for the plan. The `times` of one
    that is held out are 0: it fills memory all the same. Raises UserError."""
    networks = []
    for part in parse_rewards(spec):
        try:
            network = module(part.name).image_network(place(part.name, part.where))
        except UserError as error:
            raise UserError(f"--reward {error}") from error
        except Exception as error:
            raise UserError(f"--reward {part.label}: not a reward model: {one_line(error)}") from error
        if part.weight == 0:
            network = network._replace(times=0)
        networks.append(network)
    return networks
