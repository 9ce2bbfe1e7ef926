"""When to stop: 200 updates at three learning rates.

    python -m experiments.when_to_stop

It shows when the pictures are best, when they break, which drift warning fired first, and how many updates before.
Pictures are broken if they have melted or damaged parts. The best pictures are those nearest to true photos (the
Frechet distance). Realism cannot tell: it soon reaches 100 % and stays there while the shapes melt.
"""

import math

import command
from engine.errors import frame
from experiments import margin, pages, runs
from experiments.pages import shown

FACTORS = (0.5, 1, 2)  # of the model's own learning rate
STEPS = 200
EVERY = 4  # updates between two looks
COLUMNS = {"best": ("nearest to the truth: Frechet", ".1f"), "best_at": ("at update", ".0f"),
           "kept": ("weights_best: Frechet", ".1f"), "kept_at": ("of update", ".0f"),
           "kept_realism": ("its realism", ".1%"), "kept_alignment": ("its alignment", ".1%"),
           "warned": ("first warning at", ".0f"), "fallen": ("alignment falls 5 points at", ".0f"),
           "broken_5": ("broken passes 5 % at", ".0f"), "ahead": ("updates ahead of that", ".0f"),
           "in_time": ("runs warned in time", ".0f"), "broke": ("runs that broke", ".0f")}


def distance(look):
    """The Frechet distance of a look from true photos; infinity if there are too few pictures to measure it."""
    frechet = look["watch"]["frechet"]
    return math.inf if frechet is None else frechet


def numbers(log):
    """{column: number} of a run, from its log; None for what never happens."""
    looks = margin.looks_of(log)
    calm = [look for look in looks if not look["hacking"]]
    best = min(looks, key=distance)
    warned = runs.first_warning(log)
    broken = runs.breaks(log)
    row = {"best": best["watch"]["frechet"], "best_at": best["step"], "kept": None, "kept_at": None,
           "kept_realism": None, "kept_alignment": None, "warned": warned,
           "fallen": margin.alignment_falls(log), "broken_5": broken, "ahead": None}
    if calm:
        kept = max(calm, key=lambda look: look["watch"]["sgp"])  # train.py's weights_best
        row |= {"kept": kept["watch"]["frechet"], "kept_at": kept["step"],
                "kept_realism": kept["watch"]["realism"], "kept_alignment": kept["watch"]["alignment"]}
    if warned is not None and broken is not None:
        row["ahead"] = broken - warned
    return row


def first_warned(log):
    """What the run's first drift warning names: a statistic, or "reward against gap"; "none" without a warning."""
    warned = runs.first(log, lambda line: line.get("hacking"))
    if warned is None:
        return "none"
    statistic, drifted, _ = warned["hacking"][0].partition(" drifted")
    return statistic if drifted else "reward against gap"


def main(argv=None):
    with frame("when_to_stop"):
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        rate = command.flags(["--model", own.model]).lr
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
            rows[name] = pages.over_seeds(each)
            rows[name] |= {"broke": pages.spread([len(broke)]), "in_time": pages.spread([in_time])}
            first[name] = sorted({first_warned(log) for log in logs})
            curves[name] = logs[0]
        usual = rows[f"learning rate {rate:g}"]
        result = (f"At the usual rate the pictures are best at update {shown(usual['best_at'], '.0f')}, "
                  f"and 5 % are broken at {shown(usual['broken_5'], '.0f')}. The drift warning came before that in "
                  f"{shown(usual['in_time'], '.0f')} of {shown(usual['broke'], '.0f')} runs that broke.")
        statistics = "\n".join(f"- {name}: {', '.join(which)}" for name, which in first.items())
        told = (f"{STEPS} updates, {own.seeds} seeds, {runs.n_watched(own)} watched pictures every {EVERY} updates. "
                f"Each number is of the runs that get there. {pages.ERROR_OF_SEEDS} train.py keeps weights_best: the "
                "weights with the highest SGP gap of all looks without a drift warning. The statistic that warned "
                f"first:\n\n{statistics}")
        figure = pages.curve_figure(curves, ("realism", "alignment", "broken", "frechet"),
                                    f"{runs.n_watched(own)} watched pictures every {EVERY} updates, seed 0")
        claim = "Users of FLUX.1-dev: good at 10 to 20 updates, broken by 20 to 50; when to stop?"
        page = pages.Page("When to stop", claim, result, told, [(rows, COLUMNS)])
        pages.write(own, "when_to_stop", page, figure, first=first)


if __name__ == "__main__":
    main()
