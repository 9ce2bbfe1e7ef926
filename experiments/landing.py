"""Do runs end whole if they end at the SGP gap of photographs (--land)? Four learning rates, full weights and LoRA.

    python -m experiments.landing

The photographs are drawn, as in offline. There is a look at the watched pictures every two updates, and a run ends at
the first one that has reached the photographs' gap. The aim of each such run: realism of 90 %, alignment at most 3
points below the base, at most 1 % broken, and a Frechet distance at most 1.5 above the best look of the run.

The last rows do not land. A hinge relu(threshold - r) takes the gradient from each picture by itself: at what true
photos score, with the relative reward and with the plain one.
"""

from pathlib import Path

from engine.data import prompt_files
from engine.errors import frame
from experiments import offline, pages, runs
from experiments.runs import Setting

REFERENCES = 256  # photographs
MOST = 200  # updates
RATES = (2e-5, 4e-5, 8e-5, 16e-5)  # half to four times the usual
LORA_RATE = 5e-4
BEYOND = 52  # updates of the runs that do not land: twice the recipe's
AIM = {"realism": 0.9, "alignment": -0.03, "broken": 0.01, "above": 1.5}
COLUMNS = {"updates": ("updates", ".1f"), "realism": ("realism", ".1%"), "realism_2": ("realism, second judge", ".1%"),
           "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"), "frechet": ("Frechet", ".1f"),
           "above": ("above the best look", ".1f"), "sgp": ("SGP", "+.3f"), "redness": ("redness", "+.3f")}


def settings(folder):
    """(`Setting`s of runs that land, of runs that do not). folder: of the photographs."""
    land = f"--land {folder} --steps {MOST} --threshold off"
    landing = [Setting(f"fast, lr {rate:g}", f"--recipe fast --lr {rate:g} {land}") for rate in RATES]
    landing += [Setting(f"released, lr {rate:g}", f"--lr {rate:g} {land}") for rate in RATES]
    landing += [Setting("2026, lr 4e-05", f"--recipe 2026 --lr 4e-5 {land}"),
                Setting("photographs, lr 4e-05", f"--images {folder} --lr 4e-5 {land}"),
                Setting(f"fast, LoRA, lr {LORA_RATE:g}", f"--recipe fast --lora 16 --lr {LORA_RATE:g} {land}")]
    beyond = [Setting(f"fast, not landed, {BEYOND} updates", f"--recipe fast --threshold off --steps {BEYOND}"),
              Setting(f"fast, threshold 0.24, {BEYOND} updates", f"--recipe fast --threshold 0.24 --steps {BEYOND}"),
              Setting(f"plain, threshold 0.72, {BEYOND} updates",
                      f"--recipe direct-align --threshold 0.72 --steps {BEYOND}")]
    return landing, beyond


def ends(log):
    """{column: number} of where a run ended, from its log."""
    distances = [line["watch"]["frechet"] for line in log if "watch" in line]
    known = [distance for distance in distances if distance is not None]
    return {"updates": log[-1]["step"], "above": known[-1] - min(known) if known else None}


def reaches(row, base):
    """Whether a row has what AIM says."""
    return (row["realism"].mean >= AIM["realism"] and row["broken"].mean <= AIM["broken"]
            and row["alignment"].mean >= base["alignment"].mean + AIM["alignment"]
            and (row["above"] is None or row["above"].mean <= AIM["above"]))


def main(argv=None):
    with frame("landing"):
        own = runs.parse(runs.parser(__doc__, seeds=3, pictures=256), argv)
        folder = Path(own.home) / "references"
        held_out = {prompt for name in ("prompts_eval", "prompts_select")
                    for prompt in prompt_files.read_prompts(f"{own.model}/{name}.txt")}
        offline.draw(folder, REFERENCES, held_out)
        looks = runs.watching(own)
        landing, beyond = settings(folder)
        found = runs.measured(own, [*landing, *beyond], "landing", looks=looks)
        for setting in (*landing, *beyond):
            logs = [runs.log_of(runs.trained(own, setting.flags, seed, looks)) for seed in setting.seeds(own)]
            found[setting.name] |= pages.over_seeds([ends(log) for log in logs])
        there = [setting.name for setting in landing if reaches(found[setting.name], found["base"])]
        missed = [setting.name for setting in landing if setting.name not in there]
        broken = max(found[setting.name]["broken"].mean for setting in landing)
        result = (f"{len(there)} of {len(landing)} kinds of run reach the aim. Not these: "
                  f"{'; '.join(missed) or 'none'}. At most {broken:.1%} are broken in a kind of run that lands.")
        told = (f"A run ends at the SGP gap of {REFERENCES} photographs. {pages.counted(found)} {pages.ERROR} Above "
                "the best look: the Frechet distance of the last look minus the smallest of the run. The aim: a "
                "realism of 90 %, alignment at most 3 points below the base, at most 1 % broken, and at most 1.5 above "
                "the best look.")
        claim = "Users: SRPO is very easy to collapse. Does a run end whole if it ends where photographs score?"
        page = pages.Page("Runs that end at the SGP gap of photographs", claim, result, told, [(found, COLUMNS)])
        pages.write(own, "landing", page, pages.bar_figure(found, ("realism", "alignment", "broken", "frechet")))


if __name__ == "__main__":
    main()
