"""The cheap recipe, --recipe fast, against the released one: results, rollout steps, and the update at which each
breaks.

    python -m experiments.fast

Direct-Align recovers any clean image from known noise, so the rollout's image does not have to be good. One branch is
enough if the form has no common mode (Eq. 10; experiments/common_mode.py).
"""

import sys
from argparse import Namespace

import recipe
from engine.errors import frame
from experiments import margin, runs
from experiments.runs import Setting

FAST = "--recipe fast"
ONE_BRANCH = "--form srp --branches denoise"
ROLLOUTS = (1, 2, 4, 12, 25)
COLUMNS = {"realism": ("realism", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"),
           "frechet": ("Frechet", ".1f"), "redness": ("redness", "+.3f"), "sgp": ("SGP", "+.3f")}


def settings():
    """(`Setting`s of the two recipes, `Setting`s with one and both branches at every number of rollout steps)."""
    recipes = [Setting("released", ""), Setting("fast", FAST)]
    steps = []
    for n in ROLLOUTS:
        steps.append(Setting(f"both branches, {n} rollout steps", f"--rollout-steps {n}"))
        steps.append(Setting(f"one branch, {n} rollout steps", f"{ONE_BRANCH} --rollout-steps {n}"))
    return recipes, steps


def limits(own):
    """({row: {column: `Spread`}}, {row: log}) of runs that train until they break, with the columns of `margin`."""
    rate = recipe.flags(["--model", own.model]).lr
    long = f"--lr {rate:g} --steps {margin.UPDATES} --threshold off"
    rows = {}
    logs = {}
    for name, flags in (("released", long), ("fast", f"{FAST} {long}")):
        logs[name] = runs.watched(own, flags, 0, margin.PICTURES, margin.EVERY)
        rows[name] = runs.over_seeds([margin.numbers(logs[name])])
    return rows, logs


def main(argv=None):
    with frame("fast"):
        own = runs.parse(__doc__, sys.argv[1:] if argv is None else argv)
        recipes, steps = settings()
        one_seed = Namespace(**vars(own) | {"seeds": 1})
        found = runs.measured(own, recipes, "fast")
        rollouts = runs.measured(one_seed, steps, "rollout_steps")
        broken, logs = limits(own)
        figure = runs.curve_figure(logs, ("realism", "alignment", "broken"),
                                   f"{margin.PICTURES} pictures every {margin.EVERY} updates, seed 0")
        told = (f"The first table has the recipes: {own.pictures} held-out prompts, {own.seeds} seeds, mean ± standard "
                "deviation between them. The second has the rollout's steps, for the same prompts and seed 0. The "
                f"third has a run of {margin.UPDATES} updates, for the selection prompts and seed 0: the first look "
                f"at which {margin.GOAL:.0%} are photos, and when the pictures break.")
        tables = [(found, COLUMNS), (rollouts, COLUMNS), (broken, margin.COLUMNS)]
        runs.write(own, "fast", "The cheap recipe", told, tables, figure)


if __name__ == "__main__":
    main()
