"""Table 1 again, with a reward that has no bias: how much of the hacking was built in.

    python -m experiments.unbiased
"""

import sys

from experiments import table1


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    table1.main([*argv, "--flags", "--reward miniature/reward_unbiased"], "unbiased",
                "Table 1 with the unbiased reward")


if __name__ == "__main__":
    main()
