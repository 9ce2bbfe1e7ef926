"""A run that is asked to stop saves what it has and exits with status 0."""

import signal
import sys

ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopping:
    """From now on SIGTERM, Ctrl-C and a closed terminal set `asked`, and the run stops where it next looks;
    the second one ends it at once. A SIGHUP that is ignored, as under nohup, stays ignored."""

    def __init__(self):
        self.asked = False
        for number in ASKS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.asked:
            sys.exit(128 + number)
        self.asked = True
