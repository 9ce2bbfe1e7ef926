"""The study's files: which may be read, and how several files are written together."""

import os
from contextlib import suppress

from engine.errors import DISK_FAILS, UserError
from engine.files import write_whole


def check_inputs(paths):
    """Raises UserError if a path exists but is not a regular file, because reading a pipe could wait for ever."""
    for path in paths:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: not a file")


def beside(path, ending):
    """A hidden path in the same folder, with this process's number. A rename within one folder is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")


def take_back(begun, existed):
    """Undo the renames of the paths `begun`. Paths that `existed` before get their old file back; others are deleted.
    Raises OSError if an old file cannot be put back."""
    for path in begun:
        old = beside(path, "old")
        if path not in existed:
            path.unlink(missing_ok=True)
        elif os.path.lexists(old):
            try:
                old.replace(path)
            except OSError as error:
                raise OSError(f"{path}: cannot be written: {error.strerror}; what was there before is now "
                              f"{old}") from error


def write_together(contents):
    """Write {Path: content, as `write_whole` takes it}: all files or none. Raises UserError, or OSError for a
    disk that is full or broken, if nothing was written.

    Every file is first written under a hidden name, then all are renamed. If a rename fails, those before it are
    undone."""
    names = " and ".join(map(str, contents))
    existed = [path for path in contents if os.path.lexists(path)]
    begun = []
    try:
        for path, content in contents.items():
            write_whole(beside(path, "new"), content)
        for path in contents:
            begun.append(path)
            if path in existed:
                path.replace(beside(path, "old"))
            beside(path, "new").replace(path)
    except OSError as error:
        take_back(begun, existed)
        kind = OSError if error.errno in DISK_FAILS else UserError
        raise kind(f"{names}: cannot be written: {error.strerror}; nothing was written, and what was there before "
                      "is unchanged") from error
    except BaseException:
        take_back(begun, existed)
        raise
    finally:
        for path in contents:
            with suppress(OSError):  # it may be gone, or its name may be too long
                beside(path, "new").unlink()
    for path in existed:
        beside(path, "old").unlink(missing_ok=True)
