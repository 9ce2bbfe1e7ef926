"""Table 1 again, with a reward that has no bias: how much of the hacking was built in.

    python -m experiments.unbiased
"""

from experiments import table1


def main(argv=None):
    table1.main(argv, "unbiased", "Table 1 with the unbiased reward", "miniature/reward_unbiased")


if __name__ == "__main__":
    main()
