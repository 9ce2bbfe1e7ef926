"""Ratings to numbers: excellent rates with their standard errors, and how far the raters agree."""

from collections import Counter, defaultdict
from itertools import combinations
from typing import NamedTuple

from evaluation.study.votes import EXCELLENT, LEVELS

# The table's columns: first the paper's three, in its order.
COLUMNS = {"realism": "Real", "aesthetics": "Aesth", "overall": "Overall", "detail": "Detail",
           "alignment": "Alignment"}


class Rate(NamedTuple):
    """Of n ratings: how many of each level, the share of Excellent and its standard error (None: no ratings,
    or one prompt only)."""
    n: int
    counts: list
    excellent: float
    se: float


class Agreement(NamedTuple):
    """How many pictures two or more rated, pairs of ratings of one picture, the share of the pairs on one
    level, and Krippendorff's alpha (None: no pairs, or all on one level)."""
    pictures: int
    pairs: int
    same: float
    alpha: float


def rate(ratings):
    """The `Rate` of ratings. Raters of one prompt see the same pictures, so ratings are not independent: the
    standard error takes prompts as clusters, sqrt(G / (G - 1) sum_g (excellent_g - p n_g)^2) / n over G
    prompts."""
    n = len(ratings)
    counts = [0] * len(LEVELS)
    for rating in ratings:
        counts[rating.level] += 1
    if not n:
        return Rate(0, counts, None, None)
    p = counts[EXCELLENT] / n
    residual = defaultdict(float)
    for rating in ratings:
        residual[rating.prompt] += (rating.level == EXCELLENT) - p
    G = len(residual)
    se = None
    if G > 1:
        se = (G / (G - 1) * sum(x * x for x in residual.values())) ** 0.5 / n
    return Rate(n, counts, p, se)


def rates(ratings, methods):
    """{method: {dimension: Rate}}."""
    groups = defaultdict(list)
    for rating in ratings:
        groups[rating.method, rating.dimension].append(rating)
    return {method: {dimension: rate(groups[method, dimension]) for dimension in COLUMNS}
            for method in methods}


def alpha(units):
    """Krippendorff's alpha for ordered values: `units` are lists of the values that one thing was given. 1 is
    perfect agreement, 0 is chance; None if there is nothing to tell apart."""
    units = [unit for unit in units if len(unit) > 1]
    n_of = Counter(value for unit in units for value in unit)
    n = sum(n_of.values())
    order = sorted(n_of)

    def distance(a, b):
        """Two levels are as far apart as there are values between them, the two themselves by half."""
        low, high = sorted((a, b))
        between = sum(n_of[value] for value in order if low <= value <= high)
        return (between - (n_of[a] + n_of[b]) / 2) ** 2

    observed = 0
    for unit in units:
        for a, b in combinations(unit, 2):
            observed += 2 * distance(a, b) / (len(unit) - 1)
    expected = sum(n_of[a] * n_of[b] * distance(a, b) for a in order for b in order)
    return 1 - (n - 1) * observed / expected if expected else None


def agreement(ratings):
    """{dimension: Agreement}."""
    units = defaultdict(lambda: defaultdict(list))
    for rating in ratings:
        units[rating.dimension][rating.picture].append(rating.level)
    found = {}
    for dimension in COLUMNS:
        shared = [levels for levels in units[dimension].values() if len(levels) > 1]
        same = [a == b for levels in shared for a, b in combinations(levels, 2)]
        share = sum(same) / len(same) if same else None
        found[dimension] = Agreement(len(shared), len(same), share, alpha(shared))
    return found
