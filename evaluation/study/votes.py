"""Votes to tables (Markdown): excellent rates in percent as in the paper's Table 1, how far the raters agree,
and the four levels as bars.

    python -m evaluation.study tally votes/*.json --key study.key.json --bars bars.svg

Overall follows from the four dimensions: any Fail: Fail; all Excellent: Excellent; half of them Excellent:
Good; else Pass. It is counted for pictures rated in all four. After ± stands the standard error, the ratings
of one prompt taken as one cluster, for they are not independent. Alpha is Krippendorff's for ordered levels:
1 is perfect agreement, 0 is chance.
"""

import json
import os
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

LEVELS = ["Excellent", "Good", "Pass", "Fail"]
DIMENSIONS = {"alignment": "Text-image alignment", "realism": "Realism and artifacts",
              "detail": "Subject clarity and detail", "aesthetics": "Aesthetics"}
COLUMNS = {"realism": "Real", "aesthetics": "Aesth", "overall": "Overall", "detail": "Detail",
           "alignment": "Alignment"}
PAPER = {"FLUX": (8.2, 9.8, 5.3), "ReFL": (5.5, 6.6, 3.1), "DRaFT-LV": (8.3, 9.7, 4.7),
         "DanceGRPO": (5.3, 8.5, 3.7), "Direct-Align": (5.9, 8.7, 3.9), "SRPO": (38.9, 40.5, 29.4)}  # Table 1
COLORS = ["#0072B2", "#7CC4EE", "#F2D974", "#D55E00"]  # Okabe and Ito's: told apart by the colour-blind too


class Rating(NamedTuple):
    annotator: str
    picture: str
    method: str
    prompt: int
    category: str
    dimension: str
    level: int  # of LEVELS: 0 is Excellent


def read_json(path):
    """What a JSON file holds. ValueError with one line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON") from error


def may_write(path, overwrite, why=""):
    """ValueError if a file cannot go there, or lies there and must stay."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: a file cannot be written there")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already{why}; --overwrite replaces it")


def write(path, chunks):
    """Write text beside the file, then rename: the file is whole or as before."""
    part = Path(f"{path}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            for chunk in chunks:
                file.write(chunk)
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)

def read_key(path):
    """The key that `build` wrote."""
    key = read_json(path)
    try:
        known = [(of["method"] in key["methods"], key["prompts"][str(of["prompt"])]["category"])
                 for of in key["pictures"].values()]
        if not isinstance(key["study"], str) or not all(ok for ok, _ in known):
            raise KeyError
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a study's key; study.py writes it beside the page") from error
    return key


def read_votes(paths, key):
    """Files of raters -> {annotator: {picture: {dimension: level}}}; the same votes twice count once."""
    votes, origin = {}, {}
    for path in paths:
        data = read_json(path)
        if (not isinstance(data, dict) or not isinstance(data.get("study"), str)
                or not isinstance(data.get("annotator"), str) or not data["annotator"].strip()
                or not isinstance(data.get("votes"), dict)):
            raise ValueError(f"{path}: not a file of votes from the study's page")
        if data["study"] != key["study"]:
            raise ValueError(f"{path}: votes of another study, {data['study']}; the key is of {key['study']}")
        for picture, cells in data["votes"].items():
            if picture not in key["pictures"]:
                raise ValueError(f'{path}: votes for a picture that the study lacks, "{picture}"')
            if not isinstance(cells, dict):
                raise ValueError(f"{path}: {picture}: not {{dimension: level}}")
            for dimension, level in cells.items():
                if dimension not in DIMENSIONS or level not in LEVELS:
                    raise ValueError(f'{path}: {picture}: "{dimension}" rated "{level}"; dimensions are '
                                     f"{', '.join(DIMENSIONS)}, levels {', '.join(LEVELS)}")
        name, cast = data["annotator"].strip(), {p: c for p, c in data["votes"].items() if c}
        if votes.setdefault(name, cast) != cast:
            raise ValueError(f'"{name}" votes differently in {origin[name]} and {path}; keep the later file')
        origin.setdefault(name, path)
    if not any(votes.values()):
        raise ValueError("there are no votes in these files")
    return votes


def overall(levels):
    """The paper's rule on the levels (0 Excellent ... 3 Fail) of the four dimensions."""
    if max(levels) == 3:
        return 3
    excellent = levels.count(0)
    return 0 if excellent == len(levels) else 1 if 2 * excellent >= len(levels) else 2


def flatten(votes, key):
    """Votes -> [Rating, ...], overall among them where all four dimensions are rated."""
    ratings = []
    for annotator, pictures in votes.items():
        for picture, cells in pictures.items():
            of = key["pictures"][picture]
            levels = {d: LEVELS.index(level) for d, level in cells.items()}
            if len(levels) == len(DIMENSIONS):
                levels["overall"] = overall(list(levels.values()))
            category = key["prompts"][str(of["prompt"])]["category"]
            ratings += [Rating(annotator, picture, of["method"], of["prompt"], category, d, level)
                        for d, level in levels.items()]
    return ratings


def rate(ratings):
    """{"n", "counts" of the four levels, "excellent" rate, "se"}. The standard error of the rate p, with
    prompts as clusters: sqrt(G / (G - 1) sum_g (excellent_g - p n_g)^2) / n over G prompts; None for one."""
    counts, n = [sum(r.level == k for r in ratings) for k in range(len(LEVELS))], len(ratings)
    if not n:
        return {"n": 0, "counts": counts, "excellent": None, "se": None}
    p, residual = counts[0] / n, defaultdict(float)
    for r in ratings:
        residual[r.prompt] += (r.level == 0) - p
    G = len(residual)
    se = (G / (G - 1) * sum(x * x for x in residual.values())) ** 0.5 / n if G > 1 else None
    return {"n": n, "counts": counts, "excellent": p, "se": se}


def rates(ratings, methods):
    """{method: {dimension: rate}}."""
    groups = defaultdict(list)
    for r in ratings:
        groups[r.method, r.dimension].append(r)
    return {m: {d: rate(groups[m, d]) for d in COLUMNS} for m in methods}


def alpha(units):
    """Krippendorff's alpha for ordered values: `units` are lists of the values that one thing was given."""
    units = [u for u in units if len(u) > 1]
    n_of = Counter(value for u in units for value in u)
    n, order = sum(n_of.values()), sorted(n_of)

    def distance(a, b):
        a, b = sorted((a, b))
        return (sum(n_of[v] for v in order if a <= v <= b) - (n_of[a] + n_of[b]) / 2) ** 2

    observed = sum(2 * distance(a, b) / (len(u) - 1) for u in units for a, b in combinations(u, 2))
    expected = sum(n_of[a] * n_of[b] * distance(a, b) for a in order for b in order)
    return 1 - (n - 1) * observed / expected if expected else None


def agreement(ratings):
    """{dimension: {"pictures" that two or more rated, "pairs" of ratings of one picture, "same" share of
    the pairs on one level, "alpha"}}."""
    units = defaultdict(list)
    for r in ratings:
        units[r.dimension, r.picture].append(r.level)
    out = {}
    for d in COLUMNS:
        shared = [levels for (dimension, _), levels in units.items() if dimension == d and len(levels) > 1]
        pairs = [a == b for levels in shared for a, b in combinations(levels, 2)]
        out[d] = {"pictures": len(shared), "pairs": len(pairs),
                  "same": sum(pairs) / len(pairs) if pairs else None, "alpha": alpha(shared)}
    return out


def markdown(head, rows):
    """A table; what would break it is escaped."""
    safe = lambda cell: re.sub(r"([|<])", r"\\\1", " ".join(cell.split()))
    line = lambda cells: "| " + " | ".join(map(safe, cells)) + " |"
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


def percent(r):
    if r["excellent"] is None:
        return "–"
    return f"{100 * r['excellent']:.1f} ± " + ("–" if r["se"] is None else f"{100 * r['se']:.1f}")


def report(results):
    """The tables as Markdown."""
    rows = [[m, *(percent(r[d]) for d in COLUMNS), str(r["overall"]["n"])]
            for m, r in results["methods"].items()]
    rows += [[f"{m} (paper)", *map(str, numbers), "", "", ""] for m, numbers in PAPER.items()]
    parts = ["Excellent rate, %, ± standard error by prompt; n: times a picture was rated in all dimensions",
             markdown(["", *COLUMNS.values(), "n"], rows)]
    if len(results["categories"]) > 1:
        parts += ["Excellent rate of Overall by category, %", markdown(["", *results["categories"]], [
            [m, *(percent(of[m]["overall"]) for of in results["categories"].values())]
            for m in results["methods"]])]
    if any(a["pairs"] for a in results["agreement"].values()):
        show = lambda x, scale, digits: "–" if x is None else f"{scale * x:.{digits}f}"
        parts += ["Agreement of raters", markdown(
            ["", "pictures with two or more", "pairs", "same level, %", "alpha (ordinal)"],
            [[COLUMNS[d], str(a["pictures"]), str(a["pairs"]), show(a["same"], 100, 1),
              show(a["alpha"], 1, 3)] for d, a in results["agreement"].items()])]
    else:
        parts.append("Agreement of raters: no picture was rated by two.")
    return "\n\n".join(parts)


def bars(methods):
    """{method: {dimension: rate}} -> SVG: the shares of the four levels, one bar a method and dimension."""
    left, width, step = 190, 520, 26
    text = lambda x, y, s, more="": f'<text x="{x:.1f}" y="{y}" {more}>{escape(s)}</text>'
    parts = []
    for k, level in enumerate(LEVELS):
        parts += [f'<rect x="{left + 105 * k}" y="14" width="16" height="16" fill="{COLORS[k]}"/>',
                  text(left + 105 * k + 22, 27, level)]
    parts.append(text(left + width, 27, "% of ratings", 'text-anchor="end"'))
    y = 46
    for d, label in {"overall": "Overall", **DIMENSIONS}.items():
        parts.append(text(left, y + 14, label, 'font-weight="bold"'))
        y += 22
        for name, of in methods.items():
            short = name if len(name) <= 24 else name[:23] + "…"
            parts.append(text(left - 10, y + 15, short, 'text-anchor="end"'))
            counts, n, x = of[d]["counts"], of[d]["n"], left
            if not n:
                parts.append(text(left, y + 15, "no ratings", 'fill="#666"'))
            for k, count in enumerate(counts):
                w = width * count / n if n else 0
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="20" fill="{COLORS[k]}">'
                             f"<title>{escape(f'{name}: {LEVELS[k]} {count} of {n}')}</title></rect>")
                if w > 26:
                    ink = "#fff" if k == 0 else "#000"
                    parts.append(text(x + w / 2, y + 15, f"{100 * count / n:.0f}",
                                      f'text-anchor="middle" fill="{ink}"'))
                x += w
            y += step
        y += 14
    size = f'width="{left + width + 30}" height="{y}" viewBox="0 0 {left + width + 30} {y}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="14">\n'
            f'<title>Ratings, percent</title>\n<rect width="100%" height="100%" fill="#fff"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def tally(args):
    """Votes to tables, bars and numbers."""
    key = read_key(args.key)
    votes = read_votes(args.votes, key)
    ratings = flatten(votes, key)
    categories = sorted({r.category for r in ratings})
    results = {"study": key["study"], "annotators": {name: len(cast) for name, cast in votes.items()},
               "methods": rates(ratings, key["methods"]),
               "categories": {c or "no category": rates([r for r in ratings if r.category == c],
                                                        key["methods"]) for c in categories},
               "agreement": agreement(ratings)}
    outputs = [(args.bars, bars(results["methods"])), (args.json, json.dumps(results, indent=1) + "\n")]
    outputs = [(path, text) for path, text in outputs if path]
    for path, _ in outputs:
        may_write(path, args.overwrite)
    for path, text in outputs:
        write(path, [text])
    print(f"{len(votes)} rater{'s' * (len(votes) > 1)}: " + ", ".join(f"{name} ({n} pictures)"
                                               for name, n in results["annotators"].items()) + "\n")
    print(report(results))
