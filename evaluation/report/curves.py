"""The numbers of a run's page, from its log: curves, looks at the watched pictures, and the final table.

The watched pictures are held-out prompts, sampled at fixed seeds while the run trains.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from engine.errors import printable
from engine.files import fits
from engine.run import log
from evaluation.metrics import frechet, judge, reward, statistics
from evaluation.metrics.statistics import STATISTICS
from evaluation.table_formats import table
from rewards.base import Column

POINTS = 1000         # largest number of points in a curve; more cannot be seen
NOT_COMPARED = ("out", "resume", "overwrite", "explain", "plan")  # flags that do not change a result


class Run(NamedTuple):
    """A run, as its page needs it."""
    name: str
    args: dict       # its flags
    flags: str       # its flags as one line; "" if unknown
    status: str      # "running", "stopped", "failed" or "finished"
    state: dict      # its state, as in a checkpoint; may be empty
    prompts: list    # the prompts of the watched pictures; empty if unknown
    lines: list      # the lines of log.jsonl
    samples: dict    # {step: file of the watched pictures}
    summary: dict    # the content of summary.json; empty before the run is finished
    photographs: Path = None  # the file of the photographs whose captions are the first watched prompts

    @property
    def step(self):
        """The last update in the log; 0 if there is none."""
        return self.lines[-1]["step"] if self.lines else 0


def read_log(path):
    """The lines of a log.jsonl: a list of dicts with "step", sorted by step; "watch" is a dict of means. Damaged lines
    are left out; a killed run may leave one. Raises OSError."""
    by_step = {}
    for text in Path(path).read_bytes().splitlines():
        try:
            line = json.loads(text)
            if type(line["step"]) is int and line["step"] > 0:
                by_step[line["step"]] = log.nested(line)
        except (ValueError, TypeError, LookupError, RecursionError):
            pass
    return [by_step[step] for step in sorted(by_step)]


def number(value):
    """The value as a float if it is a finite number, as `files.fits` has it; otherwise None."""
    return float(value) if fits(value, float) else None


# ------------------------------------------------------------------------------------- the watched pictures
def looks(run):
    """{step: {name: mean over the watched pictures}} of each look; step 0 too if the state has it."""
    found = {}
    if run.state.get("before"):
        found[0] = {}
        for name, values in run.state["before"].items():
            finite = [value for value in values if number(value) is not None]
            found[0][name] = mean(finite) if finite else None
    for line in run.lines:
        if isinstance(line.get("watch"), dict):
            found[line["step"]] = line["watch"]
    return found


def warnings(run):
    """{step: list of texts} of the looks at which the drift warning fired."""
    found = {}
    for line in run.lines:
        if isinstance(line.get("hacking"), list) and line["hacking"]:
            found[line["step"]] = [printable(text) for text in line["hacking"]]
    return found


def landed(run):
    """Whether the last look's SGP gap has reached the level of --land."""
    return next((line.get("landed") is True for line in reversed(run.lines) if "watch" in line), False)


def best_step(run):
    """The step whose weights are in weights_best/: the highest SGP gap among looks without a drift warning. None if
    there is no such look."""
    warned = warnings(run)
    best = None
    highest = -math.inf
    for step, means in looks(run).items():
        sgp = number(means.get("sgp"))
        if step > 0 and step not in warned and sgp is not None and sgp > highest:
            best = step
            highest = sgp
    return best


# ---------------------------------------------------------------------------------------------------- curves
def curve(dicts, name, scale=1):
    """[[step, value]] of one name in {step: dict}, where it is a finite number; about POINTS points at most."""
    points = []
    for step, values in dicts.items():
        value = number(values.get(name))
        if value is not None:
            points.append([step, float(f"{value * scale:.5g}")])
    stride = 1 + len(points) // POINTS
    return points[:-1][::stride] + points[-1:]


def curves(run):
    """{title of a chart: {name of a curve: [[step, value]]}}, in the page's order."""
    lines = {line["step"]: line for line in run.lines}
    watched = looks(run)
    drift = {0: dict.fromkeys(STATISTICS, 0.0)}
    for step, line in lines.items():
        if isinstance(line.get("drift"), dict):
            drift[step] = line["drift"]
    branches = {name: None for line in run.lines for name in line if name.startswith("reward_")}
    found = {"SGP gap": {"watched": curve(watched, "sgp"), "training": curve(lines, "sgp"),
                         "--land": curve(lines, "land")},
             "Reward in training, by branch": {name[7:]: curve(lines, name) for name in branches},
             "Reward of the watched pictures": {"watched": curve(watched, "reward")},
             "Judge: % of the watched pictures": {name: curve(watched, name, 100) for name in judge.COLUMNS}}
    shown = {"sgp", "reward", *judge.COLUMNS, *STATISTICS}
    others = {name: None for means in watched.values() for name in means if name not in shown}
    for name, column in columns_of(others).items():
        found[f"{column.title} of the watched pictures"] = {"watched": curve(watched, name)}
    for name in STATISTICS:
        found[f"Drift of {name}"] = {"watched": curve(drift, name)}
    found["Gradient norm, before clipping"] = {"norm": curve(lines, "grad_norm")}
    found["Seconds of an update"] = {"update": curve(lines, "seconds_update"),
                                     "rollout": curve(lines, "seconds_rollout")}
    return found


def band_of(run, title):
    """[low, high] of the band to shade in a chart; None if the chart has none."""
    for name, limit in zip(STATISTICS, run.args["drift_band"], strict=True):
        if title == f"Drift of {name}":
            return [-limit, limit]
    return None


def charts(runs):
    """[{title, curves, bands}]: one chart for each title, with the curves of all runs. A curve's "kind" is its number
    among the curves of its own run."""
    found = defaultdict(lambda: {"curves": [], "bands": []})
    for i, run in enumerate(runs):
        for title, by_name in curves(run).items():
            chart = found[title]
            for kind, (name, points) in enumerate(by_name.items()):
                if points:
                    told = {"run": i, "kind": kind, "name": printable(name), "points": points}
                    chart["curves"].append(told)
            band = band_of(run, title)
            if band and band not in chart["bands"]:
                chart["bands"].append(band)
    return [{"title": title, **chart} for title, chart in found.items() if chart["curves"]]


def seconds_of(run):
    """Seconds of an update with its rollout: the median of the last twenty; None if the log has none."""
    each = []
    for line in run.lines[-20:]:
        seconds = [number(line.get(name)) for name in ("seconds_update", "seconds_rollout")]
        if None not in seconds:
            each.append(sum(seconds))
    return median(each) if each else None


def pace(run):
    """Seconds from one update to the next, with the looks at the watched pictures included. They are read from the
    times of the pictures' files; with fewer than two files, from the log. None if neither exists."""
    times = [(step, path.stat().st_mtime) for step, path in run.samples.items()]
    each = []
    for (step, time), (next_step, next_time) in zip(times, times[1:], strict=False):
        each.append((next_time - time) / (next_step - step))
    return median(each) if each else seconds_of(run)


# ---------------------------------------------------------------------------------------------------- tables
def evaluated(run):
    """{"before", "after": {metric: `tables.mean`}} of a run that is finished and had --eval; otherwise {}."""
    return {when: run.summary[when] for when in ("before", "after") if run.summary.get(when)}


def watched(run):
    """{"before", "best, step N", "last, step N": {metric: its mean}} of the watched pictures, as `tables.mean`s."""
    seen = looks(run)
    best = best_step(run)
    last = max(seen, default=None)
    steps = {"before": 0, "best": best, "last": last}
    if best == last:
        steps = {"before": 0, "best and last": best}
    found = {}
    for word, step in steps.items():
        if step in seen and (step or word == "before"):
            name = f"{word}, step {step}" if step else word
            found[name] = {metric: as_mean(value, run.args["watch"]) for metric, value in seen[step].items()}
    return found


def as_mean(value, n):
    """A value of a log as a `tables.mean`; None if it is not finite."""
    return None if number(value) is None else {"mean": value, "se": None, "n": n}


def finite(row):
    """{metric: `tables.mean`} of a file without what is not finite."""
    return {metric: value for metric, value in row.items() if value and number(value["mean"]) is not None}


def numbers(runs):
    """[`Table`]: the evaluated pictures, then the watched ones. Of one run, the columns are before, best and last;
    of several, they are the runs."""
    if len(runs) == 1:
        of_all = evaluated(runs[0])
        of_watched = watched(runs[0])
    else:
        of_all = {printable(run.name): evaluated(run)["after"] for run in runs if "after" in evaluated(run)}
        of_watched = {printable(run.name): list(watched(run).values())[-1] for run in runs if watched(run)}
    words = "after training" if len(runs) > 1 else ""
    made = []
    for title, rows in ((f"Evaluated {words}".strip(), of_all), ("Watched while training", of_watched)):
        rows = {name: finite(row) for name, row in rows.items()}
        metrics = {metric: None for row in rows.values() for metric in row}
        if metrics:
            made.append(table(rows, columns_of(metrics), title=title, settings=settings(runs)))
    return made


def columns_of(metrics):
    """{metric: `Column`}. A reward among several has its own column."""
    known = reward.COLUMNS | statistics.COLUMNS | judge.COLUMNS | frechet.SET_COLUMNS
    return {metric: known.get(metric, Column(printable(metric), "+.3f")) for metric in metrics}


def settings(runs):
    """How the pictures of the runs are sampled, as a line."""
    said = []
    for a in (run.args for run in runs):
        guidance = f"guidance {a['guidance']:g}" if a.get("cfg") is None else f"CFG {a['cfg']:g}"
        said.append(f"{a['size']} pixels, {a['eval_steps']} steps, {guidance}, noise seeds from 0.")
    return " ".join(dict.fromkeys(said))


def flags_that_differ(runs):
    """[[cell]], the head first: the flags in which the runs differ."""
    found = [["flag", *(printable(run.name) for run in runs)]]
    for name in {name: None for run in runs for name in run.args if name not in NOT_COMPARED}:
        values = [as_typed(run.args.get(name)) for run in runs]
        if len(set(values)) > 1:
            found.append([f"--{printable(name).replace('_', '-')}", *values])
    return found


def as_typed(value):
    """A flag's value as text, nearly as a user would type it."""
    if isinstance(value, list):
        return ", ".join(map(as_typed, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "off" if value is None else printable(value)
