"""S3: words that are rare in the reward's training captions.

    python -m experiments.rare_words

The rewards are built here, by the miniature's own training. The words for brush strokes are left out of more and more
captions. The pictures stay the same, so the image tower's input does not change.
"""

import sys
from pathlib import Path

from engine.errors import frame
from experiments import runs, styles
from experiments.runs import Setting
from miniature import build
from miniature.build_scorers import build_unbiased
from miniature.fitting import Workshop

WORDS = ("painting", "print")
HEARD = (0.1, 0.01, 0.0)  # how often a reward reads these words, relative to the miniature's reward


def reward_that_heard(share, own):
    """The folder of a reward whose captions have the words for brush strokes in a share of the usual cases. It is built
    once."""
    folder = Path(own.home) / f"reward_{share:g}"
    if not (folder / "tokenizer.json").exists():
        shop = Workshop(Path(own.home) / "reward_build", build.QUICK if own.quick else 1.0)
        model, words, _ = build_unbiased(shop, f"reward_{share:g}", share)
        build.export_reward(folder, model, words)
    return folder


def main(argv=None):
    with frame("rare_words"):
        parser = runs.parser(__doc__, seeds=3)
        parser.add_argument("--quick", action="store_true",
                            help=f"rewards with {build.QUICK:.0%}% of the steps, to test that everything runs")
        own = parser.parse_args(sys.argv[1:] if argv is None else argv)
        flags = styles.flags_of(WORDS)
        settings = [Setting("read 100% as often", f"{flags} --reward {runs.HELD_OUT}")]
        for share in HEARD:
            reward = reward_that_heard(share, own)
            settings.append(Setting(f"read {share:.0%} as often", f"{flags} --reward {reward}"))
        rows = runs.measured(own, settings, "rare_words")
        figure = runs.bar_figure(rows, ("painting", "alignment", "broken"), runs.what_n_is(own))
        told = ("Painting against print, with rewards that have read these two words less and less often. The first "
                f"reward is the miniature's unbiased one. {own.pictures} held-out prompts, {own.seeds} seeds, mean ± "
                "standard deviation between them.")
        runs.write(own, "rare_words", "Words that the reward has seldom read (S3)", told,
                   [(rows, styles.COLUMNS)], figure)


if __name__ == "__main__":
    main()
