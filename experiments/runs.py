"""The parts of every experiment: runs of train.py, evaluate.py's numbers of their weights, and pages of results.

Each run is made once and kept, in a folder that is named by its flags. So experiments share runs, and an experiment
that was stopped continues. Results are Markdown, JSON and a picture. Watched pictures are held-out prompts, sampled at
fixed seeds while a run trains. Broken pictures have melted or damaged parts.
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
HELD_OUT = "miniature/reward_unbiased"  # the held-out reward; only unbiased and rare_words train on it
# Colours that people with any kind of colour vision can tell apart (Okabe and Ito).
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999"]

BROKEN = 0.05  # a run breaks when the share of broken pictures is larger than this
# How a column is drawn: its title with its unit, and the factor to that unit.
DRAWN = {"realism": ("realism, %", 100), "alignment": ("alignment, %", 100), "broken": ("broken, %", 100),
         "painting": ("paintings, %", 100), "redness": ("redness, R - (G + B)/2", 1),
         "saturation": ("saturation (HSV)", 1), "brightness": ("brightness (mean luma)", 1),
         "frechet": ("Frechet distance to true photos", 1)}


class Setting(NamedTuple):
    """A row of an experiment: its name, and the flags of train.py that make it."""
    name: str
    flags: str


def with_a_judge(text):
    """A type for argparse: a model's folder with a judge. A folder that does not exist is refused by train.py."""
    if Path(text).is_dir() and not (Path(text) / "judge").is_dir():
        raise argparse.ArgumentTypeError(f"{text}: must be a folder with judge/ in it, which is needed to count photos")
    return text


def flag_line(text):
    """A type for argparse: flags as in a shell."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be flags as in a shell: {error}") from error
    return text


def parser(doc, seeds=5, pictures=128):
    """The parser of the flags that every experiment has. seeds, pictures: the defaults of two of them."""
    common = Parser(doc)
    add = common.add_argument
    add("--model", type=with_a_judge, default="miniature", help="a model folder with a judge")
    add("--seeds", type=whole(1, 100), default=seeds, help="runs of each row, seeds 0, 1, ...")
    add("--home", default="runs/experiments", help="folder of the runs, which experiments share")
    add("--results", default=str(RESULTS), help="folder of the Markdown, the JSON and the picture")
    add("--pictures", type=whole(4), default=pictures, help="held-out pictures that are evaluated")
    add("--flags", type=flag_line, default="",
        help="flags of train.py for every run, which override the run's own; --steps 2 tests that everything runs")
    return common


def parse(doc, argv, seeds=5, pictures=128):
    """The values of these flags on a command line. Raises UserError."""
    return parser(doc, seeds, pictures).parse_args(argv)


# ------------------------------------------------------------------------------------------------------- runs
SELDOM = "--watch 2 --watch-every 1000"  # for runs whose watched pictures are not used


def watching(own, pictures=48, every=2):
    """Flags of train.py for runs whose watched pictures are used: how many, and every how many updates."""
    return f"--watch {min(pictures, own.pictures)} --watch-every {every}"


def trained(own, flags, seed, looks=SELDOM):
    """The folder of the finished run of train.py with these flags (one line) and a seed. It is run now if it does not
    exist. looks: further flags, which only change what is watched."""
    argv = ["--model", own.model, *shlex.split(looks), *shlex.split(flags), *shlex.split(own.flags)]
    argv += ["--seed", str(seed)]
    name = re.sub(r"[^\w.]+", "_", flags).strip("_")[:60] or "main"
    digest = hashlib.sha256(shlex.join(argv).encode()).hexdigest()[:8]
    out = Path(own.home) / f"{name}_{digest}"
    if not (out / "summary.json").exists():
        print(f"train.py {shlex.join(argv)} --out {out}", flush=True)
        train.main([*argv, "--eval", "0", "--out", str(out), "--resume"])
        if not (out / "summary.json").exists():
            raise UserError(f"{out}: stopped; start the same command again to go on")
    return out


def watched(own, flags, seed, pictures=48, every=2):
    """The log of a run: a list of dicts, one for each update. Every `every` updates, "watch" has the means over the
    watched pictures."""
    return log_of(trained(own, flags, seed, watching(own, pictures, every)))


def log_of(folder):
    """The log in a run's folder: a list of dicts, one for each update."""
    return read_log(folder / "log.jsonl")


def evaluated(own, weights, name, prefix=None, per_prompt=1):
    """{row: {column: mean over the pictures}} by evaluate.py. Rows: the base, with `prefix` the base whose prompts are
    prefixed with it, and weights {row: folder of a run}. Each row has `own.pictures` pictures, `per_prompt` of each
    prompt. Raises UserError if pictures cannot be read."""
    out = Path(own.home) / f"evaluate_{name}"
    prompts = own.pictures // per_prompt
    argv = ["--model", own.model, "--out", str(out), "--first", str(prompts), "--batch", "16",
            "--metrics", f"reward,statistics,judge,look,frechet,clip={HELD_OUT}", "--per-prompt", str(per_prompt)]
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
    """{row: {column: `Spread`}} over the seeds, of `evaluated` for every `Setting` and for the base, with and without
    `prefix`. looks: as in `trained`."""
    per_seed = {setting.name: [] for setting in settings}
    for seed in range(own.seeds):
        weights = {setting.name: trained(own, setting.flags, seed, looks) for setting in settings}
        found = evaluated(own, weights, f"{name}_{seed}", prefix, per_prompt)
        for row in per_seed:
            per_seed[row].append(found[row])
    bases = {row: [found[row]] for row in found if row not in per_seed}
    return {row: over_seeds(each) for row, each in (bases | per_seed).items()}


def seconds_of(log):
    """The mean seconds of an update with its rollout."""
    return mean(line["seconds_rollout"] + line["seconds_update"] for line in log)


# ------------------------------------------------------------------------------------------ mean and spread
class Spread(NamedTuple):
    """A number over n seeds: the mean, and the standard deviation between the seeds (None for one seed)."""
    mean: float
    std: float | None
    n: int


def spread(values):
    """The `Spread` of a list of numbers without its Nones; None if nothing is left."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None, len(values))


def over_seeds(rows):
    """[{column: number}], one for each seed -> {column: `Spread`}."""
    return {column: spread([row.get(column) for row in rows]) for column in rows[0]}


def first(lines, wanted):
    """The first line of a log for which wanted(line) is true; None if there is none."""
    return next((line for line in lines if wanted(line)), None)


def first_step(log, column, reached):
    """The first update at which reached(watched mean of the column) is true; None if there is none."""
    found = first(log, lambda line: "watch" in line and reached(line["watch"][column]))
    return found and found["step"]


def breaks(log):
    """The first update at which more than BROKEN of the watched pictures are broken; None if there is none."""
    return first_step(log, "broken", lambda value: value > BROKEN)


def first_warning(log):
    """The first update at which the drift warning fired; None if it never did."""
    found = first(log, lambda line: line.get("hacking"))
    return found and found["step"]


def at_equal(log, column, climbed, value):
    """The watched mean of `column` at the point where that of `climbed` first reaches `value`, interpolated between two
    looks. None if it never does."""
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
    """A `Spread` as text, mean ± standard deviation between the seeds, in a format such as ".1%"; "-" for None."""
    if value is None:
        return "-"
    text = format(value.mean, form)
    if value.std is not None:
        text += f" ± {format(value.std, form.lstrip('+'))}"
    return text.replace("%", "") + (" %" if "%" in text else "")


def table(rows, columns):
    """A Markdown table of rows {row: {column: `Spread`}}. columns: {column: (title, format)}."""
    lines = ["| | " + " | ".join(title for title, _ in columns.values()) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [shown(row.get(column), form) for column, (_, form) in columns.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(own, name, title, told, tables, figure, **more):
    """Write NAME.md, NAME.json and NAME.png into --results, and print the Markdown.

    NAME.md has the title, the command, the text `told`, which explains the numbers, and the tables. NAME.json has the
    tables and `more`. NAME.png is the matplotlib figure. tables: a list of ({row: {column: `Spread`}}, {column: (title,
    format)}).
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
    """Draw a column of rows {row: {column: `Spread`}} on an axis: a bar for each row, with the standard deviation."""
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
    """Draw {row: [(update, number)]} on an axis as curves over the updates. scale: a factor for the numbers."""
    for place, (name, points) in enumerate(rows.items()):
        again, colour = divmod(place, len(COLOURS))
        axis.plot([step for step, _ in points], [scale * value for _, value in points], label=name,
                  color=COLOURS[colour], linestyle="dashed" if again else "solid")
    axis.set_xlabel("updates")
    axis.set_title(title, fontsize=10)


def what_n_is(own, pictures=None):
    """The note below a figure of bars: numbers of pictures and seeds. pictures: None for --pictures."""
    return (f"{pictures or own.pictures} pictures a seed, {own.seeds} seeds; lines on the bars: standard "
            "deviation between the seeds")


def bar_figure(rows, columns, note):
    """A figure of `bars`, with a panel for each column, and a note below."""
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
    """A figure of the watched means over the updates, with a panel for each column, a line for each of {row: log}, and
    a note below."""
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
    """[(update, mean over the watched pictures)] of a run, without looks that have no such number."""
    looks = [(line["step"], line["watch"][column]) for line in log if "watch" in line]
    return [(step, value) for step, value in looks if value is not None]


def as_json(rows):
    """{row: {column: `Spread`}} with dicts in place of `Spread`s, for a JSON file."""
    return {name: {column: value and value._asdict() for column, value in row.items()}
            for name, row in rows.items()}
