"""A script that is asked to stop saves what it has and exits with status 0."""

import os
import signal
import time

from engine.errors import Stopped

ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ONE_REQUEST = 0.2  # seconds: who stops a whole group of processes reaches some of them twice


class Stopping:
    """From now on SIGTERM, Ctrl-C and a closed terminal ask to stop: `Stopped` is raised, at once or, after
    `later`, where the script next calls `check`. The second one ends the process there and then. A SIGHUP
    that is ignored, as under nohup, stays ignored."""

    def __init__(self, nothing_lost):
        """nothing_lost: what a user is told who stops the script before it has begun."""
        self.asked = None  # when, by the clock
        self.at_once = True
        self.words = nothing_lost
        self.outputs = []  # where stdout and stderr went before the terminal was closed
        for number in ASKS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        """The handler of the signals."""
        now = time.monotonic()
        if self.asked is not None:
            if now - self.asked > ONE_REQUEST:
                os._exit(128 + number)
            return
        self.asked = now
        if number == signal.SIGHUP:
            self.be_quiet()
        if self.at_once:
            self.stop()

    def be_quiet(self):
        """Write nothing until the script ends: in a terminal that is closed, or to a reader that left with
        it, any line would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            self.outputs.append(os.dup(stream))
            os.dup2(nowhere, stream)

    def stop(self):
        """Raise `Stopped`. Its words are the last, and may be lost."""
        for stream, before in enumerate(self.outputs, 1):
            os.dup2(before, stream)
        raise Stopped(self.words)

    def later(self, words):
        """From now on a signal only sets `asked`; `words` are what a user is told who stops the script
        now."""
        self.at_once = False
        self.words = words

    def check(self, world=None):
        """Raise `Stopped` if the script was asked to stop; with a `parallel.World`: if any process was, and
        then in all of them at the same place."""
        asked = self.asked is not None
        if world is not None:
            asked = any(world.gather(asked))
        if asked:
            self.stop()
