"""Fig. 9 d: the effect of each part. Rows without early steps, lambda(t) or inversion, and with other noise.

    python -m experiments.ablation

The first row is the paper's own configuration: Eq. 10 over the whole trajectory, a decaying lambda(t), both branches.
Every other row changes the one thing that it names. The rows are compared during training, because they differ there
and not at the end. The learning rate is twice the miniature's. So 52 updates go as far as 104 of the recipe, and every
row breaks: its pictures get melted or damaged parts.
"""

from engine.errors import frame
from experiments import pages, runs
from experiments.pages import shown
from experiments.runs import Setting

LONG = "--lr 8e-5 --steps 52 --threshold off"
EARLY_TO_LATE = "--sigma-range 0.99 0.01"
LATE = "--sigma-range 0.5 0.01"
SRP = "--form srp"
LAMBDA = "--lam 1 0.4"  # [ours]: the paper gives no numbers
ROWS = [Setting("all of it", f"{LONG} {EARLY_TO_LATE} {SRP} {LAMBDA}"),
        Setting("without early steps", f"{LONG} {LATE} {SRP} {LAMBDA}"),
        Setting("without late steps (released)", f"{LONG} {SRP} {LAMBDA}"),
        Setting("without lambda", f"{LONG} {EARLY_TO_LATE} {SRP}"),
        Setting("lambda down to 0", f"{LONG} {EARLY_TO_LATE} {SRP} --lam 1 0"),
        Setting("without inversion", f"{LONG} {EARLY_TO_LATE} {SRP} {LAMBDA} --branches denoise"),
        Setting("Eq. 11", f"{LONG} {EARLY_TO_LATE} --form cfg {LAMBDA}"),
        Setting("Eq. 11 without inversion",
                f"{LONG} {EARLY_TO_LATE} --form cfg {LAMBDA} --branches denoise"),
        Setting("one noise for all images", f"{LONG} {EARLY_TO_LATE} {SRP} {LAMBDA} --noise shared"),
        Setting("the same, fresh to inject", f"{LONG} {EARLY_TO_LATE} {SRP} {LAMBDA} --noise fresh")]
SGP = 0.28  # the SGP gap at the end of the main run; the gap is f.(C1 - C2), the reward's difference of two prompts
COLUMNS = {"realism_50": ("realism passes 50 % at update", ".1f"),
           "broken_5": ("broken passes 5 % at update", ".1f"),
           "warned": ("first warning at update", ".1f"),
           "breaks": ("runs that break", ".0f"),
           "realism_at": ("realism at equal SGP", ".1%"),
           "broken_at": ("broken at equal SGP", ".1%"),
           "alignment_at": ("alignment at equal SGP", ".1%"),
           "redness_at": ("redness at equal SGP", "+.3f"),
           "saturation_at": ("saturation at equal SGP", ".3f"),
           "texture_at": ("texture at equal SGP", ".4f")}
AT_EQUAL = ("realism", "broken", "alignment", "redness", "saturation", "texture")


def numbers(log):
    """{column: number} of a run, from its log; None for what it never reaches."""
    row = {"realism_50": runs.first_step(log, "realism", lambda value: value >= 0.5),
           "broken_5": runs.breaks(log),
           "warned": runs.first_warning(log)}
    for column in AT_EQUAL:
        row[f"{column}_at"] = runs.at_equal(log, column, "sgp", SGP)
    return row


def main(argv=None):
    with frame("ablation"):
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        rows = {}
        curves = {}
        for setting in ROWS:
            logs = [runs.watched(own, setting.flags, seed) for seed in range(own.seeds)]
            each = [numbers(log) for log in logs]
            breaks = sum(row["broken_5"] is not None for row in each)
            rows[setting.name] = pages.over_seeds(each) | {"breaks": pages.spread([breaks])}
            curves[setting.name] = logs[0]
        result = ("5 % are broken at update " + ", ".join(
            f"{shown(rows[name]['broken_5'], '.1f')} ({name})"
            for name in ("all of it", "without early steps", "without lambda", "without inversion")) + ".")
        told = (f"{runs.n_watched(own)} watched pictures over 52 updates at twice the recipe's learning rate, "
                f"{own.seeds} seeds. Each number is of the runs that get there; - means that no run does. "
                f"{pages.ERROR_OF_SEEDS} Equal SGP is a gap of {SGP}. The first row is the paper's own: Eq. 10 over "
                "the whole trajectory, lambda(t), both branches. Every other row changes the one thing that it names.")
        figure = pages.curve_figure(curves, ("realism", "broken", "redness"),
                                    f"{runs.n_watched(own)} watched pictures every 2 updates, seed 0")
        claim = "Without early steps or lambda(t) it hacks; without inversion it is slightly less real (Fig. 9 d)."
        page = pages.Page("Ablation (Fig. 9 d)", claim, result, told, [(rows, COLUMNS)])
        pages.write(own, "ablation", page, figure)


if __name__ == "__main__":
    main()
