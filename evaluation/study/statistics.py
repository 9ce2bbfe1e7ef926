"""From ratings to numbers: excellent rates with their standard errors, and the agreement of the raters."""

from collections import Counter, defaultdict
from itertools import combinations
from typing import NamedTuple

from evaluation.study.votes import EXCELLENT, LEVELS

# The table's columns. The paper's three come first, in its order.
COLUMNS = {"realism": "Real", "aesthetics": "Aesth", "overall": "Overall", "detail": "Detail",
           "alignment": "Alignment"}


class Rate(NamedTuple):
    """How n ratings are distributed over the levels."""
    n: int
    counts: list      # ratings of each level, Excellent first
    excellent: float  # the share of Excellent; None without ratings
    se: float         # its standard error; None without ratings, or if all are of one prompt


class Agreement(NamedTuple):
    """How far the raters agree in one dimension."""
    pictures: int  # pictures with two or more ratings
    pairs: int     # pairs of ratings of one picture
    same: float    # the share of pairs on the same level; None without pairs
    alpha: float   # Krippendorff's alpha; None without pairs, or if all ratings are on one level


def rate(ratings):
    """The `Rate` of a list of `Rating`.

    All raters of a prompt see the same pictures, so their ratings are not independent. The standard error therefore
    takes each of the G prompts as one cluster: sqrt(G / (G - 1) sum_g (excellent_g - p n_g)^2) / n.
    """
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
    """{method: {dimension: Rate}} of a list of `Rating`."""
    groups = defaultdict(list)
    for rating in ratings:
        groups[rating.method, rating.dimension].append(rating)
    return {method: {dimension: rate(groups[method, dimension]) for dimension in COLUMNS}
            for method in methods}


def alpha(units):
    """Krippendorff's alpha for ordered values. units: a list, for each rated thing, of the values that it was given.
    1 is perfect agreement, 0 is chance. None if there are no pairs, or only one value occurs."""
    units = [unit for unit in units if len(unit) > 1]
    n_of = Counter(value for unit in units for value in unit)
    n = sum(n_of.values())
    order = sorted(n_of)

    def distance(a, b):
        """The squared distance of two levels: the number of values between them, where values at the two levels count
        half."""
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
    """{dimension: Agreement} of a list of `Rating`."""
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
