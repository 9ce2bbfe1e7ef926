"""When to stop: 200 updates at three learning rates. When quality peaks, when it breaks, which gauge warned
first, and how many updates ahead.

    python -m experiments.when_to_stop
"""

import sys

import train
from engine.errors import frame
from experiments import runs

FACTORS = (0.5, 1, 2)  # of the model's own learning rate
STEPS = 200
EVERY = 4  # updates between two looks
BROKEN = 0.05
COLUMNS = {"best": ("best quality", ".1%"), "best_at": ("at update", ".1f"),
           "kept": ("quality of weights_best", ".1%"), "kept_at": ("from update", ".1f"),
           "warned": ("first warning at", ".1f"), "broken_5": ("broken passes 5 % at", ".1f"),
           "ahead": ("updates ahead", "+.1f"), "in_time": ("runs warned in time", ".0f"),
           "broke": ("runs that broke", ".0f")}


def quality(look):
    """One number of a look: how many pictures are photos, less those that are broken."""
    return look["watch"]["realism"] - look["watch"]["broken"]


def numbers(log):
    """{column: number} of a run; None for what never comes."""
    looks = [line for line in log if "watch" in line]
    calm = [look for look in looks if not look["hacking"]]
    best = max(looks, key=quality)
    kept = max(calm, key=lambda look: look["watch"]["sgp"])  # train.py's weights_best
    warned = runs.first(looks, lambda look: look["hacking"])
    broken = runs.first_step(log, "broken", lambda value: value > BROKEN)
    row = {"best": quality(best), "best_at": best["step"], "kept": quality(kept), "kept_at": kept["step"],
           "warned": warned and warned["step"], "broken_5": broken, "ahead": None}
    if warned and broken is not None:
        row["ahead"] = broken - warned["step"]
    return row


def gauge(log):
    """The name of the gauge that warned first in a run."""
    warned = runs.first(log, lambda line: line.get("hacking"))
    if warned is None:
        return "none"
    return warned["hacking"][0].split()[0]


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
            logs = [runs.watched(own, flags, seed, every=EVERY) for seed in range(own.seeds)]
            each = [numbers(log) for log in logs]
            broke = [row for row in each if row["broken_5"] is not None]
            in_time = sum(row["ahead"] is not None and row["ahead"] > 0 for row in broke)
            rows[name] = runs.over_seeds(each)
            rows[name] |= {"broke": runs.spread([len(broke)]), "in_time": runs.spread([in_time])}
            first[name] = sorted({gauge(log) for log in logs})
            curves[name] = logs[0]
        gauges = "\n".join(f"- {name}: {', '.join(which)}" for name, which in first.items())
        told = (f"{STEPS} updates, {own.seeds} seeds, 48 watched pictures every {EVERY} updates, mean ± "
                "standard deviation between the runs that get there; quality is realism less broken. "
                "weights_best, which train.py keeps, has the highest SGP gap of the looks without a warning. "
                f"Which gauge warned first:\n\n{gauges}")
        figure = runs.curve_figure(curves, ("realism", "alignment", "broken", "saturation"),
                                   f"48 watched pictures every {EVERY} updates, seed 0")
        runs.write(own, "when_to_stop", "When to stop", told, [(rows, COLUMNS)], figure, first=first)


if __name__ == "__main__":
    main()
