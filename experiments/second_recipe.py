"""The authors' second recipe (Qwen-Image, February 2026), --recipe 2026, against the released one.

    python -m experiments.second_recipe
"""

import sys

from engine.errors import frame
from experiments import runs, table1
from experiments.runs import Setting

ROWS = [Setting("released", "--threshold off"), Setting("2026", "--recipe 2026"),
        Setting("fast", "--recipe fast --threshold off")]
COLUMNS = {name: column for name, column in table1.COLUMNS.items() if name != "seconds"}


def main(argv=None):
    with frame("second_recipe"):
        argv = sys.argv[1:] if argv is None else argv
        own = runs.parse(__doc__, argv, pictures=256)
        rows = table1.measure(own, ROWS, "second_recipe")
        figure = runs.bar_figure(rows, ("realism", "frechet", "redness"), runs.what_n_is(own))
        told = (f"{own.pictures // table1.PER_PROMPT} held-out prompts, {table1.PER_PROMPT} pictures of each, "
                f"{own.seeds} seeds, mean ± standard deviation between them.")
        runs.write(own, "second_recipe", "The authors' second recipe", told,
                   [(rows, COLUMNS)], figure)


if __name__ == "__main__":
    main()
