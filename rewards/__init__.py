"""Every reward by its name: each is a file of this folder, such as `hpsv2_1.py` for "hpsv2.1".

To add a reward, add its file; nothing else has to name it. A file is imported only when its reward is used, and torch
only with it. A reward's file has these names:

COLUMNS
    {name: Column(title, format)}: one to three columns of evaluate.py's table, in this order. The first is r of the
    bare prompt (Eq. 7) in the metric's own unit. The second is the SGP gap r1 - r2 (Eq. 10). The third is that gap
    on the authors' display scale, 100 (gap + 0.01).
fetch(where=None) -> path
    The path of its weights on this machine: those of `where` (a path or a hub repository), or of the authors' place. Or
    a NamedTuple of paths, the weights' first.
    They are downloaded if they are not here yet. Everything else that loading needs, such as a tokenizer, is fetched
    too, so that nothing fails later. Raises UserError if something cannot be had.
load(path, device) -> base.Reward
    The reward, from the path that fetch returned. It may raise anything: `load_reward` makes one line of it.
image_network(where=None) -> base.ImageNetwork
    For --plan: its network without weights, in the dtype in which it is held. The caller sets the mode, such as the
    meta device or fake tensors, and the function must work in it.
"""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError, one_line
from engine.paths import items_of, leads_somewhere, named_path

LIGHTEST, HEAVIEST = 1e-6, 1e6  # limits of a reward's weight; beyond them float32 loses one reward or all
HELPERS = ("base", "pictures", "clip_model")    # the files of this folder that are not a reward


# ------------------------------------------------------------------------------------------------- the folder
def files():
    """{reward's name: its module's name} of this folder. In a file's name, "_" between two digits stands for "."."""
    found = {}
    for file in pkgutil.iter_modules(__path__):
        if file.name not in HELPERS:
            name = re.sub(r"(?<=\d)_(?=\d)", ".", file.name)
            found[name] = f"{__name__}.{file.name}"
    return found


def names():
    """The names of all rewards."""
    return list(files())


def module(name):
    """The module of a reward, imported now. For a path in place of a name it is clip_model. Raises UserError if `name`
    is neither a reward's name nor a path that exists."""
    known = files()
    if name in known:
        return importlib.import_module(known[name])
    if Path(name).exists():
        return importlib.import_module(f"{__name__}.clip_model")
    raise UserError(f"{name}: no such file or folder, and not one of {', '.join(known)}")


def place(name, where):
    """Where to take a reward's weights from. If a path is given in place of a name, it is that path."""
    if where is None and name not in names():
        return name
    return where


# -------------------------------------------------------------------------------------------------------- one
def fetch(name, where=None):
    """The path of a reward's weights on this machine, downloaded if they are not here yet. where: a path or a hub
    repository; None: the authors' place. Raises UserError if they cannot be had."""
    reward = module(name)
    try:
        found = reward.fetch(place(name, where))
    except UserError as error:
        raise UserError(f"{name}: {error}; give {name}=PATH") from error
    if not isinstance(first(found), str | Path):
        raise UserError(f"{name}: its fetch returned {found!r}, and not a path")
    return found


def load_reward(name, device="cpu", where=None, **options):
    """The `base.Reward` of a name, or of a path to open_clip weights in place of a name.

    where: a path or a hub repository; None: the authors' place. options: for the `load` of its file, such as arch for
    open_clip weights in a .pt. Raises UserError if the weights cannot be had, do not fit, or are not finite.
    """
    return load_fetched(name, fetch(name, where), device, **options)


def load_fetched(name, path, device="cpu", **options):
    """The same, of a path that fetch returned."""
    try:
        reward = module(name).load(path, device, **options)
    except Exception as error:
        raise UserError(f"{name}: not a reward model, in {first(path)}: {one_line(error)}") from error
    if not reward.is_finite():
        raise UserError(f"{name}: {first(path)} holds numbers that are not finite")
    reward.path = path
    return reward


def first(path):
    """The weights' path of what `fetch` returned: a path, or a tuple of paths with that one first."""
    return path[0] if isinstance(path, tuple) else path


# ---------------------------------------------------------------------------------------------------- several
class Part(NamedTuple):
    """One reward of --reward."""
    label: str            # its name in logs: the text that was given, without the weight
    name: str             # one of names(), or a path
    where: str | None     # the place of its weights; None: the authors'
    weight: float         # 0 holds it out: it is watched, but never trained on


def parse_rewards(spec):
    """"hpsv2.1:0.7,pickscore=PATH:0.3" -> a list of `Part`. A weight that is left out is 1. Raises UserError for a
    wrong item, a repeated one, and if every weight is 0."""
    parts = []
    for item in items_of(spec, weighted=True):
        part = parse_part(item)
        if part.label in [other.label for other in parts]:
            raise UserError(f"--reward {item}: named twice")
        parts.append(part)
    if not any(part.weight for part in parts):
        raise UserError(f"--reward {spec}: every weight is 0; give at least one reward a weight above 0")
    return parts


def parse_part(item):
    """"NAME", "NAME=PATH", or either with ":WEIGHT" -> its `Part`. A path that exists is used as a whole, even if it
    contains ":" or "=". Raises UserError."""
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
    if name is None:    # without "=", the item is the reward's name or the path of open_clip weights
        name = where
        where = None
    if not name:
        raise UserError(f'--reward "{item}": an empty name; give NAME, NAME=PATH, or either with :WEIGHT')
    if not (weight == 0 or LIGHTEST <= weight <= HEAVIEST):
        raise UserError(f"--reward {item}: a weight must be 0 (held out) or above, and finite: "
                        f"from {LIGHTEST:g} to {HEAVIEST:g}")
    return Part(label, name, where, weight)


def load_rewards(spec, device="cpu"):
    """The `srpo_reward.Rewards` of --reward's text, with all weights loaded. Raises UserError."""
    parts = {}
    for part in parse_rewards(spec):
        try:
            parts[part.label] = (load_reward(part.name, device, part.where), part.weight)
        except UserError as error:
            raise UserError(f"--reward {error}") from error
    return importlib.import_module("srpo_reward").Rewards(parts)


def image_networks(spec, texts=2):
    """A list of `base.ImageNetwork` for --plan, one for each reward of --reward's text. A held-out reward has `times`
    0, but it still takes memory. texts: how many texts of a picture are scored. Raises UserError."""
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
        if network.texts:
            network = network._replace(times=texts * network.times)
        networks.append(network)
    return networks
