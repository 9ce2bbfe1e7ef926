"""Fig. 8: other words than "realistic photo".

    python -m experiments.styles
"""

import sys

from engine.errors import frame
from experiments import runs
from experiments.runs import Setting

WORDS = [("realistic photo", "CG render"), ("dark", "bright"), ("bright", "dark"), ("painting", "print")]
COLUMNS = {"realism": ("realism", ".1%"), "brightness": ("brightness", ".3f"),
           "painting": ("painting", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%")}


def flags_of(words):
    """Of train.py, for a wanted and an unwanted word."""
    wanted, unwanted = words
    return f"--control '{wanted}' --neg '{unwanted}' --threshold off"


def main(argv=None):
    with frame("styles"):
        own = runs.parse(__doc__, sys.argv[1:] if argv is None else argv, seeds=3)
        settings = [Setting(f"{wanted} against {unwanted}", flags_of((wanted, unwanted)))
                    for wanted, unwanted in WORDS]
        rows = runs.measured(own, settings, "styles", WORDS[0][0])
        figure = runs.bar_figure(rows, ("realism", "brightness", "painting"),
                                 f"{own.pictures} pictures a seed, {own.seeds} seeds")
        told = (f"{own.pictures} held-out prompts, {own.seeds} seeds, mean ± standard deviation between "
                "them; brightness is the mean luma.")
        runs.write(own, "styles", "Other words (Fig. 8)", told, [(rows, COLUMNS)], figure)


if __name__ == "__main__":
    main()
