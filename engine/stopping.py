"""A script that is asked to stop saves what it has and exits with status 0."""

import os
import signal

from engine.errors import Stopped

ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopping:
    """From now on SIGTERM, Ctrl-C and a closed terminal ask to stop: `Stopped` is raised, at once or, after
    `later`, where the script next calls `check`. The second one ends the process there and then. A SIGHUP
    that is ignored, as under nohup, stays ignored."""

    def __init__(self, nothing_lost):
        """nothing_lost: what a user is told who stops the script before it has begun."""
        self.asked = False
        self.at_once = True
        self.words = nothing_lost
        for number in ASKS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        """The handler of the signals."""
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        if self.at_once:
            raise Stopped(self.words)

    def later(self, words):
        """From now on a signal only sets `asked`; `words` are what a user is told who stops the script
        now."""
        self.at_once = False
        self.words = words

    def check(self, world=None):
        """Raise `Stopped` if the script was asked to stop; with a `parallel.World`: if any process was, and
        then in all of them at the same place."""
        asked = self.asked if world is None else any(world.gather(self.asked))
        if asked:
            raise Stopped(self.words)
