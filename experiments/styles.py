"""Fig. 8 and S3: other words than "realistic photo", and words that the reward has seldom read.

    python -m experiments.styles

The rewards of the second table are built here: the miniature's own training, but the words of brush strokes
are left out of more and more captions. The pictures stay the same, and so does all that the image tower sees.
"""

import sys
from pathlib import Path

from matplotlib import pyplot

from engine.errors import frame
from experiments import runs
from experiments.runs import Setting
from miniature import build
from miniature.build_scorers import build_reward
from miniature.fitting import Workshop

WORDS = [("realistic photo", "CG render"), ("dark", "bright"), ("bright", "dark"), ("painting", "print")]
HEARD = (1.0, 0.1, 0.01, 0.0)  # of the times that the miniature's reward reads "painting" or "print"
COLUMNS = {"realism": ("realism", ".1%"), "brightness": ("brightness", ".3f"),
           "painting": ("painting", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%")}


def flags_of(words, reward=None):
    """Of train.py, for a wanted and an unwanted word."""
    wanted, unwanted = words
    text = f"--control '{wanted}' --neg '{unwanted}' --threshold off"
    return text if reward is None else f"{text} --reward {reward}"


def reward_that_heard(share, own):
    """The folder of a reward whose captions speak of the brush in a share of the usual cases; made once."""
    folder = Path(own.home) / f"reward_{share:g}"
    if not (folder / "tokenizer.json").exists():
        shop = Workshop(Path(own.home) / "reward_build", build.QUICK if own.quick else 1.0)
        build.export_reward(folder, *build_reward(shop, f"reward_{share:g}", share))
    return folder


def main(argv=None):
    with frame("styles"):
        parser = runs.parser(__doc__, seeds=3)
        parser.add_argument("--quick", action="store_true",
                            help=f"rewards of {build.QUICK:.0%} of the steps, to try whether all works")
        own = parser.parse_args(sys.argv[1:] if argv is None else argv)
        styles = [Setting(f"{wanted} against {unwanted}", flags_of((wanted, unwanted)))
                  for wanted, unwanted in WORDS]
        rare = [Setting(f"read {share:.0%} as often", flags_of(WORDS[-1], reward_that_heard(share, own)))
                for share in HEARD]
        first = runs.measured(own, styles, "styles")
        second = runs.measured(own, rare, "rare_words")
        told = (f"{own.pictures} held-out prompts, {own.seeds} seeds, mean ± standard deviation between "
                "them; brightness is the mean luma. The second table is of painting against print, with "
                "rewards that read these two words ever more seldom.")
        runs.write(own, "styles", "Other words, and rare ones (Fig. 8, S3)", told,
                   [(first, COLUMNS), (second, COLUMNS)], draw(first, second))


def draw(styles, rare):
    """What the words do to three numbers, and how many paintings the rarer words make."""
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3), layout="constrained")
    runs.bars(axes[0], styles, "realism", "realism, %", 100)
    runs.bars(axes[1], styles, "brightness", "brightness")
    runs.bars(axes[2], styles, "painting", "paintings, %", 100)
    runs.bars(axes[3], rare, "painting", "paintings, %, painting against print", 100)
    for axis in axes[1:3]:
        axis.set_yticklabels([])
    return figure


if __name__ == "__main__":
    main()
