"""Scores to tables: means with standard errors, paired differences, and the paper's Table 1 beside ours."""

import re

import torch

# column: (title, format, the number of Table 1's column or None), in Table 1's order. SGP-HPS twice: the gap
# f.(C1 - C2) itself, and as the authors show it, 100 (gap + 0.01) [their answer to a question about Table 1]
COLUMNS = {
    "aesthetic": ("Aes", ".3f", 0), "pickscore": ("Pick", ".3f", 1), "imagereward": ("ImageReward", ".3f", 2),
    "hps": ("HPS", ".4f", 3), "sgp_hps": ("SGP-HPS, raw", "+.4f", None),
    "sgp_hps_shown": ("SGP-HPS, authors' scale", ".3f", 4), "geneval": ("GenEval (HF detector)", ".3f", 5),
    "deqa": ("DeQA", ".3f", 6), "clip": ("CLIP", ".4f", None), "reward": ("reward", "+.3f", None),
    "sgp": ("sgp", "+.3f", None), "saturation": ("saturation", "+.3f", None),
    "redness": ("redness", "+.3f", None), "brightness": ("brightness", "+.3f", None),
    "texture": ("texture", "+.3f", None), "realism": ("realism", "%", None),
    "alignment": ("alignment", "%", None), "broken": ("broken", "%", None)}

TABLE_1 = {  # Aes, Pick, ImageReward, HPS, SGP-HPS as displayed, GenEval, DeQA: HPDv2 benchmark, FLUX.1-dev
    "FLUX": (5.867, 22.671, 1.115, 0.289, 0.463, 0.678, 4.292),
    "ReFL": (5.903, 22.975, 1.195, 0.298, 0.470, 0.656, 4.299),
    "DRaFT-LV": (5.729, 22.932, 1.178, 0.296, 0.458, 0.636, 4.236),
    "DanceGRPO": (6.022, 22.803, 1.218, 0.297, 0.414, 0.585, 4.353),
    "Direct-Align": (6.032, 23.030, 1.223, 0.294, 0.448, 0.668, 4.373),
    "SRPO": (6.194, 23.040, 1.118, 0.289, 0.505, 0.665, 4.275)}


def mean(values, groups=None):
    """{"mean", "se", "n"} of values [P], what is not finite left out; None if nothing is left.

    With groups (P names) it is the mean over the groups of each group's mean, as GenEval defines its overall
    score; where the groups are of one size, as HPDv2's four, that is the plain mean. se is the standard error
    of the mean over pictures, None where a group has but one.
    """
    groups = groups or [""] * len(values)
    parts = [values[torch.tensor([g == name for g in groups])] for name in dict.fromkeys(groups)]
    parts = [p[p.isfinite()].double() for p in parts]
    parts = [p for p in parts if len(p)]
    if not parts:
        return None
    alone = any(len(p) == 1 for p in parts)
    se = None if alone else (sum(p.var() / len(p) for p in parts) ** 0.5 / len(parts)).item()
    return {"mean": (sum(p.mean() for p in parts) / len(parts)).item(), "se": se, "n": sum(map(len, parts))}


def summary(scores, groups={}):
    """{column: `mean`} of {column: values [P]}, over `groups` {column: P names} where a column has some."""
    return {k: mean(v, groups.get(k)) for k, v in scores.items()}


def spread(rows):
    """The mean over runs (weights of several seeds) and, as its "se", the standard deviation between them."""
    over = {k: torch.tensor([row[k]["mean"] for row in rows]) for k in rows[0] if all(row[k] for row in rows)}
    return {k: {"mean": v.mean().item(), "se": v.std().item(), "n": len(v)} for k, v in over.items()}


def cell(column, value, difference=False):
    """One cell: mean ± se in the column's format; "-" where there is no value."""
    if value is None:
        return "-"
    form = COLUMNS.get(column, ("", "+.3f"))[1]
    unit, scale, form = (" %", 100, ".1f") if form == "%" else ("", 1, form)
    form, error = "+" + form.lstrip("+") if difference else form, form.lstrip("+")
    se = "-" if value["se"] is None else f"{scale * value['se']:{error}}"
    return f"{scale * value['mean']:{form}} ± {se}{unit}"


def table(rows, differences={}, columns=None, paper=True):
    """A Markdown table of {name: summary}, one line each, mean ± standard error; then the paired differences
    {name: summary}. Where one of the columns is in the paper's Table 1, its rows come first, if `paper`."""
    columns = columns or list(dict.fromkeys(k for row in rows.values() for k in row))
    place = {k: COLUMNS.get(k, (k, "+.3f", None)) for k in columns}
    lines = [[""] + [title for title, _, _ in place.values()], ["---"] * (len(columns) + 1)]
    if paper and any(at is not None for _, _, at in place.values()):
        number = lambda row, at: "-" if at is None else f"{row[at]:.3f}"
        lines += [[f"{name} [paper]"] + [number(row, at) for _, _, at in place.values()]
                  for name, row in TABLE_1.items()]
    for each, difference in ((rows, False), (differences, True)):
        lines += [[name] + [cell(k, row.get(k), difference) for k in columns] for name, row in each.items()]
    width = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    fill = lambda word, w: word.ljust(w, "-" if word == "---" else " ")
    return "\n".join("| " + " | ".join(map(fill, line, width)) + " |" for line in lines)


def results(methods, columns, pictures, scores):
    """{row: {"overall", "categories", "difference" to the first row}}, each {column: `mean` or None}.

    methods: the rows' names; columns: those that any metric gives; pictures: gallery.Picture, of the
    benchmark and of GenEval, whose categories are its tasks; scores {row: {picture name: {column: value}}}.
    """
    of = {k: [p for p in pictures if (p.entry is not None) == (k == "geneval")] for k in columns}
    groups = {k: [p.category for p in of[k]] for k in columns}
    values = {m: {k: torch.tensor([scores[m].get(p.name, {}).get(k, float("nan")) for p in of[k]])
                  for k in columns} for m in methods}

    def within(category, row):
        inside = {k: torch.tensor([g == category for g in groups[k]], dtype=torch.bool) for k in row}
        return {k: v[inside[k]] for k, v in row.items()}

    first, categories = values[methods[0]], list(dict.fromkeys(p.category for p in pictures))
    return {m: {"overall": summary(row, groups),
                "categories": {c: summary(within(c, row)) for c in categories},
                "difference": summary({k: v - first[k] for k, v in row.items()}, groups)}
            for m, row in values.items()}


def report(found, columns):
    """The tables as Markdown: overall with the paper's rows and the paired differences, then each
    category."""
    first, *others = found
    rows = {name: r["overall"] for name, r in found.items()}
    if len(others) > 1 and len({re.sub(r"seed\d+", "", name) for name in others}) == 1:
        rows[f"mean of {len(others)}, ± spread"] = spread([rows[name] for name in others])
    parts = ["Mean ± standard error over pictures; differences are paired, picture by picture.",
             table(rows, {f"{name} - {first}": found[name]["difference"] for name in others}, columns)]
    categories = list(found[first]["categories"])
    for c in categories if len(categories) > 1 else []:
        rows = {name: r["categories"][c] for name, r in found.items()}
        shown = [k for k in columns if any(row.get(k) for row in rows.values())]
        parts += [f"{c}:", table(rows, columns=shown, paper=False)] if shown else []
    return "\n\n".join(parts) + "\n"
