"""Table 1 with a reward that has no built-in bias. It shows how much of the hacking comes from the built-in bias.

    python -m experiments.unbiased

The column "held-out reward" is the reward that is trained on.
"""

from engine.errors import frame
from experiments import runs, table1
from experiments.pages import shown


def verdict(found, apart):
    """What this page says of the biased reward's hacking."""
    reddest = max((setting.name for setting in table1.BASELINES), key=lambda name: found[name]["redness"].mean)
    near = found[reddest]["redness"].mean - found["base"]["redness"].mean < 0.02
    return (f"{'All of it' if near else 'Not all of it'} was built in: without the bias, the reddest baseline "
            f"({reddest}) has {shown(found[reddest]['redness'], '+.3f')}, the base "
            f"{shown(found['base']['redness'], '+.3f')}. SRPO's realism is {shown(found['SRPO']['realism'], '.1%')}.")


def main(argv=None):
    with frame("unbiased"):
        own = runs.parse(runs.parser(__doc__, pictures=256), argv)
        own.defaults["flags"] = f"--reward {runs.HELD_OUT}"
        own.flags = f"--reward {runs.HELD_OUT} {own.flags}".strip()
        claim = "A control: how much of the hacking in table1 comes from the bias that its reward was given?"
        table1.page(own, "unbiased", "Table 1 with the unbiased reward", claim, verdict)


if __name__ == "__main__":
    main()
