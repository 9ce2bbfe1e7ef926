"""Table 1 with a reward that has no built-in bias. It shows how much of the hacking comes from the built-in bias.

    python -m experiments.unbiased
"""

from experiments import table1


def main(argv=None):
    table1.main(argv, "unbiased", "Table 1 with the unbiased reward", "miniature/reward_unbiased")


if __name__ == "__main__":
    main()
