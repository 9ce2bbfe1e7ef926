"""From scores to tables: means with standard errors, paired differences, and the rows of the paper's Table 1. How they
are written: table_formats.py."""

import json
import math

import torch

# Table 1 of the paper: HPDv2 benchmark, FLUX.1-dev, columns in the paper's order. sgp_hps_shown is SGP-HPS as the
# authors display it. real, aesth and overall come from their human study: the percentage of excellent pictures.
PAPER = {
    "FLUX": {
        "aesthetic": 5.867, "pickscore": 22.671, "imagereward": 1.115, "hps": 0.289, "sgp_hps_shown": 0.463,
        "geneval": 0.678, "deqa": 4.292, "real": 8.2, "aesth": 9.8, "overall": 5.3},
    "ReFL": {
        "aesthetic": 5.903, "pickscore": 22.975, "imagereward": 1.195, "hps": 0.298, "sgp_hps_shown": 0.470,
        "geneval": 0.656, "deqa": 4.299, "real": 5.5, "aesth": 6.6, "overall": 3.1},
    "DRaFT-LV": {
        "aesthetic": 5.729, "pickscore": 22.932, "imagereward": 1.178, "hps": 0.296, "sgp_hps_shown": 0.458,
        "geneval": 0.636, "deqa": 4.236, "real": 8.3, "aesth": 9.7, "overall": 4.7},
    "DanceGRPO": {
        "aesthetic": 6.022, "pickscore": 22.803, "imagereward": 1.218, "hps": 0.297, "sgp_hps_shown": 0.414,
        "geneval": 0.585, "deqa": 4.353, "real": 5.3, "aesth": 8.5, "overall": 3.7},
    "Direct-Align": {
        "aesthetic": 6.032, "pickscore": 23.030, "imagereward": 1.223, "hps": 0.294, "sgp_hps_shown": 0.448,
        "geneval": 0.668, "deqa": 4.373, "real": 5.9, "aesth": 8.7, "overall": 3.9},
    "SRPO": {
        "aesthetic": 6.194, "pickscore": 23.040, "imagereward": 1.118, "hps": 0.289, "sgp_hps_shown": 0.505,
        "geneval": 0.665, "deqa": 4.275, "real": 38.9, "aesth": 40.5, "overall": 29.4}}
ORDER = list(PAPER["SRPO"])


def in_order(columns_of):
    """{metric: its {column: Column}} -> {column: Column} of all, in the table's order. The metrics of Table 1 come
    first, in its order; then the others, in the given order. The columns of a metric stay together."""
    def place(metric):
        places = [ORDER.index(column) for column in columns_of[metric] if column in ORDER]
        return min(places, default=len(ORDER))

    ordered = {}
    for metric in sorted(columns_of, key=place):
        ordered |= columns_of[metric]
    return ordered


# ------------------------------------------------------------------------------------------------ the numbers
def mean(values, groups=None):
    """{"mean", "se", "n"} of values [P]. Values that are not finite are left out; None if none is left.

    groups: P names. With them, the mean is the mean of the groups' means, as GenEval defines its overall score. For
    groups of equal size, such as HPDv2's four, that is the plain mean. se is the standard error of the mean over
    pictures; None if a group has only one picture.
    """
    groups = groups or [""] * len(values)
    parts = []
    for name in dict.fromkeys(groups):
        part = values[torch.tensor([group == name for group in groups])]
        part = part[part.isfinite()].double()
        if len(part):
            parts.append(part)
    if not parts:
        return None
    se = None
    if all(len(part) > 1 for part in parts):
        se = (sum(part.var() / len(part) for part in parts) ** 0.5 / len(parts)).item()
    return {"mean": (sum(part.mean() for part in parts) / len(parts)).item(), "se": se,
            "n": sum(len(part) for part in parts)}


def summary(scores, groups=None):
    """{column: `mean`} of {column: values [P]}. groups: {column: P names}, for the columns that have groups."""
    groups = groups or {}
    return {column: mean(values, groups.get(column)) for column, values in scores.items()}


def spread(rows):
    """{column: {"mean", "se", "n"}} over the rows of several runs, one for each seed. Here "se" is the standard
    deviation between the runs."""
    told = {}
    for column in rows[0]:
        if all(row[column] for row in rows):
            means = torch.tensor([row[column]["mean"] for row in rows])
            told[column] = {"mean": means.mean().item(), "se": means.std().item(), "n": len(means)}
    return told


def results(names, pictures_of, categories, scores):
    """{row: {"overall", "categories", "difference"}}: the row's means, its means within each category, and the means of
    its paired differences to the first row. Each is {column: `mean` or None}.

    names: the rows. pictures_of: {column: its P pictures}; a metric may have its own pictures. categories: the names
    of all categories. scores: {row: {picture's name: {column: value}}}.
    """
    groups = {column: [p.category for p in pictures] for column, pictures in pictures_of.items()}
    values = {}  # {row: {column: [P], NaN where there is no score}}
    for name in names:
        values[name] = {}
        for column, pictures in pictures_of.items():
            found = [scores[name].get(p.name, {}).get(column, float("nan")) for p in pictures]
            values[name][column] = torch.tensor(found)

    def within(category, row):
        """{column: values} of the pictures of one category, from {column: values [P]}."""
        inside = {}
        for column, of_all in row.items():
            rows = [i for i, group in enumerate(groups[column]) if group == category]
            inside[column] = of_all[rows]
        return inside

    first = values[names[0]]
    told = {}
    for name, row in values.items():
        difference = {column: row[column] - first[column] for column in row}
        told[name] = {"overall": summary(row, groups),
                      "categories": {category: summary(within(category, row)) for category in categories},
                      "difference": summary(difference, groups)}
    return told


def per_picture(pictures, scores):
    """A line of JSON for each picture of each row: its row, name, prompt, category and scores; null for what is not
    finite. pictures: a list of `Picture`. scores: as in `results`."""
    lines = []
    for row, found in scores.items():
        for picture in pictures:
            if picture.name in found:
                values = {column: value if math.isfinite(value) else None
                          for column, value in found[picture.name].items()}
                lines.append(json.dumps({"row": row, "picture": picture.name, "prompt": picture.prompt,
                                         "category": picture.category, **values}) + "\n")
    return "".join(lines)
