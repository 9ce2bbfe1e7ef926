"""A user's mistake is one line and exit status 2: what is wrong, the value seen, what to do."""

import os
import sys
from contextlib import contextmanager

import torch.distributed as dist


class UserError(ValueError):
    """What a user can mend, in one line."""


class Stopped(Exception):
    """The user asked to stop; the message says what was saved."""


class NotFinite(Exception):
    """A NaN or an infinity, met before it could be saved; the message says where, and what is kept."""


def printable(text):
    """`text` with control characters, and the escape sequences that begin with them, shown instead of obeyed:
    a prompt or a file name cannot repaint the terminal. Line breaks become spaces."""
    shown = []
    for character in str(text).replace("\n", " "):
        shown.append(character if character.isprintable() else repr(character)[1:-1])
    return "".join(shown)


def one_line(error):
    """The first line of what an exception says, 200 characters at most; its type's name if it is silent."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0][:200]


PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
                "remote process exited")


@contextmanager
def frame(script):
    """What every script runs in. A `UserError` is one line and exit status 2; a full, vanished or read-only
    disk, or a number that is not finite, is one line and status 1: what was written before stays. Being
    asked to stop is status 0.

    Before the processes of a run have met, all of them meet the same mistake, and only rank 0 says it.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except UserError as error:
        if rank == 0 or dist.is_initialized():
            where = f"rank {rank}: " if rank else ""
            print(f"{script}: {where}{printable(error)}", file=sys.stderr)
        sys.exit(2)
    except Stopped as words:
        if rank == 0:
            print(f"\n{script}: {printable(words)}")
    except (OSError, NotFinite) as error:
        if rank == 0 or isinstance(error, OSError):
            print(f"\n{script}: {printable(error)}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        # An exchange that failed because another process has died: that one shows its own error.
        if dist.is_initialized() and any(words in str(error) for words in PEER_IS_GONE):
            sys.exit(1)
        raise
