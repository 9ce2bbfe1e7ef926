"""How many updates to train, and when training breaks: five learning rates, up to three times the recipe's updates.

    python -m experiments.margin

Everything is measured on the selection prompts (--watch-prompts), which are never evaluated. A rule chooses the recipe,
on seed 0. For each learning rate, the number of updates is the first look at which GOAL of the pictures are photos. The
rate is safe if at most SAFE of the pictures are broken until 1.5 times that number. Only rates with at most MOST
updates, half a minute on one core, are considered. Of the safe ones, the rule chooses the rate whose pictures are
nearest to true photos (the Frechet distance). Broken pictures have melted or damaged parts.
"""

from engine.errors import frame
from experiments import pages, runs

RATES = (1e-5, 2e-5, 4e-5, 6e-5, 8e-5)
UPDATES = 84
EVERY = 2  # updates between two looks
PICTURES = runs.SELECTION
GOAL = 0.85  # share of photos
SAFE = 0.02  # largest share of broken pictures of a safe rate
MOST = 30  # updates
FALL = 0.05  # fall of alignment below the first look's
COLUMNS = {"updates": ("updates", ".0f"), "realism": ("realism", ".1%"), "alignment": ("alignment", ".1%"),
           "broken": ("broken", ".1%"), "frechet": ("Frechet", ".1f"), "saturation": ("saturation", ".3f"),
           "fallen": ("alignment falls 5 points at", ".0f"),
           "broken_2": (f"broken passes {SAFE:.0%} at".replace("%", " %"), ".0f"), "broken_5": ("5 % at", ".0f")}


def looks_of(log):
    """The lines of a log that have a look at the watched pictures."""
    return [line for line in log if "watch" in line]


def arrival(log):
    """The line of the first look at which GOAL of the pictures are photos; None if there is none."""
    return runs.first(looks_of(log), lambda line: line["watch"]["realism"] >= GOAL)


def is_safe(log):
    """Whether a run reaches GOAL within MOST updates, and at most SAFE of its pictures are broken until 1.5 times
    that update. A run whose log ends earlier is not safe."""
    arrived = arrival(log)
    if arrived is None or arrived["step"] > MOST or log[-1]["step"] < 1.5 * arrived["step"]:
        return False
    until = [line for line in looks_of(log) if line["step"] <= 1.5 * arrived["step"]]
    return all(line["watch"]["broken"] <= SAFE for line in until)


def alignment_falls(log):
    """The update of the first look whose alignment is more than FALL below the first look's; None if there is none."""
    least = looks_of(log)[0]["watch"]["alignment"] - FALL
    return runs.first_step(log, "alignment", lambda value: value < least)


def numbers(log):
    """{column: number} of a run, at the look when it reaches GOAL; None for what it never reaches."""
    arrived = arrival(log)
    row = {name: arrived and arrived["watch"][name]
           for name in ("realism", "alignment", "broken", "frechet", "saturation")}
    row["updates"] = arrived and arrived["step"]
    row["fallen"] = alignment_falls(log)
    row["broken_2"] = runs.first_step(log, "broken", lambda value: value > SAFE)
    row["broken_5"] = runs.breaks(log)
    return row


def chosen(logs):
    """The learning rate that the rule chooses from {rate: log}; None if no rate is safe."""
    safe = [rate for rate, log in logs.items() if is_safe(log)]
    return min(safe, key=lambda rate: arrival(logs[rate])["watch"]["frechet"], default=None)


def main(argv=None):
    with frame("margin"):
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        rows = {}
        first = {}
        for rate in RATES:
            flags = f"--lr {rate:g} --steps {UPDATES} --threshold off"
            logs = [runs.watched(own, flags, seed, PICTURES, EVERY) for seed in range(own.seeds)]
            first[rate] = logs[0]
            rows[f"learning rate {rate:g}"] = pages.over_seeds([numbers(log) for log in logs])
        rate = chosen(first)
        result = f"None of these learning rates reaches a realism of {GOAL:.0%} safely."
        if rate is not None:
            result = f"The rule chooses `--lr {rate:g} --steps {arrival(first[rate])['step']}` (seed 0)."
        pictures = runs.n_watched(own, PICTURES)
        told = (f"Pictures of {pictures} selection prompts, {own.seeds} seeds, with a look every {EVERY} updates: at "
                f"the first look at which {GOAL:.0%} are photos, and when they break. {pages.ERROR_OF_SEEDS}")
        figure = pages.curve_figure({f"lr {rate:g}": log for rate, log in first.items()},
                                    ("realism", "alignment", "broken", "frechet"),
                                    f"{pictures} pictures every {EVERY} updates, seed 0")
        page = pages.Page("The recipe's margin", "How many updates, and when does training break?", result, told,
                          [(rows, COLUMNS)])
        pages.write(own, "margin", page, figure)


if __name__ == "__main__":
    main()
