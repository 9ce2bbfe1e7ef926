"""A LoRA in place of full weights: which learning rate it needs, and its results.

    python -m experiments.lora

The rate in the miniature's srpo.json is lora_lr. It is the smallest of RATES that reaches the goal of `margin` after
the recipe's updates: the share of photos among the pictures of the selection prompts.
"""

from engine.errors import frame
from experiments import margin, pages, runs
from experiments.pages import shown
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
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        rates = {}
        for rate in RATES:
            logs = [runs.watched(own, f"{LORA} --lr {rate:g}", seed, margin.PICTURES, margin.EVERY)
                    for seed in range(own.seeds)]
            rates[f"LoRA, learning rate {rate:g}"] = pages.over_seeds([at_the_end(log) for log in logs])
        found = runs.measured(own, [Setting("full weights", ""), Setting("LoRA", LORA)], "lora")
        ours, theirs = found["LoRA"]["realism"], found["full weights"]["realism"]
        result = pages.verdict(ours.mean >= theirs.mean - 0.02,
                               f"realism {shown(ours, '.1%')}, with full weights {shown(theirs, '.1%')}.")
        told = (f"Rank 16, beside all linear layers of the blocks. The first table has the rates, for "
                f"{runs.n_watched(own, margin.PICTURES)} selection prompts and {own.seeds} seeds. The second has the "
                f"chosen rate. {pages.counted(found)} {pages.ERROR}")
        claim = "A LoRA trains as well as full weights (ours; the paper trains full weights)."
        page = pages.Page("A LoRA", claim, result, told, [(rates, COLUMNS), (found, COLUMNS)])
        pages.write(own, "lora", page, pages.bar_figure(rates, ("realism", "alignment", "broken")))


if __name__ == "__main__":
    main()
