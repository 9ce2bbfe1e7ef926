"""When to stop: 200 updates at three learning rates. When quality peaks, when it breaks, and which gauge
warned first.

    python -m experiments.when_to_stop --seeds 1
"""

import sys

from matplotlib import pyplot

import train
from engine.errors import frame
from experiments import runs

FACTORS = (0.5, 1, 2)  # of the model's own learning rate
STEPS = 200
COLUMNS = {"best": ("best: realism - broken", ".1%"), "best_at": ("at update", ".0f"),
           "broken_5": ("broken passes 5 % at", ".0f"), "warned": ("first warning at", ".0f"),
           "ahead": ("updates ahead", "+.0f")}


def quality(look):
    """One number of a look: how many pictures are photos, less those that are broken."""
    return look["realism"] - look["broken"]


def numbers(log):
    """({column: number} of a run, the gauge that warned first)."""
    looks = [line for line in log if "watch" in line]
    best = max(looks, key=lambda line: quality(line["watch"]))
    broken = runs.first_step(log, "broken", lambda value: value > 0.05)
    warnings = [line for line in looks if line["hacking"]]
    warned = warnings[0]["step"] if warnings else None
    ahead = broken - warned if broken is not None and warned is not None else None
    row = {"best": quality(best["watch"]), "best_at": best["step"], "broken_5": broken, "warned": warned,
           "ahead": ahead}
    return row, warnings[0]["hacking"][0].split()[0] if warnings else "none"


def main(argv=None):
    with frame("when_to_stop"):
        own = runs.parse(__doc__, sys.argv[1:] if argv is None else argv, seeds=3)
        rate = train.flags(["--model", own.model]).lr
        rows = {}
        first = {}
        curves = {}
        for factor in FACTORS:
            name = f"learning rate {factor * rate:g}"
            flags = f"--lr {factor * rate:g} --steps {STEPS} --threshold off"
            logs = [runs.watched(own, flags, seed, every=4) for seed in range(own.seeds)]
            each = [numbers(log) for log in logs]
            rows[name] = runs.over_seeds([row for row, _ in each])
            first[name] = sorted({gauge for _, gauge in each})
            curves[name] = logs[0]
        figure, axes = pyplot.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
        for axis, column in zip(axes, ("realism", "broken", "saturation"), strict=True):
            runs.lines(axis, {name: runs.points(log, column) for name, log in curves.items()},
                       f"{column} of the watched pictures, seed 0")
        axes[0].legend(fontsize=8)
        gauges = "\n".join(f"- {name}: {', '.join(which)}" for name, which in first.items())
        told = (f"{STEPS} updates, {own.seeds} seeds, the watched pictures. Which gauge warned first:\n\n"
                f"{gauges}")
        runs.write(own, "when_to_stop", "When to stop", told, [(rows, COLUMNS)], figure, first=first)


if __name__ == "__main__":
    main()
