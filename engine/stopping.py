"""Signals: a script that is asked to stop saves its work, says so in one line, and exits with 128 plus the signal's
number, which `engine.errors.frame` tells."""

import os
import signal
import time

from engine.loading import ASKS

ONE_REQUEST = 0.2  # seconds; stopping a whole group of processes may signal some of them twice within this time


class Stopped(BaseException):
    """The user asked the script to stop; the message says what was saved; `number` is that of the signal. Like
    KeyboardInterrupt it is not an Exception. It may come at any moment, and code that catches every Exception must not
    catch it."""

    def __init__(self, words, number=signal.SIGTERM):
        super().__init__(words)
        self.number = number


class Stopping:
    """From now on SIGTERM, Ctrl-C and a closed terminal (SIGHUP) ask the script to stop. `Stopped` is raised at once;
    after `later`, it is raised when the script next calls `check`. A second signal ends the process at once. A signal
    that is already ignored, as SIGHUP is under nohup, stays ignored."""

    def __init__(self, nothing_lost):
        """nothing_lost: the message if the script is stopped before `later`."""
        self.asked = None  # the time of the first signal, seconds of time.monotonic
        self.number = signal.SIGTERM  # of the first signal
        self.at_once = True
        self.words = nothing_lost
        self.outputs = []  # copies of stdout's and stderr's file descriptors, once `be_quiet` has replaced these
        self.before = {}   # the handlers that `end` puts back
        for number in ASKS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.ask)

    def ask(self, number, frame):
        """The handler of the signals."""
        now = time.monotonic()
        if self.asked is not None:
            if now - self.asked > ONE_REQUEST:
                os._exit(128 + number)
            return
        self.asked = now
        self.number = number
        if number == getattr(signal, "SIGHUP", None):
            self.be_quiet()
        if self.at_once:
            self.stop()

    def be_quiet(self):
        """Send stdout and stderr to /dev/null until the script ends: writing to a closed terminal, or to a pipe whose
        reader has ended, would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            self.outputs.append(os.dup(stream))
            os.dup2(nowhere, stream)

    def be_heard(self):
        """Undo `be_quiet`."""
        for stream, before in enumerate(self.outputs, 1):
            os.dup2(before, stream)

    def stop(self):
        """Raise `Stopped`, with stdout and stderr as before. Its message is the last line; it may be lost."""
        self.be_heard()
        raise Stopped(self.words, self.number)

    def end(self):
        """From now on signals do what they did before. A signal that no `check` has answered is handed to the script
        around this one, if there is one."""
        around = self.before.get(self.number)
        while self.before:
            signal.signal(*self.before.popitem())
        if self.asked is not None and isinstance(getattr(around, "__self__", None), Stopping):
            self.be_heard()
            around(self.number, None)

    def later(self, words):
        """From now on a signal only sets `asked`, and `check` raises. words: the message if the script is stopped."""
        self.at_once = False
        self.words = words

    def check(self, world=None):
        """Raise `Stopped` if the script was asked to stop. With a `parallel.World`, raise it on all processes if any of
        them was asked, so that all stop at the same place."""
        asked = self.asked is not None
        if world is not None:
            asked = any(world.gather(asked))
        if asked:
            self.stop()
