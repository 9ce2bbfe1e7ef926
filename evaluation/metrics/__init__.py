"""Every metric by its name: each file of this folder, and every reward of rewards/.

To add a metric, add a file; nothing else has to name it. A file is imported only when its metric is used.

A metric's file has these names:

COLUMNS                    {column: Column(title, format)}: its columns in evaluate.py's table, in this order
fetch(where=None)          its files, downloaded if they are not here: a path, a NamedTuple of paths, or None. where:
                           PATH of --metrics NAME=PATH, or None for the authors' place. Raises UserError if a file
                           cannot be had
load(files, args, device)  a scorer, from what fetch returned. Raises UserError if the files do not fit
scorer(pictures, prompts)  B PIL pictures (RGB, any size) and their B prompts -> {column: [B] numbers}. Raises
                           UserError for pictures that it cannot score at all

If a flag of evaluate.py says where its files are:

WHERE                      the flag's name; fetch gets the flag's value if there is no PATH

If some flags of evaluate.py make no sense for it:

check(args)                raises UserError

If it has its own prompts, or if some prompts have no score:

pictures(files, args, benchmark)  the `Picture`s that it scores in place of the benchmark's, in a subfolder of
                           its name. If they have entries, the scorer gets these in place of prompts
UNDEFINED                  the columns that are NaN for some prompts; this is no error

If it has a number of a whole set of pictures that is not a mean over them:

SET_COLUMNS                {column: Column}: the columns that the table shows in place of COLUMNS
of_set(values, prompts)    {column of COLUMNS: [P]} of P pictures, and their P prompts -> {column of SET_COLUMNS:
                           {"mean", "se", "n"}, or None if there is no such number}
"""

import importlib
import pkgutil

import rewards
from engine.errors import UserError
from engine.paths import items_of, named_path
from evaluation.metrics.reward import RewardMetric


def files():
    """The names of the metrics that are files of this folder."""
    return [file.name for file in pkgutil.iter_modules(__path__)]


def names():
    """The names of all metrics, sorted."""
    return sorted([*files(), *rewards.names()])


def find(name):
    """The metric of a name in names(): a module or object with COLUMNS, fetch and load. Its file is imported now."""
    if name in files():
        return importlib.import_module(f"{__name__}.{name}")
    return RewardMetric(name)


def fetch(metric, where, args):
    """The files of a metric. where: PATH of --metrics NAME=PATH, or None. args: the flags of evaluate.py. Raises
    UserError if the metric refuses the flags, or if a file cannot be had."""
    if hasattr(metric, "check"):
        metric.check(args)
    if where is None and hasattr(metric, "WHERE"):
        where = getattr(args, metric.WHERE)
    return metric.fetch(where)


def shown(name):
    """{column: `Column`}: the columns of a metric that the table shows."""
    metric = find(name)
    return getattr(metric, "SET_COLUMNS", metric.COLUMNS)


def all_shown(asked):
    """{metric: `shown`} of several metrics. Raises UserError if two of them have a column of one name."""
    found = {}
    owner = {}
    for name in asked:
        found[name] = shown(name)
        for column in found[name]:
            if column in owner:
                raise UserError(f"--metrics {owner[column]},{name}: both have a column {column!r}; rename one")
            owner[column] = name
    return found


def parse_metrics(spec):
    """"hpsv2.1,pickscore=PATH" -> {name: path or None}. Raises UserError for an unknown or repeated name."""
    known = names()
    chosen = {}
    for item in items_of(spec):
        name, where = named_path(item)
        if name is None:  # without "=", the item is a metric's name
            name, where = where, None
        if name not in known:
            raise UserError(f"--metrics {item}: not a metric; there are {', '.join(known)}")
        if name in chosen:
            raise UserError(f"--metrics {item}: named twice")
        chosen[name] = where
    return chosen
