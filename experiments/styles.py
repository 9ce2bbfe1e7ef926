"""Fig. 8: other words than "realistic photo".

    python -m experiments.styles

Each pair of words is trained for the recipe's updates and for half of them, because some words need fewer.
"""

import sys

import recipe
from engine.errors import frame
from experiments import runs
from experiments.runs import Setting

WORDS = [("realistic photo", "CG render"), ("dark", "bright"), ("bright", "dark"), ("painting", "print")]
COLUMNS = {"realism": ("realism", ".1%"), "brightness": ("brightness", ".3f"),
           "painting": ("painting", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%")}


def flags_of(words):
    """The flags of train.py for a pair of words: the wanted and the unwanted one."""
    wanted, unwanted = words
    return f"--control '{wanted}' --neg '{unwanted}' --threshold off"


def main(argv=None):
    with frame("styles"):
        own = runs.parse(__doc__, sys.argv[1:] if argv is None else argv, seeds=3)
        half = recipe.flags(["--model", own.model]).steps // 2
        settings = []
        for wanted, unwanted in WORDS:
            name = f"{wanted} against {unwanted}"
            flags = flags_of((wanted, unwanted))
            settings += [Setting(name, flags), Setting(f"{name}, {half} updates", f"{flags} --steps {half}")]
        rows = runs.measured(own, settings, "styles", WORDS[0][0])
        figure = runs.bar_figure(rows, ("realism", "brightness", "painting"), runs.what_n_is(own))
        told = (f"{own.pictures} held-out prompts, {own.seeds} seeds, mean ± standard deviation between them. "
                "Brightness is the mean luma.")
        runs.write(own, "styles", "Other words (Fig. 8)", told, [(rows, COLUMNS)], figure)


if __name__ == "__main__":
    main()
