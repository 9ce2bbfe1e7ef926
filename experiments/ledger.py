"""The ledger of docs/ledger.md: where the released code departs from the paper.

    python -m experiments.ledger

Each row is the miniature's main run with one of these departures taken back.
"""

from engine.errors import frame
from experiments import pages, runs
from experiments.runs import Setting

ROWS = [Setting("the main run", ""), Setting("Eq. 11's form (D1)", "--form cfg"),
        Setting("lambda(t) multiplies the reward (D2)", "--form srp --lam 1 0.4"),
        Setting("two injections (D3)", "--injections 2"), Setting("a text for each branch (D4)", "--form branches"),
        Setting("epsilon-prediction (D6)", "--recover epsilon"), Setting("threshold 0.7 (D7)", "--threshold 0.7"),
        Setting("one guidance, 3.5 (D8)", "--rollout-guidance 3.5"),
        Setting("the full trajectory (D9)", "--sigma-range 0.99 0.01"),
        Setting("one noise for all images (D10)", "--noise shared"),
        Setting("the branches called at one level (D11)", "--meet call"), Setting("no shift (D12)", "--shift off"),
        Setting("--recipe paper", "--recipe paper"), Setting("the denoising branch alone", "--branches denoise")]
COLUMNS = {"realism": ("realism", ".1%"), "alignment": ("alignment", ".1%"), "broken": ("broken", ".1%"),
           "frechet": ("Frechet", ".1f"), "redness": ("redness", "+.3f"), "sgp": ("SGP", "+.3f")}


def main(argv=None):
    with frame("ledger"):
        own = runs.parse(runs.parser(__doc__, seeds=3), argv)
        rows = runs.measured(own, ROWS, "ledger")
        least = rows["the main run"]["realism"].mean - 0.1
        slower = [name for name, row in rows.items() if name != "base" and row["realism"].mean < least]
        result = ("Most departures change little in the recipe's updates. Realism falls by more than 10 points with: "
                  f"{', '.join(slower) or 'none of them'}.")
        told = (f"{pages.counted(rows)} {pages.ERROR} The numbers D1 to D12 are those of docs/ledger.md. D5 is "
                "measured with D6. D13, the words, is in [styles](styles.md).")
        claim = "The released code departs from the paper; does it matter?"
        page = pages.Page("Where the released code departs from the paper", claim, result, told, [(rows, COLUMNS)])
        pages.write(own, "ledger", page, pages.bar_figure(rows, ("realism", "alignment", "broken")))


if __name__ == "__main__":
    main()
