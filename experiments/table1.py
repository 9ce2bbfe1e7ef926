"""Table 1 of the paper on the miniature: SRPO, its parts and the baselines, after equal updates and over FLOP.

    python -m experiments.table1                 five seeds
    python -m experiments.table1 --seeds 1       about six minutes on one core

experiments/unbiased.py calls it with a reward that has no built-in bias.
"""

import sys

from matplotlib import pyplot

import prepare
import recipe
from engine.errors import frame
from engine.memory import plan
from experiments import runs
from experiments.runs import Setting

BASELINE = "--threshold off"
ROWS = [Setting("ReFL", f"--method refl {BASELINE}"),
        Setting("DRaFT-LV", f"--method draft-lv {BASELINE}"),
        Setting("DanceGRPO", f"--method dancegrpo {BASELINE}"),
        Setting("Direct-Align", "--recipe direct-align"),
        Setting("SRPO", ""),
        Setting("SRPO fast", "--recipe fast")]
WORDS = "realistic photo"
EVERY = 4  # updates between two looks at the watched pictures
PER_PROMPT = 4  # pictures of a prompt, as the diversity needs
COLUMNS = {"reward": ("reward", ".3f"), "clip": ("held-out reward", ".3f"), "sgp": ("SGP", "+.3f"),
           "realism": ("realism", ".1%"), "broken": ("broken", ".1%"), "alignment": ("alignment", ".1%"),
           "frechet": ("Frechet", ".1f"), "redness": ("redness", "+.3f"), "saturation": ("saturation", ".3f"),
           "diversity": ("diversity", ".4f"), "optimizer_steps": ("optimizer steps", ".0f"),
           "tflop": ("TFLOP", ".2f"), "seconds": ("seconds", ".1f")}


def cost(own, flags, log):
    """{column: number}: what a run cost, in TFLOP of the transformer, seconds, and optimizer steps."""
    a, model = recipe.read(["--model", own.model, *flags.split(), *own.flags.split()])
    each = recipe.METHODS[a.method].optimizer_steps
    return {"tflop": a.steps * plan.update_flop(prepare.job(a, model)) / plan.TERA,
            "seconds": a.steps * runs.seconds_of(log), "optimizer_steps": a.steps * each}


def measure(own, rows, name, looks=runs.SELDOM):
    """{row: {column: `Spread`}} of the base, of the base with prompts prefixed with WORDS, and of every setting with
    its cost. looks: as in `runs.trained`."""
    found = runs.measured(own, rows, name, WORDS, PER_PROMPT, looks)
    for setting in rows:
        costs = []
        for seed in range(own.seeds):
            log = runs.log_of(runs.trained(own, setting.flags, seed, looks))
            costs.append(cost(own, setting.flags, log))
        found[setting.name] |= runs.over_seeds(costs)
    return found


def curves(own, rows):
    """{row: {"tflop", "realism"}}: lists with a number for each look at the watched pictures, seed 0."""
    found = {}
    for setting in rows:
        log = runs.watched(own, setting.flags, 0, every=EVERY)
        flop = cost(own, setting.flags, log)["tflop"] / log[-1]["step"]  # TFLOP of an update
        looks = [line for line in log if "watch" in line]
        found[setting.name] = {"tflop": [flop * line["step"] for line in looks],
                               "realism": [line["watch"]["realism"] for line in looks]}
    return found


def draw(found, curves, note):
    """A figure: bars of realism, redness and broken for every row, curves of realism over FLOP, and a note below."""
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4.4), width_ratios=[1, 1, 1, 1.5], layout="constrained")
    for axis, column in zip(axes[:3], ("realism", "redness", "broken"), strict=True):
        title, scale = runs.DRAWN[column]
        runs.bars(axis, found, column, title, scale)
    for axis in axes[1:3]:
        axis.set_yticklabels([])
    names = list(found)
    for name, curve in curves.items():
        axes[3].plot(curve["tflop"], [100 * value for value in curve["realism"]], label=name,
                     color=runs.COLOURS[names.index(name) % len(runs.COLOURS)])
    axes[3].set_xlabel("TFLOP of the transformer")
    axes[3].set_title("realism of 48 watched pictures, %, seed 0", fontsize=10)
    axes[3].set_xscale("log")
    axes[3].legend(fontsize=8)
    figure.supxlabel(note, fontsize=9)
    return figure


def main(argv=None, name="table1", title="Table 1", reward=None):
    with frame(name):
        argv = sys.argv[1:] if argv is None else argv
        own = runs.parse(__doc__, argv, pictures=256)
        if reward:
            own.flags = f"--reward {reward} {own.flags}"
        found = measure(own, ROWS, name, runs.watching(own, every=EVERY))
        over_flop = curves(own, ROWS)
        told = (f"{own.pictures // PER_PROMPT} held-out prompts, {PER_PROMPT} pictures of each, {own.seeds} seeds, "
                "mean ± standard deviation between them. Every row has the same number of updates, the same number of "
                "images for each update, and the same learning rate. TFLOP are the transformer's. Seconds are those "
                "of one CPU thread.")
        runs.write(own, name, f"{title} on the miniature", told, [(found, COLUMNS)],
                   draw(found, over_flop, runs.what_n_is(own)), curves=over_flop)


if __name__ == "__main__":
    main()
