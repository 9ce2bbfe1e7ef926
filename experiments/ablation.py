"""Fig. 9 d: what each part is for. Without early steps, lambda(t), inversion; with other noise. Measured
where the rows can differ: on the way, and not at the end.

    python -m experiments.ablation
"""

import sys

from matplotlib import pyplot

from engine.errors import frame
from experiments import runs
from experiments.runs import Setting

LONG = "--steps 52 --threshold off"  # twice the miniature's updates, to see where each breaks
SRP = f"{LONG} --form srp --lam 1 0.4"
ROWS = [Setting("Eq. 10, lambda, both branches", SRP),
        Setting("without early steps", f"{SRP} --sigma-range 0.5 0.02"),
        Setting("without lambda", f"{LONG} --form srp"),
        Setting("without inversion", f"{SRP} --branches denoise"),
        Setting("Eq. 11, both branches", f"{LONG} --form cfg"),
        Setting("Eq. 11, without inversion", f"{LONG} --form cfg --branches denoise"),
        Setting("one noise for all images", f"{SRP} --noise shared"),
        Setting("one noise, fresh to inject", f"{SRP} --noise fresh")]
SGP = 0.1
COLUMNS = {"realism_50": ("update at realism 50 %", ".1f"),
           "broken_5": ("update at broken 5 %", ".1f"),
           "redness_at": ("redness at equal SGP", "+.3f"),
           "saturation_at": ("saturation at equal SGP", ".3f"),
           "reached": ("seeds that break", ".0f")}


def numbers(log):
    """{column: number} of a run; None for what it never reaches."""
    broken = runs.first_step(log, "broken", lambda value: value > 0.05)
    return {"realism_50": runs.first_step(log, "realism", lambda value: value >= 0.5), "broken_5": broken,
            "redness_at": runs.at_sgp(log, "redness", SGP),
            "saturation_at": runs.at_sgp(log, "saturation", SGP)}


def main(argv=None):
    with frame("ablation"):
        own = runs.parse(__doc__, sys.argv[1:] if argv is None else argv)
        rows = {}
        curves = {}
        for setting in ROWS:
            logs = [runs.watched(own, setting.flags, seed, every=4) for seed in range(own.seeds)]
            each = [numbers(log) for log in logs]
            reached = sum(row["broken_5"] is not None for row in each)
            rows[setting.name] = runs.over_seeds(each) | {"reached": runs.spread([reached])}
            curves[setting.name] = logs[0]
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
        for axis, column in zip(axes, ("realism", "broken"), strict=True):
            found = {name: runs.points(log, column) for name, log in curves.items()}
            runs.lines(axis, found, f"{column} of the watched pictures, %, seed 0", 100)
        axes[0].legend(fontsize=7)
        told = (f"The watched pictures over 52 updates, {own.seeds} seeds, mean ± standard deviation between "
                f"those that get there; equal SGP is a gap of {SGP}.")
        runs.write(own, "ablation", "Ablation (Fig. 9 d)", told, [(rows, COLUMNS)], figure)


if __name__ == "__main__":
    main()
