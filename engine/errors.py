"""A user's mistake is one line and exit status 2: what is wrong, the value seen, what to do."""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta


class UserError(ValueError):
    """What a user can mend, in one line."""


class Stopped(BaseException):
    """The user asked to stop; the message says what was saved. As KeyboardInterrupt it is no Exception: it
    may come at any moment, and whoever makes a one-line error of all exceptions must not take it for one."""


class NotFinite(Exception):
    """A NaN or an infinity, met before it could be saved; the message says where, and what is kept."""


def printable(text):
    """`text` with control characters, and the escape sequences that begin with them, shown instead of obeyed:
    a prompt or a file name cannot repaint the terminal. Line breaks become spaces."""
    shown = []
    for character in str(text).replace("\n", " "):
        shown.append(character if character.isprintable() else repr(character)[1:-1])
    return "".join(shown)


def shortened(text, most=1000):
    """A text, its middle left out if it is very long: a user reads the line, not the mistake in full."""
    return text if len(text) <= most else f"{text[:most - 200]} ... {text[-200:]}"


def one_line(error):
    """The first line of what an exception says, 200 characters at most; its type's name if it is silent."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0][:200]


PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
                "remote process exited")


def say_last(text, file):
    """Print the last line of a script. Where nobody can read it any more, as in a terminal that was closed,
    it is lost, and the script ends no other way for it."""
    try:
        print(text, file=file, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())  # what is left in the buffer is flushed at the end


def is_out_of_memory(error):
    """Whether an error is that of a machine, or its GPU, that holds no more."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def processes():
    """torch.distributed, if it has been imported: a mistake in the flags is answered before. Otherwise None."""
    return sys.modules.get("torch.distributed")


def are_many():
    """Whether this process has met others."""
    dist = processes()
    return dist is not None and dist.is_initialized() and dist.get_world_size() > 1


def leave_note(name, text):
    """Leave a note where all processes can look, for as long as the first one lives."""
    dist = processes()
    try:
        dist.distributed_c10d._get_default_store().set(name, text)
    except dist.DistError:
        pass


def find_note(name, seconds, if_gone=None):
    """What another process noted; None if it does not within some seconds; `if_gone` if the first process has
    left, and took the notes along."""
    dist = processes()
    store = dist.distributed_c10d._get_default_store()
    try:
        store.wait([name], timedelta(seconds=seconds))
        return store.get(name).decode()
    except dist.DistNetworkError:
        return if_gone
    except dist.DistStoreError:
        return None


def another_says(rank):
    """Whether the first process says for this one too why they end: all of them meet the same files, and the
    same full disk. One that finds no word of it within some seconds has met something of its own."""
    if not are_many():
        return rank > 0  # they have not met, and read the same command line
    if rank == 0:
        leave_note("why", "said")
        return False
    return find_note("why", seconds=5, if_gone="said") is not None


def status_of(script, error, rank):
    """Say what ended a script in one line, once for all processes; its exit status. None, and not a word, for
    an error that is not its user's."""
    text = str(error)
    if isinstance(error, RuntimeError) and are_many() and any(words in text for words in PEER_IS_GONE):
        # An exchange failed because another process has left. Either that was asked to stop, or it has died
        # and shows its own error.
        stopped = find_note("stopped", seconds=1)
        if stopped is None:
            return 1
        error, text = Stopped(), stopped
    if isinstance(error, Stopped):
        if are_many():
            leave_note("stopped", text)
        if rank == 0:
            say_last(f"\n{script}: {printable(text)}", sys.stdout)
        return 0
    if isinstance(error, KeyboardInterrupt):
        say_last(f"\n{script}: interrupted", sys.stderr)
        return 130
    if is_out_of_memory(error):
        say_last(f"\n{script}: out of memory: {one_line(error)}; what helps: a smaller --size or --batch",
                 sys.stderr)
        return 1
    if isinstance(error, UserError | OSError | NotFinite):
        if not another_says(rank):
            where = f"rank {rank}: " if rank else ""
            begin = "" if isinstance(error, UserError) else "\n"  # leave the line of a progress bar
            say_last(f"{begin}{script}: {where}{shortened(printable(text))}", sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return None


@contextmanager
def frame(script):
    """What every script runs in. A `UserError` is one line and exit status 2; a full, vanished or read-only
    disk, or a number that is not finite, is one line and status 1: what was written before stays. Being
    asked to stop is status 0. Of many processes the first one says it.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except (Exception, KeyboardInterrupt, Stopped) as error:
        status = status_of(script, error, rank)
        if status is None:
            raise
        if status:
            sys.exit(status)
