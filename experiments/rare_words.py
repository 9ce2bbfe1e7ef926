"""S3: words that are rare in the reward's training captions.

    python -m experiments.rare_words

The rewards are built here, by the miniature's own training. The words for brush strokes are left out of more and more
captions. The pictures stay the same, so the image tower's input does not change.
"""

from pathlib import Path

from engine.errors import frame
from experiments import pages, runs, styles
from experiments.pages import shown
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
        own = runs.parse(parser, argv)
        flags = styles.flags_of(WORDS)
        settings = [Setting("read 100% as often", f"{flags} --reward {runs.HELD_OUT}")]
        for share in HEARD:
            reward = reward_that_heard(share, own)
            settings.append(Setting(f"read {share:.0%} as often", f"{flags} --reward {reward}"))
        rows = runs.measured(own, settings, "rare_words")
        often, never = rows[settings[0].name]["painting"], rows[settings[-1].name]["painting"]
        result = pages.verdict(often.mean > 0.5 and never.mean < 0.1,
                               f"{shown(often, '.1%')} are paintings with words that the reward has read, "
                               f"{shown(never, '.1%')} with words that it has never read.")
        told = ("Painting against print, with rewards that have read these two words less and less often. The first "
                f"reward is the miniature's unbiased one. {pages.counted(rows)} {pages.ERROR}")
        claim = "Words that are frequent in the reward's training captions steer, rare ones do not (S3)."
        page = pages.Page("Words that the reward has seldom read (S3)", claim, result, told, [(rows, styles.COLUMNS)])
        pages.write(own, "rare_words", page, pages.bar_figure(rows, ("painting", "alignment", "broken")))


if __name__ == "__main__":
    main()
