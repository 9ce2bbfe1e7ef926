"""Tables of numbers as text: Markdown, CSV and LaTeX. A line is a metric, a column is a model, so that a table of many
metrics is no wider than one of few."""

import csv
import io
import re
import shutil
import sys
from typing import NamedTuple

from engine.errors import printable
from engine.files import write_whole
from evaluation.tables import ORDER, PAPER, spread

MEANING = "Mean ± standard error over pictures; differences are paired, picture by picture."


class Line(NamedTuple):
    """A metric's line of a `Table`."""
    title: str
    cells: list  # texts, one for each column
    values: list  # the same as `tables.mean`s: {"mean", "se", "n"}, or None

    @property
    def n(self):
        """The number of pictures behind the cells, as text: "256", or "256/250" if the columns differ."""
        return "/".join(dict.fromkeys(str(value["n"]) for value in self.values if value and value.get("n")))


class Table(NamedTuple):
    """A table with a line for each metric."""
    title: str    # "" if it needs none
    columns: list  # the names of the columns
    lines: list   # of `Line`
    settings: str = ""  # how its pictures were made


# ---------------------------------------------------------------------------------------------- made of numbers
def table(rows, columns, differences=None, title="", settings=""):
    """The `Table` of {name of a column: {metric: `tables.mean`}}, then of differences, likewise.

    columns: {metric: `Column`}, the metrics to show, in this order.
    """
    differences = differences or {}
    lines = []
    for metric, column in columns.items():
        values = [row.get(metric) for row in rows.values()]
        changes = [row.get(metric) for row in differences.values()]
        cells = [cell(column, value) for value in values] + [cell(column, value, True) for value in changes]
        lines.append(Line(column.title, cells, values + changes))
    return Table(title, [*rows, *differences], lines, settings)


def of_the_paper(columns):
    """The `Table` with the paper's numbers of those of the metrics {metric: `Column`} that are in its Table 1; None if
    none is."""
    lines = []
    for metric, column in columns.items():
        if metric in ORDER:
            values = [{"mean": row[metric], "se": None, "n": None} for row in PAPER.values()]
            lines.append(Line(column.title, [f"{value['mean']:.3f}" for value in values], values))
    return Table("Table 1 of the paper", list(PAPER), lines) if lines else None


def tables_of(found, columns, settings=""):
    """[`Table`] of a `tables.results`: all pictures, with the paired differences to the first row; each category; the
    paper's Table 1. columns: {metric: `Column`}, those to show."""
    first, *others = found
    rows = {name: row["overall"] for name, row in found.items()}
    seeds_of_one_run = len({re.sub(r"seed\d+", "", name) for name in others}) == 1
    if len(others) > 1 and seeds_of_one_run:
        rows[f"mean of {len(others)}, ± spread"] = spread([rows[name] for name in others])
    differences = {f"{name} - {first}": found[name]["difference"] for name in others}
    made = [table(rows, columns, differences, settings=settings)]
    categories = found[first]["categories"]
    if len(categories) > 1:
        for category in categories:
            rows = {name: row["categories"][category] for name, row in found.items()}
            shown = {k: column for k, column in columns.items() if any(row.get(k) for row in rows.values())}
            if shown:
                made.append(table(rows, shown, title=printable(category)))
    paper = of_the_paper(columns)
    return [*made, paper] if paper else made


def cell(column, value, difference=False):
    """One cell as text: mean ± se in the format of a `Column`, with a percent sign last; "-" for None. Without a
    standard error it is the mean alone."""
    if value is None:
        return "-"
    unsigned = column.format.lstrip("+")
    shown = format(value["mean"], "+" + unsigned if difference else column.format)
    if value["se"] is not None:
        shown += f" ± {format(value['se'], unsigned)}"
    return shown.replace("%", "") + " %" if "%" in shown else shown


# ----------------------------------------------------------------------------------------------------- as text
def safe(name):
    """A name, escaped: it cannot end a cell of the table, and it cannot control the terminal."""
    return printable(name).replace("|", r"\|")


def markdown(made, widest=None):
    """A `Table` in Markdown. widest: characters of a line; a wider table is cut into several, one below the other,
    each with its metrics."""
    columns = [made.columns]
    if widest:
        columns = in_parts(made, widest)
    parts = []
    for names in columns:
        of = [made.columns.index(name) for name in names]
        lines = [["", *map(safe, names), "n"], ["---"] * (len(names) + 2)]
        lines += [[safe(line.title), *(line.cells[i] for i in of), line.n] for line in made.lines]
        if not any(line.n for line in made.lines):
            lines = [line[:-1] for line in lines]
        width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        padded = [[word.ljust(w, "-" if word == "---" else " ") for word, w in zip(line, width, strict=True)]
                  for line in lines]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in padded))
    above = [f"{made.title}:"] if made.title else []
    below = [made.settings] if made.settings else []
    return "\n\n".join(above + parts + below)


def in_parts(made, widest):
    """The names of a `Table`'s columns, in lists. Each list has as many as fit into a line of `widest` characters, and
    at least one."""
    beside = max(len(safe(line.title)) for line in made.lines) + max(len(line.n) for line in made.lines) + 7
    parts = [[]]
    room = widest - beside
    for i, name in enumerate(made.columns):
        width = max(len(safe(name)), *(len(line.cells[i]) for line in made.lines)) + 3
        if parts[-1] and width > room:
            parts.append([])
            room = widest - beside
        parts[-1].append(name)
        room -= width
    return parts


def for_the_terminal(made):
    """[`Table`] as Markdown that fits the terminal; where the output is no terminal, as it is in a file."""
    widest = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return "\n\n".join(markdown(each, widest) for each in made)


def as_csv(made):
    """[`Table`] as one CSV file: a line is a metric, with its number, and the standard error after each number. Shares
    are from 0 to 1."""
    names = list(dict.fromkeys(name for each in made for name in each.columns))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "metric", "n", *(word for name in names for word in (name, f"{name} se"))])
    for each in made:
        for line in each.lines:
            values = dict(zip(each.columns, line.values, strict=True))
            numbers = [values.get(name) or {"mean": None, "se": None} for name in names]
            writer.writerow([each.title, line.title, line.n,
                             *(number for value in numbers for number in (value["mean"], value["se"]))])
    return text.getvalue()


SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
           **{sign: f"\\{sign}" for sign in "&%$#_{}"}}


def tex(text):
    """A text in LaTeX, with its special characters escaped."""
    return "".join(SPECIAL.get(character, character) for character in printable(text)).replace("±", r"$\pm$")


def tex_cell(text):
    """A cell of a `Table` in LaTeX: "-0.5 ± 0.1 %" becomes $-0.5 \\pm 0.1$\\,\\%."""
    if text == "-":
        return "--"
    number = text.removesuffix(" %").replace("±", r"\pm")
    return f"${number}$" + (r"\,\%" if text.endswith("%") else "")


def as_latex(made):
    """[`Table`] in LaTeX, each a tabular with the rules of the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    for each in made:
        lines = [f"% {comment}" for comment in (printable(each.title), printable(each.settings)) if comment]
        lines += [r"\begin{tabular}{l" + "r" * (len(each.columns) + 1) + "}", r"\toprule",
                  " & ".join(["", *map(tex, each.columns), "n"]) + r" \\", r"\midrule"]
        for line in each.lines:
            lines.append(" & ".join([tex(line.title), *map(tex_cell, line.cells), line.n]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def write(folder, made):
    """Write [`Table`] into a folder as table.csv and table.tex. Raises OSError."""
    write_whole(folder / "table.csv", as_csv(made))
    write_whole(folder / "table.tex", as_latex(made))
