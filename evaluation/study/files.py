"""The study's files: what may be read, and several files written all or none."""

import os

from engine.errors import UserError
from engine.files import write_whole


def check_inputs(paths):
    """Raises UserError if one of these is there, but no file: to read a pipe could last for ever."""
    for path in paths:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: not a file")


def beside(path, ending):
    """A hidden name of this process's own in the same folder, so that a rename from there is at once."""
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")


def take_back(begun, existed):
    """Undo renames: of the paths `begun`, those that `existed` get their old file back, if it has gone."""
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
    """Write {Path: content as `write_whole` takes it}, all or none: first every file whole beside its place,
    then all are renamed; if that fails, the renames before it are taken back. Raises OSError that says so."""
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
        raise OSError(f"{names}: cannot be written: {error.strerror}; nothing was written, and what was "
                      "there before is there still") from error
    except BaseException:
        take_back(begun, existed)
        raise
    finally:
        for path in contents:
            beside(path, "new").unlink(missing_ok=True)
    for path in existed:
        beside(path, "old").unlink(missing_ok=True)
