"""The authors' second recipe (Qwen-Image, February 2026), --recipe 2026, against the released one.

    python -m experiments.second_recipe
"""

from engine.errors import frame
from experiments import pages, runs, table1
from experiments.pages import shown
from experiments.runs import Setting

ROWS = [Setting("released", "--threshold off"), Setting("2026", "--recipe 2026"),
        Setting("fast", "--recipe fast --threshold off")]
COLUMNS = table1.COLUMNS


def main(argv=None):
    with frame("second_recipe"):
        own = runs.parse(runs.parser(__doc__, pictures=256), argv)
        rows, _ = table1.measure(own, ROWS, "second_recipe")
        ours, theirs = rows["2026"], rows["released"]
        result = pages.verdict(
            ours["realism"].mean >= theirs["realism"].mean - 0.02 and ours["broken"].mean <= 0.01,
            f"realism {shown(ours['realism'], '.1%')}, with the released recipe {shown(theirs['realism'], '.1%')}. It "
            f"goes farther beyond the truth: Frechet {shown(ours['frechet'], '.1f')} and "
            f"{shown(theirs['frechet'], '.1f')}.")
        claim = "Denoising alone is enough, without inversion, if lambda(t) multiplies the reward (the authors, 2026)."
        page = pages.Page("The authors' second recipe", claim, result, f"{pages.counted(rows)} {pages.ERROR}",
                          [(rows, COLUMNS)])
        pages.write(own, "second_recipe", page, pages.bar_figure(rows, ("realism", "frechet", "redness")))


if __name__ == "__main__":
    main()
