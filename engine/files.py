"""Files: written completely or not at all, read as JSON, listed, and compared by name, size and time."""

import json
import os
from contextlib import suppress
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
        with suppress(OSError):  # it may be gone, or its name may be too long
            beside.unlink()


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
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not is_unicode(text):  # a file's name may be no text; JSON can say such a character in ASCII
        text = json.dumps(value, indent=2)
    write_whole(path, text + "\n")


def is_unicode(text):
    """Whether a text can be encoded as UTF-8. JSON, the command line and the names of files may give half of a
    surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parsed(text):
    """The value of a JSON text. Raises ValueError, also for an object that has a key twice; and RecursionError."""
    def once(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} twice")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=once)


def read_json(path, shape=object, words=""):
    """The value in a JSON file. Raises UserError if it cannot be read or is not JSON; or, with `words` as the message,
    if it does not fit `shape`, as `fits` says."""
    if Path(path).exists() and not Path(path).is_file():  # reading from a pipe would wait forever
        raise UserError(f"{path}: not a file")
    try:
        value = parsed(Path(path).read_text(encoding="utf-8").removeprefix("\ufeff"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON") from error
    if not fits(value, shape):
        raise UserError(f"{path}: {words}")
    return value


def fits(value, shape):
    """Whether a JSON value has a shape. A shape is one of:

    a type: bool, int, str, dict, list; float for any finite number; object for anything; a value such as None or
    "sample.py", which must be equal; a tuple of shapes, of which one must fit; [shape] for a list of such values;
    {str: shape} for an object with any keys; {key: shape} for an object that has at least these keys.
    """
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if shape is float:
        return type(value) in (int, float) and abs(value) < 1e300  # false for nan too
    if isinstance(shape, type):
        return shape is object or type(value) is shape
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict) and str in shape:
        return isinstance(value, dict) and all(fits(item, shape[str]) for item in value.values())
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], one) for key, one in shape.items())
    return type(value) is type(shape) and value == shape


def must_be_writable(folder, flag, helps=""):
    """Raise UserError if a folder cannot be written, or cannot be made. It is not made here. flag: the one that named
    it; helps: the end of the message."""
    there = Path(folder).absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{flag} {folder}: cannot be written: Not a directory{helps}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: cannot be written: Permission denied{helps}")


# --------------------------------------------------------------------------------- what we made, and what not
PNG_MARK = b"Software\0SRPO"  # the text that this project writes into a PNG
SEEN = 4096  # bytes of the beginning of a file in which a mark stands


def is_ours(path, mark):
    """Whether a file carries a mark, bytes at its beginning that only this project writes. A link does not."""
    path = Path(path)
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return mark in file.read(SEEN)


def must_be_ours(path, mark, what, flag="--out"):
    """Raise UserError if there is something at `path` that does not carry the mark: somebody else made it, and it
    stays. what: the words for a file with this mark, such as "a report"."""
    if os.path.islink(path):
        raise UserError(f"{path}: is a link, which is not followed; give another {flag}")
    if os.path.lexists(path) and not is_ours(path, mark):
        raise UserError(f"{path} exists already and is not {what}; give another {flag}")


def must_not_lead_away(folder, names, flag="--out"):
    """Raise UserError if one of the names or patterns in a folder of ours is a link, which could lead to what is not
    ours; or if a file's name is that of a pipe, which would be waited for."""
    for name in names:
        for path in sorted({*Path(folder).glob(name), Path(folder, name)}):  # glob finds no link to nothing
            if path.is_symlink():
                raise UserError(f"{path}: is a link, which is not followed; remove it, or give another {flag}")
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"{path}: not a file; remove it, or give another {flag}")


def must_be_new(path, flag):
    """Raise UserError if a new file cannot be written at `path`; what is there already stays."""
    if os.path.lexists(path):
        raise UserError(f"{flag} {path}: exists already; give another name, or remove it")
    if not Path(path).parent.is_dir():
        raise UserError(f"{flag} {path}: cannot be written: there is no folder {Path(path).parent}")
    must_be_writable(Path(path).parent, flag)


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
    """Raise UserError if an output is also an input, is given twice, or cannot be written; or if it exists, unless
    `overwrite` is set and it carries its mark. outputs: [(path, its mark, what it is)], as `must_be_ours` takes them.
    Links are not followed to write, but the files that they lead to are compared."""
    read = {os.path.realpath(path) for path in inputs}
    written = set()
    for path, mark, what in outputs:
        path = Path(path)
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
        must_be_ours(path, mark, what, "name")
