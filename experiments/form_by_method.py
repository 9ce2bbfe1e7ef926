"""Which half does the work, Direct-Align or the relative reward? Every method with the plain and the relative reward.

    python -m experiments.form_by_method

Table 1 gives SRPO the control words and the baselines the bare prompt. Here every method is trained with both. The
learning rate and the threshold of each are chosen from one grid: on the selection prompts, after the recipe's updates,
seed 0. `chosen` is the rule. The loss is -r, or the hinge relu(threshold - r). Its threshold is the score of true
photos: 0.24 for the relative reward, 0.72 for the plain one. DanceGRPO does not differentiate the reward, so it has
no threshold; its grid has higher rates. The rows are then measured on the held-out prompts: at equal updates, at equal
FLOP of the transformer, and DanceGRPO also after 150 updates.
"""

import math
from argparse import Namespace

from matplotlib import pyplot

import command
from engine.errors import frame
from experiments import pages, runs, table1
from experiments.pages import shown
from experiments.runs import Setting

METHODS = {"ReFL": "--method refl", "DRaFT-LV": "--method draft-lv", "DanceGRPO": "--method dancegrpo",
           "Direct-Align": "--recipe direct-align"}
FORMS = {"plain": "plain", "relative": "srp"}
PHOTOS = {"plain": "0.72", "relative": "0.24"}  # what true photos score
RATES = (2e-5, 4e-5, 8e-5, 16e-5)
DANCE_RATES = (4e-5, 8e-5, 16e-5, 32e-5, 64e-5)
BROKEN = 0.05     # most of a chosen setting's pictures
ALIGNMENT = 0.90  # least
LONG = 150  # updates of DanceGRPO
LONG_SEEDS = 3
COLUMNS = {"chosen": ("chosen", "s")} | {column: table1.COLUMNS[column] for column in (
    "realism", "realism_2", "look", "alignment", "broken", "frechet", "redness", "reward", "sgp", "tflop")}


def grid(method, form, quick=False):
    """The flags of the settings that a method and a form choose from. quick: the first of them."""
    base = f"{METHODS[method]} --form {FORMS[form]}"
    if method == "DanceGRPO":
        found = [f"{base} --lr {rate:g}" for rate in DANCE_RATES]
    else:
        found = [f"{base} --lr {rate:g} --threshold {threshold}" for rate in RATES
                 for threshold in ("off", PHOTOS[form])]
    return found[:1] if quick else found


def last_look(own, flags, steps):
    """The means over the watched pictures at the end of a run of seed 0."""
    return runs.watched(own, flags, 0, runs.SELECTION, steps)[-1]["watch"]


def chosen(looks):
    """The flags with the highest realism of {flags: means of the watched pictures}, of those with at most BROKEN broken
    pictures and an alignment of at least ALIGNMENT. If no flags have that, the flags with the fewest broken and
    misaligned pictures."""
    whole = {flags: look for flags, look in looks.items()
             if look["broken"] <= BROKEN and look["alignment"] >= ALIGNMENT}
    if whole:
        return max(whole, key=lambda flags: (whole[flags]["realism"], whole[flags]["alignment"]))
    return max(looks, key=lambda flags: looks[flags]["alignment"] - looks[flags]["broken"])


def in_words(flags):
    """The learning rate and the threshold in flags, as the text of a table's cell."""
    words = flags.split()
    rate = words[words.index("--lr") + 1]
    if "--threshold" not in words or words[words.index("--threshold") + 1] == "off":
        return f"lr {rate}"
    return f"lr {rate}, threshold {words[words.index('--threshold') + 1]}"


def draw(rows):
    """A figure: realism against redness, with a colour for each method and a marker for each form."""
    figure, axis = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    for name, row in rows.items():
        method, _, form = name.partition(", ")
        colour = pages.COLOURS[1 + list(METHODS).index(method)] if method in METHODS else pages.COLOURS[0]
        x, y = row["redness"], row["realism"]
        axis.errorbar(x.mean, 100 * y.mean, xerr=x.error, yerr=pages.ends_of(y, 100), color=colour, label=name,
                      marker={"plain": "o", "relative": "s"}.get(form, "*"), markersize=8, linestyle="none")
    axis.set_xlabel(pages.DRAWN["redness"][0])
    axis.set_ylabel(pages.DRAWN["realism"][0])
    axis.set_ylim(0, 100)
    axis.legend(fontsize=8, loc="center right")
    figure.supxlabel(pages.note(rows, ["realism", "redness"]), fontsize=8)
    return figure


def main(argv=None):
    with frame("form_by_method"):
        parser = runs.parser(__doc__, pictures=256)
        parser.add_argument("--quick", action="store_true", help="a grid of one setting, to test that everything runs")
        own = runs.parse(parser, argv)
        usual = command.flags(["--model", own.model, *own.flags.split()])
        budget = table1.cost(own, "")["tflop"]
        best = {}
        for method in METHODS:
            for form in FORMS:
                looks = {flags: last_look(own, flags, usual.steps) for flags in grid(method, form, own.quick)}
                best[f"{method}, {form}"] = chosen(looks)
        same_flop = {}
        for name, flags in best.items():
            steps = max(1, round(usual.steps * budget / table1.cost(own, flags)["tflop"]))
            if steps != usual.steps:
                same_flop[f"{name}, {steps} updates"] = f"{flags} --steps {steps}"
        longest = {f"{name}, {LONG} updates": f"{flags} --steps {LONG}" for name, flags in best.items()
                   if name.startswith("DanceGRPO")}
        parts = {"updates": best, "flop": same_flop, "long": longest}
        tables = {}
        for part, flags_of in parts.items():
            seeds = Namespace(**vars(own) | {"seeds": min(own.seeds, LONG_SEEDS)}) if part == "long" else own
            settings = [Setting(name, flags) for name, flags in flags_of.items()]
            tables[part] = runs.measured(seeds, settings, f"form_by_method_{part}")
            for name, flags in flags_of.items():
                tables[part][name] |= {"tflop": pages.spread([table1.cost(own, flags)["tflop"]]),
                                       "chosen": in_words(flags)}
        pages.write(own, "form_by_method", page(own, tables), draw(tables["updates"]))


def page(own, tables):
    """The `Page` of {part: {row: {column: `Spread`}}}."""
    rows = tables["updates"]
    gains = {method: rows[f"{method}, relative"]["realism"].mean - rows[f"{method}, plain"]["realism"].mean
             for method in METHODS}
    ours = rows["Direct-Align, relative"]["realism"]
    others = {method: rows[f"{method}, relative"]["realism"] for method in METHODS if method != "Direct-Align"}
    nearest = max(others, key=lambda method: others[method].mean)
    by_method = ours.mean - others[nearest].mean
    sure = abs(by_method) > 2 * math.hypot(ours.error, others[nearest].error)
    result = ("The relative reward raises realism by "
              + ", ".join(f"{100 * gain:.0f} points ({method})" for method, gain in gains.items())
              + f". With it, Direct-Align reaches {shown(ours, '.1%')} and {nearest}, the best of the others, "
              f"{shown(others[nearest], '.1%')}"
              + (f", so the method adds {100 * by_method:.0f} points." if sure else ", which is no sure difference."))
    told = (f"The learning rate and the threshold of each row were chosen on the selection prompts. {pages.ERROR} The "
            f"first table is at equal updates: {pages.counted(rows)} The second is at equal FLOP of the transformer, "
            f"SRPO's. The third is DanceGRPO after {LONG} updates, {min(own.seeds, LONG_SEEDS)} seeds (S2).")
    claim = "The relative reward may serve other algorithms (section 5). Which half does the work, it or Direct-Align?"
    return pages.Page("Every method with the plain and the relative reward", claim, result, told,
                      [(part, COLUMNS) for part in tables.values()])


if __name__ == "__main__":
    main()
