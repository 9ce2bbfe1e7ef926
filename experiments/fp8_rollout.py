"""A rollout whose products are in float8, --rollout-dtype fp8: what it costs.

    python -m experiments.fp8_rollout

The rollout has no gradient, and Direct-Align recovers any clean image from known noise. So the factors of its products
may be rounded to float8, with a scale for every row of a weight and for every token. A CPU multiplies the same numbers
as a GPU with float8 does. Only the GPU is faster by it.
"""

from engine.errors import frame
from experiments import pages, runs
from experiments.fast import COLUMNS
from experiments.pages import shown
from experiments.runs import Setting

FP8 = "--rollout-dtype fp8"
NEAR = 0.02  # realism and alignment may be lower by so much


def main(argv=None):
    with frame("fp8_rollout"):
        own = runs.parse(runs.parser(__doc__), argv)
        settings = [Setting("released", ""), Setting("the rollout in float8", FP8)]
        found = runs.measured(own, settings, "fp8_rollout")
        ours, theirs = found["the rollout in float8"], found["released"]
        holds = all(ours[column].mean >= theirs[column].mean - NEAR for column in ("realism", "alignment"))
        result = pages.verdict(holds, "; ".join(
            f"{column} {shown(ours[column], '.1%')}, released {shown(theirs[column], '.1%')}"
            for column in ("realism", "alignment", "broken")) + ".")
        words = f"{pages.counted(found)} {pages.ERROR}"
        claim = "A rollout may multiply in float8: realism and alignment stay within 2 points (ours)."
        page = pages.Page("A rollout in float8", claim, result, words, [(found, COLUMNS)])
        pages.write(own, "fp8_rollout", page, pages.bar_figure(found, ("realism", "alignment", "broken")))


if __name__ == "__main__":
    main()
