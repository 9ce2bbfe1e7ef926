"""Fig. 6: SRPO on rewards with other biases. Fig. 7, right: mixtures of rewards with opposite biases against SRPO.

    python -m experiments.other_rewards

The image towers of the rewards prefer red, the opposite of red, smooth pictures, or nothing. Each reward is trained on
by SRPO, and by Direct-Align with the plain reward. The mixtures are of the first two, with the plain reward.
"""

from matplotlib import pyplot

from engine.errors import frame
from experiments import pages, runs
from experiments.pages import shown
from experiments.runs import Setting

LIKES = {"red": "reward", "the opposite of red": "reward_cyan", "smooth": "reward_smooth", "nothing": "reward_unbiased"}
SHARES = (0.75, 0.5, 0.25)  # of the reward that likes red, in a mixture
PLAIN = "--recipe direct-align"
COLUMNS = {"realism": ("realism", ".1%"), "realism_2": ("realism, second judge", ".1%"),
           "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"), "frechet": ("Frechet", ".1f"),
           "redness": ("redness", "+.3f"), "texture": ("texture", ".4f"), "saturation": ("saturation", ".3f")}


def settings():
    """(`Setting`s of SRPO and of the plain reward on each reward, `Setting`s of the mixtures)."""
    alone = []
    for likes, folder in LIKES.items():
        reward = f"--reward miniature/{folder}" if folder != "reward" else ""
        alone.append(Setting(f"SRPO, likes {likes}", reward))
        alone.append(Setting(f"plain, likes {likes}", f"{PLAIN} {reward}".strip()))
    mixtures = [Setting(f"plain, {share:g} red + {1 - share:g} the opposite",
                        f"{PLAIN} --reward miniature/reward:{share:g},miniature/reward_cyan:{1 - share:g}")
                for share in SHARES]
    return alone, mixtures


def draw(rows, mixtures):
    """A figure: redness and texture of each reward as bars, and realism against redness of the mixtures."""
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.4), layout="constrained", width_ratios=[1, 1, 1.4])
    alone = {name: row for name, row in rows.items() if name not in {mixture.name for mixture in mixtures}}
    for axis, column in zip(axes, ("redness", "texture"), strict=False):
        pages.bars(axis, alone, column, pages.DRAWN[column][0])
    axes[1].set_yticklabels([])
    ends = ["plain, likes red", *(mixture.name for mixture in mixtures), "plain, likes the opposite of red"]
    groups = {"base": ["base"], "plain: red, three mixtures, its opposite": ends,
              "SRPO on either": ["SRPO, likes red", "SRPO, likes the opposite of red"]}
    for colour, (label, names) in zip(pages.COLOURS, groups.items(), strict=False):
        x = [rows[name]["redness"] for name in names]
        y = [rows[name]["realism"] for name in names]
        axes[2].errorbar([value.mean for value in x], [100 * value.mean for value in y],
                         xerr=[value.error for value in x], marker="o", color=colour, label=label,
                         linestyle="dashed" if names is ends else "none")
    axes[2].set_xlabel(pages.DRAWN["redness"][0])
    axes[2].set_title(pages.DRAWN["realism"][0], fontsize=10)
    axes[2].set_ylim(0, 100)
    axes[2].legend(fontsize=8, loc="center")
    figure.supxlabel(pages.note(rows, ("redness", "texture", "realism")), fontsize=8)
    return figure


def main(argv=None):
    with frame("other_rewards"):
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        alone, mixtures = settings()
        rows = runs.measured(own, [*alone, *mixtures], "other_rewards")
        ours = [rows[f"SRPO, likes {likes}"] for likes in LIKES]
        red = [row["redness"].mean for row in ours]
        far = [rows[f"plain, likes {likes}"]["redness"].mean for likes in LIKES]
        mixed = max((rows[mixture.name] for mixture in mixtures), key=lambda row: row["realism"].mean)
        result = pages.verdict(
            min(row["realism"].mean for row in ours) > 0.8 and max(red) - min(red) < 0.5 * (max(far) - min(far)),
            "SRPO's realism is " + ", ".join(shown(row["realism"], ".1%") for row in ours) + ", and its redness is "
            f"from {min(red):+.3f} to {max(red):+.3f}; with the plain rewards redness is from {min(far):+.3f} to "
            f"{max(far):+.3f}. The most real mixture of the plain rewards has a realism of "
            f"{shown(mixed['realism'], '.1%')}.")
        told = f"{pages.counted(rows)} {pages.ERROR} True photos through the VAE have a texture of 0.0049."
        claim = ("SRPO does not hack any reward (Fig. 6), and a mixture of rewards only trades one bias for the other "
                 "(Fig. 7).")
        page = pages.Page("Rewards with other biases (Figs. 6 and 7)", claim, result, told, [(rows, COLUMNS)])
        pages.write(own, "other_rewards", page, draw(rows, mixtures))


if __name__ == "__main__":
    main()
