"""Do runs end whole if they end at the SGP gap of photographs (--land)? Four learning rates, full weights and LoRA.

    python -m experiments.landing

The photographs are drawn, as in offline. There is a look at the watched pictures every two updates, and a run ends at
the first one that has reached the photographs' gap. The table is of the held-out prompts. Only "above the best" is of
the watched pictures: the Frechet distance of the last look minus the smallest of the run.
"""

import sys
from pathlib import Path

from engine.data import prompt_files
from engine.errors import frame
from experiments import offline, runs
from experiments.runs import Setting

REFERENCES = 256  # photographs
MOST = 200  # updates
RATES = (2e-5, 4e-5, 8e-5, 16e-5)  # half to four times the usual
LORA_RATE = 5e-4
BEYOND = 52  # updates of the run without --land: twice the recipe's
COLUMNS = {"updates": ("updates", ".1f"), "realism": ("realism", ".1%"), "realism_2": ("realism, second judge", ".1%"),
           "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"), "frechet": ("Frechet", ".1f"),
           "above": ("above the best", ".1f"), "sgp": ("SGP", "+.3f"), "redness": ("redness", "+.3f")}


def settings(folder):
    """The rows: runs that land, and runs that do not. folder: of the photographs."""
    land = f"--land {folder} --steps {MOST} --threshold off"
    rows = [Setting(f"fast, lr {rate:g}", f"--recipe fast --lr {rate:g} {land}") for rate in RATES]
    rows += [Setting(f"released, lr {rate:g}", f"--lr {rate:g} {land}") for rate in RATES[1:]]
    rows += [Setting(f"fast, LoRA, lr {LORA_RATE:g}", f"--recipe fast --lora 16 --lr {LORA_RATE:g} {land}"),
             Setting(f"fast without --land, {BEYOND} updates", f"--recipe fast --threshold off --steps {BEYOND}")]
    return rows


def ends(log):
    """{column: number} of where a run ended, from its log."""
    distances = [line["watch"]["frechet"] for line in log if "watch" in line]
    known = [distance for distance in distances if distance is not None]
    return {"updates": log[-1]["step"], "above": known[-1] - min(known) if known else None}


def main(argv=None):
    with frame("landing"):
        own = runs.parse(__doc__, sys.argv[1:] if argv is None else argv, seeds=3, pictures=256)
        folder = Path(own.home) / "references"
        held_out = {prompt for name in ("prompts_eval", "prompts_select")
                    for prompt in prompt_files.read_prompts(f"{own.model}/{name}.txt")}
        offline.draw(folder, REFERENCES, held_out)
        looks = runs.watching(own)
        rows = settings(folder)
        found = runs.measured(own, rows, "landing", looks=looks)
        for setting in rows:
            logs = [runs.log_of(runs.trained(own, setting.flags, seed, looks)) for seed in range(own.seeds)]
            found[setting.name] |= runs.over_seeds([ends(log) for log in logs])
        figure = runs.bar_figure(found, ("realism", "alignment", "broken", "frechet"), runs.what_n_is(own))
        told = (f"A run ends at the SGP gap of {REFERENCES} photographs. {own.pictures} pictures of held-out prompts, "
                f"{own.seeds} seeds, mean ± standard deviation between them.")
        runs.write(own, "landing", "Runs that end at the SGP gap of photographs", told, [(found, COLUMNS)], figure)


if __name__ == "__main__":
    main()
