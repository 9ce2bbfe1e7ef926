"""A user's mistake ends a script with one line and exit status 2. The line says what is wrong, the value seen, and
what to do."""

import errno
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

from engine.loading import loaded
from engine.stopping import Stopped, Stopping


class UserError(ValueError):
    """A mistake that the user can correct; the message is one line."""


class NotFinite(Exception):
    """A NaN or an infinity, found before it was saved; the message says where it is, and what is kept."""


def printable(text):
    """`text` with each control character written as its escape code, so that a prompt or a file name cannot change
    the terminal. Line breaks become spaces."""
    shown = []
    for character in str(text).replace("\n", " "):
        shown.append(character if character.isprintable() else repr(character)[1:-1])
    return "".join(shown)


def shortened(text, most=1000):
    """A text of at most about `most` characters: the middle of a longer one is replaced by " ... "."""
    return text if len(text) <= most else f"{text[:most - 200]} ... {text[-200:]}"


def one_line(error):
    """The first line of an exception's message, with the second if it ends in a colon, at most 200 characters; its
    type's name if it has no message. torch's message about a pickle that would run code advises to run it, so it is
    replaced."""
    if "weights_only" in str(error):
        return "holds more than tensors, which could run code, so it is not read; save the tensors alone"
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    text = " ".join(" ".join(lines[:2]).split()) if lines[0].endswith(":") else lines[0]
    return text[:200]


PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
                "remote process exited")


def say_last(text, file):
    """Print the last line of a script. If it cannot be written, as in a closed terminal, it is lost, and the exit
    status stays the same."""
    try:
        print(text, file=file, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())  # at exit Python writes out the rest of the buffer, which must not fail


# What torch's allocators say, for a size that is too large or that does not even fit their numbers.
MEMORY_IS_FULL = ("not enough memory", "can't allocate memory", "out of memory", "Storage size calculation overflowed",
                  "Invalid buffer size", "numel: integer multiplication overflow")
# The errors of a disk that is full, broken or gone: no mistake of the user's.
DISK_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENODEV, errno.ESTALE, errno.EFBIG)


def is_out_of_memory(error):
    """Whether an error says that the memory of the machine, or of its GPU, is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY_IS_FULL)


# ------------------------------------------------------------------------------------------- several processes
def rank_here():
    """This process's rank, as torchrun's environment says; 0 without torchrun. Raises UserError for an environment that
    torchrun does not make."""
    found = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdecimal()):
            raise UserError(f"{name}={value} in the environment: must be a whole number, as torchrun sets it; for one "
                            f"process: unset {name}")
        found[name] = None if value is None else int(value)
    needed = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}
    there = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if found[name] is not None]
    missing = sorted(name for name in needed if found[name] is None)
    if there and not os.environ.get("MASTER_ADDR"):
        missing.append("MASTER_ADDR")
    if there and missing:
        raise UserError(f"{there[0]}={found[there[0]]} in the environment, but no {', '.join(missing)}: torchrun sets "
                        f"them all; start with torchrun, or for one process: unset {' '.join(there)}")
    for name, least, most in (("MASTER_PORT", 0, 65535), ("WORLD_SIZE", 1, 10**6), ("LOCAL_WORLD_SIZE", 1, 10**6)):
        if there and found[name] is not None and not least <= found[name] <= most:
            raise UserError(f"{name}={found[name]} in the environment: must be from {least} to {most}; start with "
                            "torchrun")
    if there and not found["RANK"] < found["WORLD_SIZE"]:
        raise UserError(f"RANK={found['RANK']} WORLD_SIZE={found['WORLD_SIZE']} in the environment: the rank must be "
                        "below the number of processes; start with torchrun")
    return found["RANK"] or 0


def processes():
    """torch.distributed if it has been imported, otherwise None: a wrong flag is refused before torch is imported."""
    return sys.modules.get("torch.distributed")


def are_many():
    """Whether this process has joined a process group of two or more."""
    dist = processes()
    return dist is not None and dist.is_initialized() and dist.get_world_size() > 1


def leave_note(name, text):
    """Write a text under a name that all processes can read, as long as rank 0 runs."""
    dist = processes()
    try:
        dist.distributed_c10d._get_default_store().set(name, text)
    except dist.DistError:
        pass


def find_note(name, seconds, if_gone=None):
    """The text that another process wrote under a name with `leave_note`. None if there is none within `seconds`;
    `if_gone` if rank 0 has ended, since the notes end with it."""
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
    """Whether another process says why the script ends. All read the same files and write to the same disk, so most
    errors are the same on all. A rank that finds no note of rank 0 within 5 seconds has an error of its own, and says
    it. Before the processes have met, the first of each machine says it, since files and names may be a machine's."""
    if not are_many():
        return rank > 0 and os.environ["LOCAL_RANK"] != "0"
    if rank == 0:
        leave_note("why", "said")
        return False
    return find_note("why", seconds=5, if_gone="said") is not None


def status_of(script, error, rank):
    """Say in one line, once for all processes, what ended a script. Returns the exit status; None, with nothing
    printed, for an error that is not the user's."""
    text = str(error)
    if isinstance(error, RuntimeError) and are_many() and any(words in text for words in PEER_IS_GONE):
        # An exchange failed because another process has ended. Either it was asked to stop, or it failed and shows
        # its own error.
        stopped = find_note("stopped", seconds=1)
        if stopped is None:
            return 1
        error, text = Stopped(stopped), stopped
    if isinstance(error, Stopped):
        if are_many():
            leave_note("stopped", text)
        if rank == 0:
            say_last(f"\n{script}: {printable(text)}", sys.stdout)
        # torchrun would answer a status other than 0 with a traceback
        return 0 if "RANK" in os.environ else 128 + error.number
    if isinstance(error, BrokenPipeError) and error.filename is None and not are_many():
        say_last("", sys.stdout)  # the reader, such as head, has seen enough
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    if is_out_of_memory(error):
        say_last(f"\n{script}: out of memory: {one_line(error)}; what helps: a smaller --size or --batch",
                 sys.stderr)
        return 1
    if isinstance(error, UserError | OSError | NotFinite):
        if not another_says(rank):
            where = f"rank {rank}: " if rank else ""
            begin = "" if isinstance(error, UserError) else "\n"  # begin a new line below a progress bar
            say_last(f"{begin}{script}: {where}{shortened(printable(in_words(error)))}", sys.stderr)
        is_mistake = isinstance(error, OSError) and error.errno is not None and error.errno not in DISK_FAILS
        return 2 if is_mistake or isinstance(error, UserError) else 1
    return None


def in_words(error):
    """The message of an error; for one of the file system that names a file, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: cannot be read or written: {error.strerror}"
    if isinstance(error, OSError) and error.errno in DISK_FAILS and error.strerror == os.strerror(error.errno):
        return f"what is printed, or a file, cannot be written: {error.strerror}"
    return str(error)


@contextmanager
def frame(script, nothing_lost="stopped; run it again"):
    """What every script runs in: errors and signals become one line and an exit status. Yields the `Stopping`, which
    ends with the frame, unless a signal has ended the script. nothing_lost: its first message.

    Status 2: a `UserError`, or a file that may not be read or written. Status 1: memory that is full; a disk that is
    full, missing or read-only; a number that is not finite. Status 130, 143 or 129: the user asked to stop, by Ctrl-C,
    SIGTERM or SIGHUP; 0 under torchrun. What was written before stays. Of several processes, rank 0 prints the line.
    Any other error is raised as it is.
    """
    loaded()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A file's name may be no text, or not in the terminal's code. A log file shows each line at once.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    rank = 0
    stopping = Stopping(nothing_lost)
    try:
        rank = rank_here()
        yield stopping
        sys.stdout.flush()
    except (Exception, Stopped) as error:
        status = status_of(script, error, rank)
        if status is None:
            raise
        if status:
            sys.exit(status)
    else:
        stopping.end()
    finally:
        if stopping.asked is None:
            stopping.end()
