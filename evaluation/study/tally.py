"""From votes to Markdown tables: excellent rates in percent as in the paper's Table 1, and the raters' agreement.

    python -m evaluation.study tally votes/*.json --key study.key.json --bars bars.svg

--bars draws the shares of the four levels. Overall follows from the four dimensions. It is Fail if any is Fail,
Excellent if all are Excellent, Good if at least half are Excellent, otherwise Pass. Only pictures rated in all four
dimensions count for it. After ± stands the standard error; it takes the ratings of one prompt as one cluster, because
they are not independent. Alpha is Krippendorff's for ordered levels: 1 is perfect agreement, 0 is chance.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from engine.errors import printable
from engine.files import check_outputs
from evaluation.study.bars import MARK as BARS_MARK
from evaluation.study.bars import bars
from evaluation.study.files import check_inputs, write_together
from evaluation.study.statistics import COLUMNS, agreement, rates
from evaluation.study.votes import flatten, read_key, read_votes
from evaluation.tables import PAPER

JSON_MARK = b'{\n "study": "'  # the beginning of --json's file
IN_PAPER = {"realism": "real", "aesthetics": "aesth", "overall": "overall"}  # our columns: their keys in PAPER


class Results(NamedTuple):
    """All numbers that follow from the votes."""
    study: str
    annotators: dict  # {name: pictures rated}
    methods: dict     # {method: {dimension: Rate}}
    categories: dict  # {category: {method: {dimension: Rate}}}
    agreement: dict   # {dimension: Agreement}


def results_of(key, votes):
    """The `Results` of a `Key` and votes {annotator: {picture: {dimension: level's name}}}."""
    ratings = flatten(votes, key)
    groups = defaultdict(list)
    for rating in sorted(ratings, key=lambda rating: rating.category):
        groups[rating.category or "no category"].append(rating)
    categories = {category: rates(inside, key.methods) for category, inside in groups.items()}
    annotators = {name: len(cast) for name, cast in votes.items()}
    return Results(key.study, annotators, rates(ratings, key.methods), categories, agreement(ratings))


def as_json(value):
    """The value with every NamedTuple as a dict, so that the JSON file names its numbers."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    return value


# ---------------------------------------------------------------------------------------------------- tables
def line(cells):
    """A table's line. Characters that would break the table or control the terminal are escaped."""
    safe = [re.sub(r"([|<])", r"\\\1", printable(" ".join(cell.split()))) for cell in cells]
    return "| " + " | ".join(safe) + " |"


def markdown(head, rows):
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


def number(value, digits=1):
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share):
    return number(None if share is None else 100 * share)


def excellent(rate):
    """An excellent rate in percent, ± its standard error."""
    if rate.excellent is None:
        return "–"
    return f"{percent(rate.excellent)} ± {percent(rate.se)}"


def methods_table(methods):
    """A Markdown table: a row for every method, then the paper's rows."""
    rows = []
    for method, of in methods.items():
        rows.append([method, *(excellent(of[d]) for d in COLUMNS), str(of["overall"].n)])
    for method, of in PAPER.items():
        numbers = [str(of[IN_PAPER[d]]) if d in IN_PAPER else "" for d in COLUMNS]
        rows.append([f"{method} (paper)", *numbers, ""])
    return markdown(["", *COLUMNS.values(), "n"], rows)


def categories_table(categories, methods):
    rows = []
    for method in methods:
        rows.append([method, *(excellent(of[method]["overall"]) for of in categories.values())])
    return markdown(["", *categories], rows)


def agreement_table(found):
    rows = []
    for dimension, of in found.items():
        rows.append([COLUMNS[dimension], str(of.pictures), str(of.pairs), percent(of.same),
                     number(of.alpha, 3)])
    return markdown(["", "pictures with two or more", "pairs", "same level, %", "alpha (ordinal)"], rows)


def report(results):
    """The tables of `Results` as Markdown."""
    parts = ["Excellent rate, %, ± standard error by prompt; n: times a picture was rated in all dimensions",
             methods_table(results.methods)]
    if len(results.categories) > 1:
        parts += ["Excellent rate of Overall by category, %",
                  categories_table(results.categories, results.methods)]
    if any(of.pairs for of in results.agreement.values()):
        parts += ["Agreement of raters", agreement_table(results.agreement)]
    else:
        parts.append("Agreement of raters: no picture was rated by two raters.")
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------------- command
def tally(args):
    """Read the votes, write --bars and --json, and print the tables. Raises UserError and OSError."""
    inputs = [*args.votes, args.key]
    check_inputs(inputs)
    outputs = ((args.bars, BARS_MARK, "a chart of votes"), (args.json, JSON_MARK, "a file of a tally's numbers"))
    check_outputs([output for output in outputs if output[0] is not None], inputs, args.overwrite)
    key = read_key(args.key)
    votes = read_votes(args.votes, key)
    results = results_of(key, votes)
    contents = {}
    if args.bars is not None:
        contents[Path(args.bars)] = bars(results.methods)
    if args.json is not None:
        contents[Path(args.json)] = json.dumps(as_json(results), indent=1) + "\n"
    write_together(contents)
    raters = ", ".join(f"{name} ({n} pictures)" for name, n in results.annotators.items())
    print(printable(f"{len(votes)} rater{'s' * (len(votes) > 1)}: {raters}") + "\n")
    print(report(results))
