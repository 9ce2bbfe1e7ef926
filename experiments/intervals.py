"""Fig. 7: which part of the trajectory is trained: early (the first quarter), all, or late (the last quarter).

    python -m experiments.intervals

Each part is trained with the plain reward and with the relative one, without a discount. A late step may change
pictures more, or less, than an early one. So the parts are compared when the reward has risen equally far: for the
relative reward, to the SGP gap f.(C1 - C2) at the end of the main run. They are also compared after 26 updates at twice
the miniature's learning rate, which go as far as 52 of the recipe.
"""

from typing import NamedTuple

from engine.errors import frame
from experiments import pages, runs
from experiments.pages import shown
from experiments.runs import Setting

LONG = "--lr 8e-5 --steps 26 --threshold off"
# In sigma. Of 50 steps with shift 3, the first quarter ends at 0.9, and the last quarter begins at 0.5.
RANGES = {"early": "0.99 0.9", "all": "0.99 0.02", "late": "0.5 0.02"}


class Climb(NamedTuple):
    """A reward to train on, and the value at which runs are compared."""
    flags: str     # of train.py
    column: str    # the column of the log that training raises
    height: float  # the value of that column at which runs are compared


CLIMBS = {"plain": Climb("--form plain", "reward", 0.8), "relative": Climb("--form srp", "sgp", 0.28)}
COLUMNS = {"at_update": ("equally far at update", ".1f"),
           "realism_at": ("realism there", ".1%"), "redness_at": ("redness there", "+.3f"),
           "broken_at": ("broken there", ".1%"), "alignment_at": ("alignment there", ".1%"),
           "broken_5": ("broken passes 5 % at update", ".1f"),
           "warned": ("first warning at update", ".1f"), "redness": ("redness at the end", "+.3f"),
           "broken": ("broken at the end", ".1%"), "frechet": ("Frechet at the end", ".1f")}
THERE = ("realism", "redness", "broken", "alignment")
AT_THE_END = ("realism", "redness", "broken", "frechet")


def numbers(log, climb):
    """{column: number} of a run, from its log; None for what it never reaches."""
    row = {"at_update": runs.first_step(log, climb.column, lambda value: value >= climb.height),
           "broken_5": runs.breaks(log),
           "warned": runs.first_warning(log)}
    for column in THERE:
        row[f"{column}_at"] = runs.at_equal(log, column, climb.column, climb.height)
    for column in AT_THE_END:
        row[column] = log[-1]["watch"][column]
    return row


def main(argv=None):
    with frame("intervals"):
        own = runs.parse(runs.parser(__doc__), argv)
        rows = {}
        for reward, climb in CLIMBS.items():
            for name, sigmas in RANGES.items():
                setting = Setting(f"{reward}, {name}", f"{LONG} {climb.flags} --sigma-range {sigmas}")
                logs = [runs.watched(own, setting.flags, seed) for seed in range(own.seeds)]
                rows[setting.name] = pages.over_seeds([numbers(log, climb) for log in logs])
        figure = pages.bar_figure(rows, ("redness", "broken", "frechet"))
        in_words = ", ".join(f"{name} is {sigmas.replace(' ', ' to ')}" for name, sigmas in RANGES.items())
        early, late = (rows[f"relative, {name}"]["broken_at"] for name in ("early", "late"))
        red, not_red = (rows[f"plain, {name}"]["redness_at"] for name in ("early", "late"))
        result = (f"With the relative reward, at equal gap, {shown(early, '.1%')} (early) and {shown(late, '.1%')} "
                  f"(late) are broken. With the plain reward, at equal reward, redness is {shown(red, '+.3f')} "
                  f"(early) and {shown(not_red, '+.3f')} (late).")
        told = (f"{runs.n_watched(own)} watched pictures, {own.seeds} seeds. {pages.ERROR_OF_SEEDS} The rows are "
                f"compared at the update when the plain reward has risen to {CLIMBS['plain'].height}, or the SGP gap "
                f"to {CLIMBS['relative'].height}; - means that no run gets there. In sigma, {in_words}. 26 updates at "
                "twice the recipe's learning rate.")
        claim = "Training late steps hacks most, early ones least (Fig. 7)."
        page = pages.Page("Which part of the trajectory (Fig. 7)", claim, result, told, [(rows, COLUMNS)])
        pages.write(own, "intervals", page, figure)


if __name__ == "__main__":
    main()
