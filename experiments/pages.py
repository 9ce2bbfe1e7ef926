"""Pages of results: numbers over seeds and pictures, tables, figures, and the comparison with the published page.

± is a standard error from both sources, sqrt(a^2 / seeds + b^2 / prompts). a is the standard deviation between the
seeds' means. b is that between the prompts, of each prompt's mean over the seeds. What seeds and prompts do not share
is in both terms, so ± is a little too wide. A number that no single picture has, such as a Frechet distance or an
update, has the first term only.
"""

import io
import math
import shlex
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib
from matplotlib import pyplot

from engine.errors import UserError
from engine.files import read_json, write_json, write_whole

matplotlib.use("Agg")
RESULTS = Path(__file__).resolve().parent / "results"
# Colours that people with any kind of colour vision can tell apart (Okabe and Ito).
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999"]
# How a column is drawn: its title with its unit, and the factor to that unit.
DRAWN = {"realism": ("realism, %", 100), "alignment": ("alignment, %", 100), "broken": ("broken, %", 100),
         "painting": ("paintings, %", 100), "redness": ("redness, R - (G + B)/2", 1),
         "saturation": ("saturation (HSV)", 1), "brightness": ("brightness (mean luma)", 1),
         "seconds": ("seconds", 1), "reserved": ("reserved, GiB", 1), "planned": ("planned, GiB", 1),
         "texture": ("texture (luma - its 3 x 3 mean)", 1), "frechet": ("Frechet distance to true photos", 1)}
ERROR = "± is the standard error over seeds and prompts (experiments/pages.py)."
ERROR_OF_SEEDS = "± is the standard error over the seeds."


# -------------------------------------------------------------------------------------------------- numbers
class Spread(NamedTuple):
    """A number over seeds: its mean, its standard error (or None), the number of seeds, and the pictures of each seed.
    The last is None for a number that no single picture has."""
    mean: float
    error: float | None
    seeds: int
    pictures: int | None = None


def spread(values):
    """The `Spread` of a list of numbers, one for each seed, without its Nones; None if nothing is left."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Spread(mean(values), error, len(values))


def over_seeds(rows):
    """[{column: number}], one for each seed -> {column: `Spread`}."""
    return {column: spread([row.get(column) for row in rows]) for column in rows[0]}


def of_pictures(seeds):
    """The `Spread` of a score of pictures. seeds: for each seed {prompt: [score of each of its pictures]}, with the
    same prompts. None if there are no scores."""
    if not seeds or not seeds[0]:
        return None
    means = [{prompt: mean(scores) for prompt, scores in seed.items()} for seed in seeds]
    of_seeds = [mean(each.values()) for each in means]
    of_prompts = [mean(each[prompt] for each in means) for prompt in means[0]]
    variance = 0.0
    if len(of_seeds) > 1:
        variance += stdev(of_seeds) ** 2 / len(of_seeds)
    if len(of_prompts) > 1:
        variance += stdev(of_prompts) ** 2 / len(of_prompts)
    return Spread(mean(of_seeds), math.sqrt(variance), len(seeds), sum(map(len, seeds[0].values())))


class Scored(NamedTuple):
    """The scores of one row's pictures, of one seed."""
    pictures: dict  # {column: {prompt: [a score for each picture]}}
    sets: dict      # {column: number} of columns that no single picture has


def scored(lines, overall):
    """{row: `Scored`} from evaluate.py's pictures.jsonl and the `overall` means {row: {column: number}} of its
    results.json."""
    found = {row: {} for row in overall}
    for line in lines:
        for column, value in line.items():
            if column not in ("row", "picture", "prompt", "category") and value is not None:
                of_column = found[line["row"]].setdefault(column, {})
                of_column.setdefault(line["prompt"], []).append(value)
    return {row: Scored(found[row], {column: value for column, value in values.items() if column not in found[row]})
            for row, values in overall.items()}


def pooled(seeds):
    """{column: `Spread`} of a row. seeds: its `Scored`, one for each seed."""
    row = {column: of_pictures([seed.pictures[column] for seed in seeds]) for column in seeds[0].pictures}
    return row | over_seeds([seed.sets for seed in seeds])


def paired(ours, theirs):
    """{column: `Spread`} of the differences of two rows, picture by picture, seed by seed. ours, theirs: their
    `Scored`, one for each seed. A row of one seed, such as the base, is compared with every seed of the other."""
    n = max(len(ours), len(theirs)) if 1 in (len(ours), len(theirs)) else min(len(ours), len(theirs))
    pairs = [(ours[i % len(ours)], theirs[i % len(theirs)]) for i in range(n)]
    row = {}
    for column in ours[0].pictures:
        seeds = []
        for a, b in pairs:
            one, other = a.pictures[column], b.pictures[column]
            seeds.append({prompt: [x - y for x, y in zip(one[prompt], other[prompt], strict=True)] for prompt in one})
        row[column] = of_pictures(seeds)
    return row


# --------------------------------------------------------------------------------------------------- tables
def shown(value, form):
    """A `Spread` as text, mean ± standard error, in a format such as ".1%"; "-" for None; a text as it is."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    text = format(value.mean, form)
    if value.error is not None:
        text += f" ± {format(value.error, form.lstrip('+'))}"
    return text.replace("%", "") + (" %" if "%" in text else "")


def table(rows, columns):
    """A Markdown table of rows {row: {column: `Spread`}}. columns: {column: (title, format)}."""
    lines = ["| | " + " | ".join(title for title, _ in columns.values()) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [shown(row.get(column), form) for column, (_, form) in columns.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counted(rows):
    """What the numbers of rows {row: {column: `Spread`}} rest on, in words: pictures and seeds. The base has no
    seeds."""
    pictures = defaultdict(list)
    seeds = defaultdict(list)
    for name, row in rows.items():
        numbers = {column: value for column, value in row.items() if isinstance(value, Spread)}
        of_pictures = {column: value for column, value in numbers.items() if value.pictures is not None}
        for column, value in of_pictures.items():
            pictures[value.pictures].append(column)
        for value in (of_pictures or numbers).values():
            if not name.startswith("base"):
                seeds[value.seeds].append(name)
    parts = []
    if pictures:
        usual, *others = sorted(pictures, key=lambda n: len(pictures[n]), reverse=True)
        parts.append(f"{usual} pictures of held-out prompts for each row and seed")
        parts += [f"{n} for {', '.join(dict.fromkeys(pictures[n]))}" for n in others]
    if seeds:
        usual, *others = sorted(seeds, key=lambda n: len(set(seeds[n])), reverse=True)
        parts.append(f"{usual} seed{'s' * (usual > 1)}")
        parts += [f"{n} seed{'s' * (n > 1)} for {', '.join(dict.fromkeys(seeds[n]))}" for n in others]
    return "; ".join(parts) + "."


def verdict(holds, sentence):
    """The first sentence of a page after its claim."""
    return f"{'Reproduced' if holds else 'Not reproduced'} here: {sentence}"


class Page(NamedTuple):
    """What a page says."""
    title: str
    claim: str    # of the paper or of users, one sentence
    verdict: str  # one sentence
    told: str     # what the numbers are
    tables: list  # of ({row: {column: `Spread`}}, {column: (title, format)})


def write(own, name, page, figure, quiet=False, **more):
    """Write NAME.md, NAME.json and NAME.png, and print the page, unless quiet. They go to pages/ of --home, with
    --publish to experiments/results. NAME.json has the tables and `more`. Without --publish it is also said which
    numbers of the published page they agree with."""
    folder = RESULTS if own.publish else Path(own.home) / "pages"
    folder.mkdir(parents=True, exist_ok=True)
    save(figure, folder / f"{name}.png", bbox_inches="tight")
    tables = [table(rows, columns) for rows, columns in page.tables]
    text = "\n\n".join([f"# {page.title}", f"**Claim.** {page.claim}", f"**Result.** {page.verdict}",
                        f"```\n{command(own, name)}\n```", page.told, *tables, f"![{page.title}]({name}.png)"]) + "\n"
    write_whole(folder / f"{name}.md", text)
    write_json(folder / f"{name}.json", {"tables": [as_json(rows) for rows, _ in page.tables], **more})
    if quiet:
        return
    print(text)
    if not own.publish:
        print(f"{folder / name}.md; --publish writes experiments/results/{name}.md")
        print(agreement(RESULTS / f"{name}.json", page.tables))


def save(figure, path, **more):
    """Write a figure as a PNG, and close it. more: for savefig."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, **more)
    pyplot.close(figure)
    write_whole(path, png.getvalue())


def command(own, name):
    """The command line that makes a page, with every flag that is not the default."""
    words = ["python", "-m", f"experiments.{name}"]
    if "seeds" in own.defaults:
        words += ["--seeds", str(own.seeds)]
    for flag, default in own.defaults.items():
        value = getattr(own, flag)
        if value != default and flag not in ("seeds", "home", "publish"):
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}"] + ([] if value is True else [str(each) for each in values])
    return shlex.join(words)


def agreement(published, tables):
    """How many numbers of the tables agree with the published JSON, within two standard errors of their difference, and
    which do not."""
    if not published.exists():
        return "There is no published page."
    known = {}
    for rows in read_json(published)["tables"]:
        for row, cells in rows.items():
            known |= {(row, column): Spread(**cell) for column, cell in cells.items() if isinstance(cell, dict)}
    agree = 0
    others = []
    for rows, columns in tables:
        for row, cells in rows.items():
            for column, (title, form) in columns.items():
                now, then = cells.get(column), known.get((row, column))
                if not isinstance(now, Spread) or then is None:
                    continue
                if abs(now.mean - then.mean) <= 2 * math.hypot(now.error or 0, then.error or 0) + 1e-12:
                    agree += 1
                else:
                    others.append(f"{row}, {title}: {shown(now, form)}; published {shown(then, form)}")
    said = f"Of {agree + len(others)} numbers that the published page has too, {agree} agree within 2 standard errors."
    return "\n".join([said, *others])


def must_be_publishable(own):
    """Raises UserError for --publish with flags that change what is measured."""
    for flag, default in own.defaults.items():
        value = getattr(own, flag)
        if own.publish and value != default and flag not in ("seeds", "home", "publish"):
            raise UserError(f"--publish --{flag} {value}: a published page has the default --{flag}; leave out one")


# -------------------------------------------------------------------------------------------------- figures
def ends_of(value, scale):
    """How far the error bar of a `Spread` goes down and up, in drawn units. A share, drawn in %, stays in 0 to 100."""
    size = scale * (value.error or 0)
    if scale != 100:
        return [[size], [size]]
    at = scale * value.mean
    return [[min(size, at)], [min(size, 100 - at)]]


def bars(axis, rows, column, title, scale=1):
    """Draw a column of rows {row: {column: `Spread`}} on an axis: a bar for each row, with its standard error."""
    for place, row in enumerate(rows.values()):
        value = row.get(column)
        if value is not None:
            axis.barh(place, scale * value.mean, xerr=ends_of(value, scale), color=COLOURS[place % len(COLOURS)])
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_title(title, fontsize=10)


def has_bars(rows, column):
    """Whether any row has a number in a column that is not 0."""
    return any(row.get(column) is not None and row[column].mean != 0 for row in rows.values())


def bar_figure(rows, columns):
    """A figure of `bars`, with a panel for each column, and a note below of what the numbers rest on. A column that is
    0 in every row has no panel; the note says so."""
    drawn = [column for column in columns if has_bars(rows, column)] or list(columns[:1])
    size = (3.3 + 3.2 * len(drawn), 1.2 + 0.27 * len(rows))
    figure, axes = pyplot.subplots(1, len(drawn), figsize=size, layout="constrained", squeeze=False)
    for axis, column in zip(axes[0], drawn, strict=True):
        title, scale = DRAWN[column]
        bars(axis, rows, column, title, scale)
    for axis in axes[0, 1:]:
        axis.set_yticklabels([])
    figure.supxlabel(note(rows, columns), fontsize=8)
    return figure


def note(rows, columns):
    """The note below a figure of bars: what they rest on, and which columns have no panel."""
    inside = {name: {column: row.get(column) for column in columns} for name, row in rows.items()}
    zero = [f"{column} is 0 in every row" for column in columns if not has_bars(rows, column)]
    return "; ".join([counted(inside).rstrip("."), "lines on the bars: standard error", *zero])


def lines(axis, rows, title, scale=1):
    """Draw {row: [(update, number)]} on an axis as curves over the updates. scale: a factor for the numbers."""
    for place, (name, points) in enumerate(rows.items()):
        again, colour = divmod(place, len(COLOURS))
        axis.plot([step for step, _ in points], [scale * value for _, value in points], label=name,
                  color=COLOURS[colour], linestyle="dashed" if again else "solid")
    axis.set_xlabel("updates")
    axis.set_title(title, fontsize=10)


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
    return {name: {column: value._asdict() if isinstance(value, Spread) else value for column, value in row.items()}
            for name, row in rows.items()}
