"""The study's files: what may be read, what may be written, and several files written all or none."""

import os
from pathlib import Path

from engine.errors import UserError
from engine.files import write_whole


def check_inputs(paths):
    """Raises UserError if one of these is there, but no file: to read a pipe could last for ever."""
    for path in paths:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: not a file")


def check_outputs(outputs, inputs, overwrite, why=""):
    """Raises UserError if an output is also an input, or another output, or cannot be a file there, or lies
    there already and must stay. Links are followed: what counts is the file that a path leads to."""
    read = {os.path.realpath(path) for path in inputs}
    written = set()
    for path in map(Path, outputs):
        place = os.path.realpath(path)
        if place in read:
            raise UserError(f"{path}: is read here, so it cannot be written as well; give another name")
        if place in written:
            raise UserError(f"{path}: two files would be written there; give each its own name")
        written.add(place)
        irregular = os.path.exists(path) and not os.path.isfile(path)
        if irregular or not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: a file cannot be written there")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"{path} exists already{why}; --overwrite replaces it")


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
