"""Table 1 of the paper on the miniature: SRPO, its parts and the baselines, after equal updates and over FLOP.

    python -m experiments.table1                 five seeds, ten of SRPO

The baselines have the settings of recipe.METHODS, at the learning rate of all rows. form_by_method chooses
their learning rates. experiments/unbiased.py calls this file with a reward that has no built-in bias.
"""

from matplotlib import pyplot

import command
import prepare
import recipe
from engine.errors import frame
from engine.memory import work
from evaluation.metrics import diversity
from experiments import pages, runs
from experiments.pages import shown
from experiments.runs import Setting

BASELINES = [Setting("ReFL", "--method refl"),
             Setting("DRaFT-LV", "--method draft-lv"),
             Setting("DanceGRPO", "--method dancegrpo"),
             Setting("Direct-Align", "--recipe direct-align")]
ROWS = [*BASELINES, Setting("SRPO", "", times=2), Setting("SRPO fast", "--recipe fast")]
WORDS = "realistic photo"
EVERY = 4  # updates between two looks at the watched pictures
PER_PROMPT = 4  # pictures of a prompt, for the diversity
COLUMNS = {"reward": ("reward", ".3f"), "clip": ("held-out reward", ".3f"), "sgp": ("SGP", "+.3f"),
           "realism": ("realism", ".1%"), "realism_2": ("realism, second judge", ".1%"), "look": ("look u", ".3f"),
           "broken": ("broken", ".1%"), "alignment": ("alignment", ".1%"),
           "frechet": ("Frechet", ".1f"), "redness": ("redness", "+.3f"), "saturation": ("saturation", ".3f"),
           "diversity": ("diversity", ".4f"), "optimizer_steps": ("optimizer steps", ".0f"),
           "tflop": ("TFLOP", ".2f")}
APART = {"realism": ("realism", "+.1%"), "realism_2": ("realism, second judge", "+.1%"),
         "alignment": ("alignment", "+.1%"), "broken": ("broken", "+.1%"), "redness": ("redness", "+.3f")}
DRAWN = ("realism", "redness", "broken")


def cost(own, flags):
    """{column: number}: what a run costs, in TFLOP of the transformer and in optimizer steps."""
    a, model = command.read(["--model", own.model, *flags.split(), *own.flags.split()])
    each = recipe.METHODS[a.method].optimizer_steps
    return {"tflop": a.steps * work.update_flop(prepare.job(a, model)) / work.TERA,
            "optimizer_steps": a.steps * each}


def measure(own, rows, name):
    """(rows, differences), each {row: {column: `Spread`}}. The rows are the base, the base with prompts prefixed with
    WORDS, and every setting with its cost. The differences are SRPO minus each, picture by picture."""
    seeds = runs.by_seed(own, rows, name, WORDS, PER_PROMPT)
    found = {row: pages.pooled(each) for row, each in seeds.items()}
    for setting in rows:
        found[setting.name] |= pages.over_seeds([cost(own, setting.flags)])
    ours = rows[0].name if "SRPO" not in seeds else "SRPO"
    apart = {f"{ours} - {row}": pages.paired(seeds[ours], each) for row, each in seeds.items() if row != ours}
    return found, apart


def curves(own, rows):
    """{row: {"tflop", "realism"}}: lists with a number for each look at the watched pictures, seed 0."""
    found = {}
    for setting in rows:
        log = runs.watched(own, setting.flags, 0, every=EVERY)
        flop = cost(own, setting.flags)["tflop"] / log[-1]["step"]  # TFLOP of an update
        looks = [line for line in log if "watch" in line]
        found[setting.name] = {"tflop": [flop * line["step"] for line in looks],
                               "realism": [line["watch"]["realism"] for line in looks]}
    return found


def draw(found, curves):
    """A figure: bars of DRAWN for every row, curves of realism over FLOP, and a note below."""
    columns = [column for column in DRAWN if pages.has_bars(found, column)]
    widths = [1] * len(columns) + [1.5]
    figure, axes = pyplot.subplots(1, len(widths), figsize=(3.5 * sum(widths), 4.4), width_ratios=widths,
                                   layout="constrained")
    for axis, column in zip(axes[:-1], columns, strict=True):
        title, scale = pages.DRAWN[column]
        pages.bars(axis, found, column, title, scale)
    for axis in axes[1:-1]:
        axis.set_yticklabels([])
    names = list(found)
    for name, curve in curves.items():
        axes[-1].plot(curve["tflop"], [100 * value for value in curve["realism"]], label=name,
                      color=pages.COLOURS[names.index(name) % len(pages.COLOURS)])
    axes[-1].set_xlabel("TFLOP of the transformer")
    axes[-1].set_title("realism of the watched pictures, %, seed 0", fontsize=10)
    axes[-1].set_xscale("log")
    axes[-1].legend(fontsize=8)
    figure.supxlabel(pages.note(found, DRAWN), fontsize=8)
    return figure


def verdict(found, apart):
    """The sentence that says whether the claim of table1 holds."""
    best = max((setting.name for setting in BASELINES), key=lambda name: found[name]["realism"].mean)
    ahead = apart[f"SRPO - {best}"]["realism"]
    reddest = max((setting.name for setting in BASELINES), key=lambda name: found[name]["redness"].mean)
    return pages.verdict(
        ahead.mean > 2 * ahead.error,
        f"SRPO's realism is {shown(found['SRPO']['realism'], '.1%')}, that of {best}, the best baseline, is "
        f"{shown(found[best]['realism'], '.1%')}. The reward likes red: the redness of the base is "
        f"{shown(found['base']['redness'], '+.3f')}, of {reddest} {shown(found[reddest]['redness'], '+.3f')}, of SRPO "
        f"{shown(found['SRPO']['redness'], '+.3f')}.")


def page(own, name, title, claim, verdict):
    """Measure ROWS and write a page. verdict: a function of what `measure` returns."""
    found, apart = measure(own, ROWS, name)
    over_flop = curves(own, ROWS)
    told = (f"{pages.counted(found)} {pages.ERROR} Every row has the same number of updates, the same number of images "
            "for each update, and the same learning rate. TFLOP are the transformer's. Realism is the word of a judge; "
            "look u is the second judge's guess of the look, 0 a CG render, 1 a photo; true photos have u > 0.75. "
            f"Diversity is of {PER_PROMPT} pictures of each of {min(own.pictures, diversity.PROMPTS)} prompts. The "
            "second table has differences, picture by picture and seed by seed.")
    text = pages.Page(f"{title} on the miniature", claim, verdict(found, apart), told,
                      [(found, COLUMNS), (apart, APART)])
    pages.write(own, name, text, draw(found, over_flop), curves=over_flop)


def main(argv=None):
    with frame("table1"):
        own = runs.parse(runs.parser(__doc__, pictures=256), argv)
        claim = "SRPO is more realistic than the baselines at equal updates, and does not hack the reward (Table 1)."
        page(own, "table1", "Table 1", claim, verdict)


if __name__ == "__main__":
    main()
