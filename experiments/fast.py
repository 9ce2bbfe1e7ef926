"""The cheap recipe, --recipe fast, against the released one: results, rollout steps, and the update at which each
breaks.

    python -m experiments.fast

Direct-Align recovers any clean image from known noise, so the rollout's image does not have to be good. One branch is
enough if the form has no common mode (Eq. 10; experiments/common_mode.py).
"""

from argparse import Namespace

import command
from engine.errors import frame
from experiments import margin, pages, runs
from experiments.pages import shown
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
    """({row: {column: `Spread`}}, {row: log of seed 0}) of runs that train until they break, with the columns of
    `margin`."""
    rate = command.flags(["--model", own.model]).lr
    long = f"--lr {rate:g} --steps {margin.UPDATES} --threshold off"
    rows = {}
    logs = {}
    for name, flags in (("released", long), ("fast", f"{FAST} {long}")):
        each = [runs.watched(own, flags, seed, margin.PICTURES, margin.EVERY) for seed in range(own.seeds)]
        logs[name] = each[0]
        rows[name] = pages.over_seeds([margin.numbers(log) for log in each])
    return rows, logs


def main(argv=None):
    with frame("fast"):
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        recipes, steps = settings()
        one_seed = Namespace(**vars(own) | {"seeds": 1})
        found = runs.measured(own, recipes, "fast")
        rollouts = runs.measured(one_seed, steps, "rollout_steps")
        broken, logs = limits(own)
        pictures = runs.n_watched(own, margin.PICTURES)
        figure = pages.curve_figure(logs, ("realism", "alignment", "broken"),
                                    f"{pictures} pictures every {margin.EVERY} updates, seed 0")
        ours, theirs = found["fast"], found["released"]
        holds = ours["realism"].mean >= theirs["realism"].mean - 0.02
        result = (f"{'It does' if holds else 'It does not'}: realism {shown(ours['realism'], '.1%')}, released "
                  f"{shown(theirs['realism'], '.1%')}; alignment {shown(ours['alignment'], '.1%')} and "
                  f"{shown(theirs['alignment'], '.1%')}.")
        told = (f"The first table has the recipes: {pages.counted(found)} The second has the rollout's steps, for seed "
                f"0. The third has runs of {margin.UPDATES} updates, for {pictures} selection prompts: the first look "
                f"at which {margin.GOAL:.0%} are photos, and when the pictures break. {pages.ERROR}")
        claim = "Four rollout steps and one branch give what the released recipe gives (ours)."
        page = pages.Page("The cheap recipe", claim, result, told,
                          [(found, COLUMNS), (rollouts, COLUMNS), (broken, margin.COLUMNS)])
        pages.write(own, "fast", page, figure)


if __name__ == "__main__":
    main()
