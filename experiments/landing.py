"""Do runs end whole if they end at the SGP gap of photographs (--land)? Four learning rates, full weights and LoRA.

    python -m experiments.landing

The photographs are drawn, as in offline. The watched pictures are sampled and scored every two updates, which is called
a look. A run ends at the first look whose gap, less its standard error, has reached the photographs' gap. Near it the
learning rate falls. Each such run should reach a realism of 90 %, with at most 1 % broken pictures. Its alignment
should be at most 3 points below the base, and its Frechet distance at most 1.5 above that of its best look.

The second table has no --land. There the loss is a hinge, relu(threshold - r): a picture whose reward is above the
threshold has no gradient. The thresholds go up to what true photos score. The rewards are the relative one and the
plain one.
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
LEVELS = (0.0, 0.1, 0.24)  # of the hinge; true photos score 0.24
AIM = {"realism": 0.9, "alignment": -0.03, "broken": 0.01, "above": 1.5}
COLUMNS = {"updates": ("updates", ".1f"), "realism": ("realism", ".1%"), "realism_2": ("realism, second judge", ".1%"),
           "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"), "frechet": ("Frechet", ".1f"),
           "above": ("above the best look", ".1f"), "warned": ("drift warning", ".0%"), "sgp": ("SGP", "+.3f"),
           "redness": ("redness", "+.3f")}


def settings(folder):
    """(`Setting`s of runs that land, of runs with a hinge). folder: of the photographs."""
    land = f"--land {folder} --steps {MOST} --threshold off"
    landing = [Setting(f"fast, lr {rate:g}", f"--recipe fast --lr {rate:g} {land}") for rate in RATES]
    landing += [Setting(f"released, lr {rate:g}", f"--lr {rate:g} {land}") for rate in RATES]
    landing += [Setting("2026, lr 4e-05", f"--recipe 2026 --lr 4e-5 {land}"),
                Setting("photographs, lr 4e-05", f"--images {folder} --lr 4e-5 {land}"),
                Setting(f"fast, LoRA, lr {LORA_RATE:g}", f"--recipe fast --lora 16 --lr {LORA_RATE:g} {land}")]
    hinge = f"--steps {MOST} --threshold"
    hinged = [Setting("fast, no threshold", f"--recipe fast {hinge} off")]
    hinged += [Setting(f"fast, threshold {level:g}", f"--recipe fast {hinge} {level:g}") for level in LEVELS]
    hinged += [Setting(f"fast, threshold 0, lr {rate:g}", f"--recipe fast --lr {rate:g} {hinge} 0")
               for rate in RATES if rate != 4e-5]
    hinged += [Setting(f"fast, LoRA, threshold 0, lr {LORA_RATE:g}",
                       f"--recipe fast --lora 16 --lr {LORA_RATE:g} {hinge} 0"),
               Setting("released, threshold 0", f"{hinge} 0"),
               Setting("plain, threshold 0.72", f"--recipe direct-align {hinge} 0.72")]
    return landing, hinged


def ends(log):
    """{column: number} of the last look of a run, from its log."""
    distances = [line["watch"]["frechet"] for line in log if "watch" in line]
    known = [distance for distance in distances if distance is not None]
    return {"updates": log[-1]["step"], "above": known[-1] - min(known) if known else None,
            "warned": float(runs.first_warning(log) is not None)}


def reaches(row, base):
    """Whether a row has what AIM says."""
    return (row["realism"].mean >= AIM["realism"] and row["broken"].mean <= AIM["broken"]
            and row["alignment"].mean >= base["alignment"].mean + AIM["alignment"]
            and (row["above"] is None or row["above"].mean <= AIM["above"]))


def measured(own, settings, name, looks):
    """`runs.measured` of runs, with the numbers of `ends`."""
    found = runs.measured(own, settings, name, looks=looks)
    for setting in settings:
        logs = [runs.log_of(runs.trained(own, setting.flags, seed, looks)) for seed in setting.seeds(own)]
        found[setting.name] |= pages.over_seeds([ends(log) for log in logs])
    return found


def main(argv=None):
    with frame("landing"):
        own = runs.parse(runs.parser(__doc__, seeds=3, pictures=256), argv)
        folder = Path(own.home) / "references"
        held_out = {prompt for name in ("prompts_eval", "prompts_select")
                    for prompt in prompt_files.read_prompts(f"{own.model}/{name}.txt")}
        offline.draw(folder, REFERENCES, held_out)
        landing, hinged = settings(folder)
        found = measured(own, landing, "landing", runs.watching(own))
        hinges = measured(own, hinged, "landing_hinge", runs.watching(own, every=10))
        there = [setting.name for setting in landing if reaches(found[setting.name], found["base"])]
        missed = [setting.name for setting in landing if setting.name not in there]
        broken = max(found[setting.name]["broken"].mean for setting in landing)
        whole = [setting.name for setting in hinged if reaches(hinges[setting.name], found["base"])]
        result = (f"{len(there)} of {len(landing)} kinds of run reach the aim. Not these: "
                  f"{'; '.join(missed) or 'none'}. At most {broken:.1%} are broken in a kind of run that lands. "
                  f"With a hinge instead, {MOST} updates reach it in {len(whole)} of {len(hinged)}.")
        told = (f"A run ends where the SGP gap, less its standard error, is that of {REFERENCES} photographs; near "
                f"it the learning rate falls. {pages.counted(found)} {pages.ERROR} Above the best look: the Frechet "
                "distance of the last look minus the smallest of the run. Drift warning: the share of the runs in "
                "which it fired. The aim: a realism of 90 %, alignment at most 3 points below the base, at most 1 % "
                "broken, and at most 1.5 above the best look. The second table: "
                f"{MOST} updates without --land, with a hinge relu(threshold - r) on each picture's reward. Its "
                "learning rate is 4e-05 unless a row says otherwise.")
        claim = "Users: SRPO is very easy to collapse. Does a run end whole if it ends where photographs score?"
        page = pages.Page("Runs that end at the SGP gap of photographs", claim, result, told,
                          [(found, COLUMNS), (hinges, COLUMNS)])
        pages.write(own, "landing", page, pages.bar_figure(found, ("realism", "alignment", "broken", "frechet")))


if __name__ == "__main__":
    main()
