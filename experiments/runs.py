"""What the experiments here are made of: runs of train.py, each made once and kept; evaluate.py's numbers of
what they trained; and results as Markdown, JSON and a picture.

A run lies in a folder that is named by its flags, so experiments share runs, and go on where they were
stopped.
"""

import argparse
import hashlib
import re
import shlex
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib
from matplotlib import pyplot

import evaluate
import train
from engine.command_line import Parser, whole
from engine.errors import UserError
from engine.files import read_json, write_json, write_whole
from evaluation.report.curves import read_log

matplotlib.use("Agg")
RESULTS = Path(__file__).resolve().parent / "results"
HELD_OUT = "miniature/reward_unbiased"  # a reward that no run is trained on
# Colours that people with any kind of colour vision tell apart (Okabe and Ito).
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999"]

BROKEN = 0.05  # the share of broken pictures from which on a run has broken
# How a column is drawn: its title with its unit, and the factor that makes the unit.
DRAWN = {"realism": ("realism, %", 100), "alignment": ("alignment, %", 100), "broken": ("broken, %", 100),
         "painting": ("paintings, %", 100), "redness": ("redness, R - (G + B)/2", 1),
         "saturation": ("saturation (HSV)", 1), "brightness": ("brightness (mean luma)", 1),
         "frechet": ("Frechet distance to true photos", 1)}


class Setting(NamedTuple):
    """A row of an experiment: its name, and the flags of train.py that make it."""
    name: str
    flags: str


def with_a_judge(text):
    """A type for argparse: a model's folder with a judge; one that is not there is named by train.py."""
    if Path(text).is_dir() and not (Path(text) / "judge").is_dir():
        raise argparse.ArgumentTypeError(f"{text}: must be a folder with judge/ in it: nothing else knows "
                                         "what a photo is")
    return text


def flag_line(text):
    """A type for argparse: flags as a shell reads them."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be flags as in a shell: {error}") from error
    return text


def parser(doc, seeds=5, pictures=128):
    """The flags that every experiment has."""
    common = Parser(doc)
    add = common.add_argument
    add("--model", type=with_a_judge, default="miniature", help="a model folder with a judge")
    add("--seeds", type=whole(1, 100), default=seeds, help="runs of each row, seeds 0, 1, ...")
    add("--home", default="runs/experiments", help="where the runs are kept, and shared between experiments")
    add("--results", default=str(RESULTS), help="folder of the Markdown, the JSON and the picture")
    add("--pictures", type=whole(4), default=pictures, help="held-out pictures that are evaluated")
    add("--flags", type=flag_line, default="",
        help="of train.py, for every run, above its own: --steps 2 tries all")
    return common


def parse(doc, argv, seeds=5, pictures=128):
    """What a command line says to them. Raises UserError."""
    return parser(doc, seeds, pictures).parse_args(argv)


# ------------------------------------------------------------------------------------------------------- runs
SELDOM = "--watch 2 --watch-every 1000"  # for runs of which only the end is looked at


def watching(own, pictures=48, every=2):
    """Flags of train.py, for runs that are looked at on the way: the watched pictures, and how often."""
    return f"--watch {min(pictures, own.pictures)} --watch-every {every}"


def trained(own, flags, seed, looks=SELDOM):
    """The folder of the finished run of train.py with these flags (one line) and a seed, made now if it is
    not there; looks: flags, too, that change nothing but what is watched."""
    argv = ["--model", own.model, *shlex.split(looks), *shlex.split(flags), *shlex.split(own.flags)]
    argv += ["--seed", str(seed)]
    name = re.sub(r"[^\w.]+", "_", flags).strip("_")[:60] or "main"
    digest = hashlib.sha256(shlex.join(argv).encode()).hexdigest()[:8]
    out = Path(own.home) / f"{name}_{digest}"
    if not (out / "summary.json").exists():
        print(f"train.py {shlex.join(argv)} --out {out}", flush=True)
        train.main([*argv, "--eval", "0", "--out", str(out), "--resume"])
    return out


def watched(own, flags, seed, pictures=48, every=2):
    """A run's log: a list of dicts, of which those of every so many steps have the means over the watched
    pictures under "watch"."""
    return log_of(trained(own, flags, seed, watching(own, pictures, every)))


def log_of(folder):
    """The log of a run's folder: a list of dicts, one an update."""
    return read_log(folder / "log.jsonl")


def evaluated(own, weights, name, prefix=None, per_prompt=1):
    """{row: {column: mean over the pictures}} by evaluate.py, of the base, of the base with the words
    `prefix` in its prompts, and of {row: folder of a run}: `own.pictures` of each, `per_prompt` of a
    prompt."""
    out = Path(own.home) / f"evaluate_{name}"
    prompts = own.pictures // per_prompt
    argv = ["--model", own.model, "--out", str(out), "--first", str(prompts), "--batch", "16",
            "--metrics", f"reward,statistics,judge,frechet,clip={HELD_OUT}", "--per-prompt", str(per_prompt)]
    if prefix:
        argv += ["--prefix", prefix]
    if weights:
        argv += ["--weights", *(f"{row}={folder}/weights" for row, folder in weights.items())]
    if evaluate.run(argv):
        raise UserError(f"{out}: some pictures could not be read; delete the folder")
    rows = {}
    for row, found in read_json(out / "results.json")["rows"].items():
        rows[row] = {column: cell["mean"] for column, cell in found["overall"].items() if cell}
    return rows


def measured(own, settings, name, prefix=None, per_prompt=1, looks=SELDOM):
    """{row: {column: `Spread`}} of what `evaluated` says of the base (and of the base with the words) and of
    every `Setting`, over the seeds; looks: as in `trained`."""
    per_seed = {setting.name: [] for setting in settings}
    for seed in range(own.seeds):
        weights = {setting.name: trained(own, setting.flags, seed, looks) for setting in settings}
        found = evaluated(own, weights, f"{name}_{seed}", prefix, per_prompt)
        for row in per_seed:
            per_seed[row].append(found[row])
    bases = {row: [found[row]] for row in found if row not in per_seed}
    return {row: over_seeds(each) for row, each in (bases | per_seed).items()}


def seconds_of(log):
    """Of an update, the mean."""
    return mean(line["seconds_rollout"] + line["seconds_update"] for line in log)


# ------------------------------------------------------------------------------------------ mean and spread
class Spread(NamedTuple):
    """A number over seeds: mean and standard deviation between them (None for one seed)."""
    mean: float
    std: float | None
    n: int


def spread(values):
    """The `Spread` of a list of numbers; None of an empty one."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def over_seeds(rows):
    """[{column: number}] of the seeds -> {column: `Spread`}."""
    return {column: spread([row.get(column) for row in rows]) for column in rows[0]}


def first(lines, wanted):
    """The first line of a log that is `wanted`(line); None if none is."""
    return next((line for line in lines if wanted(line)), None)


def first_step(log, column, reached):
    """The first update at which the watched mean of a column is `reached`(value); None if it never is."""
    found = first(log, lambda line: "watch" in line and reached(line["watch"][column]))
    return found and found["step"]


def breaks(log):
    """The first update at which more than BROKEN of the watched pictures are broken; None if none is."""
    return first_step(log, "broken", lambda value: value > BROKEN)


def first_warning(log):
    """The first update at which the drift warning fired; None if it never did."""
    found = first(log, lambda line: line.get("hacking"))
    return found and found["step"]


def at_equal(log, column, climbed, value):
    """A watched column where another one, `climbed`, first passes a value, interpolated between two looks;
    None if it never does."""
    before = None
    for line in log:
        if "watch" not in line:
            continue
        now = line["watch"]
        if now[climbed] >= value:
            if before is None or now[climbed] == before[climbed]:
                return now[column]
            part = (value - before[climbed]) / (now[climbed] - before[climbed])
            return before[column] + part * (now[column] - before[column])
        before = now
    return None


# ---------------------------------------------------------------------------------------------------- results
def shown(value, form):
    """A `Spread` as text: mean ± standard deviation between the seeds."""
    if value is None:
        return "-"
    text = format(value.mean, form)
    if value.std is not None:
        text += f" ± {format(value.std, form.lstrip('+'))}"
    return text.replace("%", "") + (" %" if "%" in text else "")


def table(rows, columns):
    """A Markdown table of {row: {column: `Spread`}}; columns {column: (title, format)}."""
    lines = ["| | " + " | ".join(title for title, _ in columns.values()) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [shown(row.get(column), form) for column, (_, form) in columns.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(own, name, title, told, tables, figure, **more):
    """Write NAME.md (a title, the command, what the numbers are, the tables), NAME.json (the tables, and what
    there is `more`) and, of a matplotlib figure, NAME.png; print the Markdown.

    tables: a list of ({row: {column: `Spread`}}, {column: (title, format)}).
    """
    folder = Path(own.results)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    command = f"```\npython -m experiments.{name} --seeds {own.seeds}\n```"
    pages = [table(rows, columns) for rows, columns in tables]
    text = "\n\n".join([f"# {title}", command, told, *pages, f"![{title}]({name}.png)"]) + "\n"
    write_whole(folder / f"{name}.md", text)
    write_json(folder / f"{name}.json", {"tables": [as_json(rows) for rows, _ in tables], **more})
    print(text)


def bars(axis, rows, column, title, scale=1):
    """Draw a column of {row: {column: `Spread`}}: a bar a row, with the deviation between the seeds."""
    nothing = True
    for place, row in enumerate(rows.values()):
        value = row.get(column)
        if value is not None:
            nothing = nothing and value.mean == 0
            axis.barh(place, scale * value.mean, xerr=scale * (value.std or 0),
                      color=COLOURS[place % len(COLOURS)])
    if nothing:
        axis.set_xlim(0, 1)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_title(title, fontsize=10)


def lines(axis, rows, title, scale=1):
    """Draw {row: [(update, number)]} as curves over the updates."""
    for place, (name, points) in enumerate(rows.items()):
        again, colour = divmod(place, len(COLOURS))
        axis.plot([step for step, _ in points], [scale * value for _, value in points], label=name,
                  color=COLOURS[colour], linestyle="dashed" if again else "solid")
    axis.set_xlabel("updates")
    axis.set_title(title, fontsize=10)


def what_n_is(own, pictures=None):
    """What n is, to be written below a figure of bars; pictures: if they are not the held-out ones."""
    return (f"{pictures or own.pictures} pictures a seed, {own.seeds} seeds; lines on the bars: standard "
            "deviation between the seeds")


def bar_figure(rows, columns, note):
    """A figure of `bars`, a panel a column; the note says what n is."""
    size = (3.3 + 3.2 * len(columns), 1.2 + 0.27 * len(rows))
    figure, axes = pyplot.subplots(1, len(columns), figsize=size, layout="constrained", squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        title, scale = DRAWN[column]
        bars(axis, rows, column, title, scale)
    for axis in axes[0, 1:]:
        axis.set_yticklabels([])
    figure.supxlabel(note, fontsize=9)
    return figure


def curve_figure(logs, columns, note):
    """A figure of the watched pictures over the updates, a panel a column and a line for each of {row: log};
    the note says what n is."""
    size = (4 * len(columns), 4.2)
    figure, axes = pyplot.subplots(1, len(columns), figsize=size, layout="constrained", squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        title, scale = DRAWN[column]
        lines(axis, {name: points(log, column) for name, log in logs.items()}, title, scale)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=5)
    figure.supxlabel(note, fontsize=9)
    return figure


def points(log, column):
    """[(update, mean of the watched pictures)] of a run, where there is such a number."""
    looks = [(line["step"], line["watch"][column]) for line in log if "watch" in line]
    return [(step, value) for step, value in looks if value is not None]


def as_json(rows):
    """{row: {column: `Spread`}} for a JSON file."""
    return {name: {column: value and value._asdict() for column, value in row.items()}
            for name, row in rows.items()}
