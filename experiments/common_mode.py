"""Section 3.2 and Fig. 9 d: the purpose of inversion. Every form of the reward, with one branch and with both.

    python -m experiments.common_mode

In an update, f moves along a C1 - b C2, summed over the branches. The branches' network terms have opposite signs. The
sum is (a - b)/2 (C1 + C2) + (a + b)/2 (C1 - C2). The first part is the common mode: what both texts share, and with it
every bias of the image branch. The second part is the meaning of the words. So redness, the statistic that is hacked
here, should follow (a - b) / (a + b). The denoising branch of --form branches equals that of --form sgp, so it is run
only once.
"""

import math
from statistics import mean

from matplotlib import pyplot

from engine.errors import frame
from experiments import pages, runs
from experiments.pages import shown
from experiments.runs import Setting

# (a, b) of each form; None if all is common mode. The released form's discounts are at the middle of their ranges.
DENOISE = {"plain": None, "sgp": (1, 0), "cfg": (1.5, 0.5), "released": (1.175, 1), "srp": (1, 1)}
BOTH = {"plain": None, "sgp": (2, 0), "cfg": (2, 2), "branches": (1, 1), "released": (2.175, 2.155),
        "srp": (2, 2)}
MORE = 4  # times the pictures. The branches' common mode cancels only in the mean, so more pictures cancel it better
COLUMNS = {"predicted": ("common mode, predicted", ".2f"), "redness": ("redness", "+.3f"),
           "realism": ("realism", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"),
           "sgp": ("SGP", "+.3f"), "grad_norm": ("gradient norm", ".2f")}


def settings():
    """{`Setting`: the predicted common mode per unit of difference, (a - b) / (a + b); None if there is no
    difference}."""
    found = {}
    for name, branches, weights in (("denoise only", "denoise", DENOISE), ("both", "denoise,invert", BOTH)):
        for form, each in weights.items():
            setting = Setting(f"{form}, {name}", f"--form {form} --branches {branches} --threshold off")
            found[setting] = None
            if each is not None:
                a, b = each
                found[setting] = (a - b) / (a + b)
    more = f"--form cfg --branches denoise,invert --threshold off --global-batch {MORE * 16}"
    found[Setting(f"cfg, both, {MORE} times the pictures", more)] = 0.0
    return found


def norm_of(run):
    """The mean norm of a run's gradients, before clipping. run: its folder."""
    return mean(line["grad_norm"] for line in runs.log_of(run))


def main(argv=None):
    with frame("common_mode"):
        own = runs.parse(runs.parser(__doc__), argv)
        rows = runs.measured(own, list(settings()), "common_mode")
        rows["base"]["predicted"] = None
        for setting, mode in settings().items():
            rows[setting.name]["predicted"] = pages.spread([mode])
            norms = [norm_of(runs.trained(own, setting.flags, seed)) for seed in range(own.seeds)]
            rows[setting.name]["grad_norm"] = pages.spread(norms)
        order = sorted(rows, key=lambda name: rows[name]["redness"].mean, reverse=True)
        rows = {name: rows[name] for name in order}
        one, both = rows["cfg, denoise only"], rows["cfg, both"]
        apart = one["redness"].mean - both["redness"].mean
        result = pages.verdict(
            apart > 2 * math.hypot(one["redness"].error, both["redness"].error),
            f"redness with Eq. 11 is {shown(one['redness'], '+.3f')} with one branch and "
            f"{shown(both['redness'], '+.3f')} with both (base {shown(rows['base']['redness'], '+.3f')}). What "
            "inversion cancels is the common mode of the two texts.")
        told = (f"{pages.counted(rows)} {pages.ERROR} In an update f moves along a C1 - b C2, summed over the "
                "branches. Its common mode is (a - b)/2 (C1 + C2). Per unit of difference, (a - b) / (a + b), it is "
                "predicted from the weights of the two texts. The plain reward has only common mode, so it has no such "
                "number.")
        claim = "Inversion regularises (section 3.2, Fig. 9 d)."
        page = pages.Page("Common mode: what inversion cancels", claim, result, told, [(rows, COLUMNS)])
        pages.write(own, "common_mode", page, draw(rows))


def draw(rows):
    """A figure: redness against the predicted common mode, with a colour for each form and a marker for its branches;
    beside it, redness as bars."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    left = axes[0]
    for name, row in rows.items():
        if row["predicted"] is None:
            continue
        form, branches, *_ = name.split(", ")
        colour = pages.COLOURS[list(BOTH).index(form)]
        marker = "o" if branches == "both" else "s"
        left.errorbar(row["predicted"].mean, row["redness"].mean, yerr=row["redness"].error, fmt=marker,
                      markersize=8, color=colour, label=name)
    left.axhline(rows["base"]["redness"].mean, color="grey", linestyle="dashed", label="base")
    left.set_xlabel("f moves along a C1 - b C2: common mode (a - b) / (a + b), predicted")
    left.set_ylabel("redness, R - (G + B)/2, measured")
    left.legend(fontsize=8, loc="upper left")
    title, scale = pages.DRAWN["redness"]
    pages.bars(axes[1], rows, "redness", title, scale)
    figure.supxlabel(pages.note(rows, ["redness"]), fontsize=9)
    return figure


if __name__ == "__main__":
    main()
