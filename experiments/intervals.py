"""Fig. 7: which part of the trajectory is trained. Early (the first quarter), all, late (the last quarter),
with the plain reward and with the relative one.

    python -m experiments.intervals
"""

import sys

from matplotlib import pyplot

from engine.errors import frame
from experiments import runs
from experiments.runs import Setting

# In sigma: the first quarter of 50 steps with shift 3 ends at 0.9, the last one begins at 0.5.
RANGES = {"early": "0.99 0.9", "all": "0.99 0.02", "late": "0.5 0.02"}
REWARDS = {"plain": "--form plain --threshold off", "relative": "--threshold off"}
SGP = 0.0  # at which gap the intervals are compared
COLUMNS = {"at": ("realism at equal SGP", ".1%"), "redness_at": ("redness at equal SGP", "+.3f"),
           "broken_at": ("broken at equal SGP", ".1%"), "realism": ("realism, at the end", ".1%"),
           "redness": ("redness, at the end", "+.3f"), "broken": ("broken, at the end", ".1%")}


def settings():
    """Every interval with every reward."""
    return [Setting(f"{reward}, {name}", f"--sigma-range {sigmas} {flags}")
            for reward, flags in REWARDS.items() for name, sigmas in RANGES.items()]


def numbers(log):
    """{column: number} of a run."""
    last = log[-1]["watch"]
    return {"at": runs.at_sgp(log, "realism", SGP), "redness_at": runs.at_sgp(log, "redness", SGP),
            "broken_at": runs.at_sgp(log, "broken", SGP), "realism": last["realism"],
            "redness": last["redness"], "broken": last["broken"]}


def main(argv=None):
    with frame("intervals"):
        own = runs.parse(__doc__, sys.argv[1:] if argv is None else argv)
        rows = {}
        for setting in settings():
            logs = [runs.watched(own, setting.flags, seed, every=4) for seed in range(own.seeds)]
            rows[setting.name] = runs.over_seeds([numbers(log) for log in logs])
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained", sharey=True)
        runs.bars(axes[0], rows, "realism", "realism, %", 100)
        runs.bars(axes[1], rows, "redness", "redness")
        runs.bars(axes[2], rows, "broken", "broken, %", 100)
        told = (f"The watched pictures, {own.seeds} seeds, mean ± standard deviation between them. Equal "
                f"SGP is a gap of {SGP}; - where a run never reaches it. In sigma: {RANGES}.")
        runs.write(own, "intervals", "Which part of the trajectory (Fig. 7)", told,
                   [(rows, COLUMNS)], figure)


if __name__ == "__main__":
    main()
