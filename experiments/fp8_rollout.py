"""A rollout whose products are in float8, --rollout-dtype fp8: what it costs.

    python -m experiments.fp8_rollout

The rollout has no gradient, and Direct-Align recovers any clean image from known noise. So its factors may be rounded:
every row of a weight, and every token of what it multiplies, to float8 with a scale. On a CPU the products are of the
same numbers as on a GPU that has products in float8; only a GPU is faster by it.
"""

from engine.errors import frame
from experiments import pages, runs
from experiments.fast import COLUMNS, FAST
from experiments.pages import shown
from experiments.runs import Setting

FP8 = "--rollout-dtype fp8"
NEAR = 0.02  # realism and alignment may differ by so much


def main(argv=None):
    with frame("fp8_rollout"):
        own = runs.parse(runs.parser(__doc__), argv)
        settings = [Setting("released", ""), Setting("released, float8", FP8), Setting("fast", FAST),
                    Setting("fast, float8", f"{FAST} {FP8}")]
        found = runs.measured(own, settings, "fp8_rollout")
        holds = True
        told = []
        for name in ("released", "fast"):
            for column in ("realism", "alignment"):
                ours, theirs = found[f"{name}, float8"][column], found[name][column]
                holds = holds and ours.mean >= theirs.mean - NEAR
                told.append(f"{column} of {name} {shown(ours, '.1%')}, without float8 {shown(theirs, '.1%')}")
        result = f"{'It costs nothing' if holds else 'It costs something'}: {'; '.join(told)}."
        words = f"{pages.counted(found)} {pages.ERROR}"
        claim = "A rollout may multiply in float8 (ours)."
        page = pages.Page("A rollout in float8", claim, result, words, [(found, COLUMNS)])
        pages.write(own, "fp8_rollout", page, pages.bar_figure(found, ("realism", "alignment", "broken")))


if __name__ == "__main__":
    main()
