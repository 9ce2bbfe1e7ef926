"""The ledger of docs/ledger.md: where the released code departs from the paper.

    python -m experiments.ledger

Each row is the miniature's main run with one of these departures taken back.
"""

import sys

from engine.errors import frame
from experiments import runs
from experiments.runs import Setting

ROWS = [Setting("the main run", ""), Setting("D1", "--form cfg"), Setting("D2", "--form srp --lam 1 0.4"),
        Setting("D3", "--injections 2"), Setting("D4", "--form branches"),
        Setting("D6", "--recover epsilon"), Setting("D7", "--threshold 0.7"),
        Setting("D8", "--rollout-guidance 3.5"), Setting("D9", "--sigma-range 0.99 0.01"),
        Setting("D10", "--noise shared"), Setting("D11", "--meet call"), Setting("D12", "--shift off"),
        Setting("--recipe paper", "--recipe paper"), Setting("--branches denoise", "--branches denoise")]
COLUMNS = {"realism": ("realism", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"),
           "frechet": ("Frechet", ".1f"), "redness": ("redness", "+.3f"), "sgp": ("SGP", "+.3f")}


def main(argv=None):
    with frame("ledger"):
        own = runs.parse(__doc__, sys.argv[1:] if argv is None else argv, seeds=3)
        rows = runs.measured(own, ROWS, "ledger")
        figure = runs.bar_figure(rows, ("realism", "alignment", "broken"), runs.what_n_is(own))
        told = (f"{own.pictures} held-out prompts, {own.seeds} seeds, mean ± standard deviation between them. The rows "
                "are those of docs/ledger.md. D5 is measured with D6. D13, the words, is in [styles](styles.md).")
        runs.write(own, "ledger", "Where the released code departs from the paper", told, [(rows, COLUMNS)],
                   figure)


if __name__ == "__main__":
    main()
