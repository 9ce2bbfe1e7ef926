"""A LoRA in place of full weights: which learning rate it needs, and its results.

    python -m experiments.lora

The rate in the miniature's srpo.json is lora_lr. It is the smallest of RATES that reaches the goal of `margin` after
the recipe's updates: the share of photos among the pictures of the selection prompts.
"""

import sys

from engine.errors import frame
from experiments import margin, runs
from experiments.runs import Setting

LORA = "--lora 16"
RATES = (2e-4, 3e-4, 4e-4, 5e-4, 6e-4)
COLUMNS = {"realism": ("realism", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"),
           "frechet": ("Frechet", ".1f"), "sgp": ("SGP", "+.3f")}


def at_the_end(log):
    """{column: number} of the last look at the watched pictures."""
    return {column: log[-1]["watch"][column] for column in COLUMNS}


def main(argv=None):
    with frame("lora"):
        own = runs.parse(__doc__, sys.argv[1:] if argv is None else argv, seeds=3)
        rates = {}
        for rate in RATES:
            log = runs.watched(own, f"{LORA} --lr {rate:g}", 0, margin.PICTURES, margin.EVERY)
            rates[f"LoRA, learning rate {rate:g}"] = runs.over_seeds([at_the_end(log)])
        found = runs.measured(own, [Setting("full weights", ""), Setting("LoRA", LORA)], "lora")
        figure = runs.bar_figure(rates, ("realism", "alignment", "broken"), "104 pictures, seed 0")
        told = ("Rank 16, beside all linear layers of the blocks. The first table has the rates, for "
                f"{min(margin.PICTURES, own.pictures)} selection prompts and seed 0. The second has the chosen rate, "
                f"for {own.pictures} held-out prompts and {own.seeds} seeds, mean ± standard deviation between them.")
        runs.write(own, "lora", "A LoRA", told, [(rates, COLUMNS), (found, COLUMNS)], figure)


if __name__ == "__main__":
    main()
