"""Every metric by its name: a file of this folder each, and every reward of rewards/. To add a metric, add a
file: nothing else names it. It is imported when the metric is asked for, not before.

A metric's file offers:

COLUMNS                    {column: Column(title, format)}: its columns in evaluate.py's table, in this order
fetch(where=None)          its files, downloaded if they are not here: a path, a NamedTuple of paths, or None; as a
                           reward's. where is PATH of --metrics NAME=PATH, or None for the authors' place. Raises
                           UserError if something cannot be had
load(files, args, device)  a scorer. Raises UserError if the files are not such a scorer's
scorer(pictures, prompts)  B PIL pictures (RGB, any size) and their B prompts -> {column: [B] numbers}. Raises
                           UserError for pictures that it cannot score at all

and, if a flag of evaluate.py says where its files are:

WHERE                      the flag's name: fetch gets its value where there is no PATH

and, if some flags of evaluate.py make no sense for it:

check(args)                raises UserError

and, if it has prompts of its own, or if some prompts have no score:

pictures(files, args, benchmark)  the `Picture`s that it scores in place of the benchmark's, in a subfolder of
                           its name; the scorer gets their entries, if they have one, in place of prompts
UNDEFINED                     the columns that are NaN, and rightly so, for some prompts

and, if it says something of a set of pictures that is no mean over them:

SET_COLUMNS                {column: Column}: what the table shows, in place of COLUMNS
of_set(values, prompts)    {column of COLUMNS: [P]}, of P pictures and their P prompts -> {column of
                           SET_COLUMNS: {"mean", "se", "n"}, or None where there is no such number}
"""

import importlib
import pkgutil

import rewards
from engine.errors import UserError
from engine.paths import items_of, named_path
from evaluation.metrics.reward import RewardMetric


def files():
    """The metrics that are a file of this folder."""
    return [file.name for file in pkgutil.iter_modules(__path__)]


def names():
    """All metrics."""
    return sorted([*files(), *rewards.names()])


def find(name):
    """A metric of names(), its file imported now: what offers COLUMNS, fetch and load."""
    if name in files():
        return importlib.import_module(f"{__name__}.{name}")
    return RewardMetric(name)


def fetch(metric, where, args):
    """The files of a metric, where is PATH of --metrics NAME=PATH or None; args: the flags of evaluate.py. Raises
    UserError."""
    if hasattr(metric, "check"):
        metric.check(args)
    if where is None and hasattr(metric, "WHERE"):
        where = getattr(args, metric.WHERE)
    return metric.fetch(where)


def shown(name):
    """{column: `Column`} of a metric, as the table shows it."""
    metric = find(name)
    return getattr(metric, "SET_COLUMNS", metric.COLUMNS)


def parse_metrics(spec):
    """"hpsv2.1,pickscore=PATH" -> {name: where or None}. Raises UserError for what is no metric."""
    known = names()
    chosen = {}
    for item in items_of(spec):
        name, where = named_path(item)
        if name is None:  # no "=": what stands there is a metric's name
            name, where = where, None
        if name not in known:
            raise UserError(f"--metrics {item}: not a metric; there are {', '.join(known)}")
        if name in chosen:
            raise UserError(f"--metrics {item}: named twice")
        chosen[name] = where
    return chosen
