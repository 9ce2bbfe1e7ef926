"""Files: written completely or not at all, read as JSON, listed, and compared by name, size and time."""

import json
import os
from pathlib import Path

from engine.errors import UserError


# ------------------------------------------------------------------------------------- whole, or not at all
def write_whole(path, content):
    """Write a file completely or not at all: to a hidden file in the same folder, flushed to the disk, then renamed.

    content: text, bytes, or an iterable of either, taken piece by piece. If writing fails, an existing file stays as
    it was, and the hidden file is removed. Only a kill leaves it: see `remove_leftovers`. Raises OSError.
    """
    path = Path(path)
    pieces = [content] if isinstance(content, str | bytes) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            for piece in pieces:
                file.write(piece.encode() if isinstance(piece, str) else piece)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def remove_leftovers(folder, names):
    """Remove the hidden files of `write_whole` that a kill left in a folder. names: the files' names, or patterns. No
    process may be writing them."""
    for name in names:
        for left in Path(folder).glob(f".{name}.*"):
            if left.suffix[1:].isdecimal() and left.is_file() and not left.is_symlink():
                left.unlink()


def append(path, text):
    """Append text to a file, and flush it to the disk. If the disk is full, the file stays as it was. Raises
    OSError."""
    rest = text.encode()
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest):]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(before)
            raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path, value):
    """Write a value as JSON, completely or not at all. Raises OSError."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """The value in a JSON file. Raises UserError if it cannot be read, or is not JSON."""
    if Path(path).exists() and not Path(path).is_file():  # reading from a pipe would wait forever
        raise UserError(f"{path}: not a file")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON") from error


def files_under(place):
    """[the file] for a file; for a folder all files in it and in its subfolders, sorted."""
    place = Path(place)
    inside = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [file for file in inside if file.is_file()]


def stamp(*places):
    """[name, size, time of writing] of each file, and of each file in a folder. It differs if a file has been
    replaced."""
    stamps = []
    for place in places:
        for file in files_under(place):
            stamps.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return stamps


def check_outputs(outputs, inputs, overwrite, why=""):
    """Raise UserError if an output is also an input, is given twice, or cannot be written; or if it exists and
    `overwrite` is not set. Links are followed: the files that they lead to are compared."""
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
