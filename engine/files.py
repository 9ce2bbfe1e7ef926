"""Files: written whole or not at all, found on this machine or fetched from the hub, told apart, and given on
the command line as NAME=PATH."""

import json
import logging
import os
import warnings
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from engine.errors import UserError


# ------------------------------------------------------------------------------------- whole, or not at all
def write_whole(path, content):
    """Write a file whole or not at all: beside its place under a hidden name, flushed to the disk, renamed.

    content: text, bytes, or an iterable of either, taken piece by piece. Whatever happens on the way, the
    file that was there before stays as it was and nothing is left beside it, but by a kill: see
    `remove_leftovers`. Raises OSError.
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
    """Remove what a kill left of `write_whole` for files of these names (patterns) in a folder, to which
    nobody writes now."""
    for name in names:
        for left in Path(folder).glob(f".{name}.*"):
            if left.suffix[1:].isdecimal() and left.is_file() and not left.is_symlink():
                left.unlink()


def append(path, text):
    """Append text to a file, and see that it is on the disk. Where that is full the file stays as it was.
    Raises OSError."""
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
    """Write a value as JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    """What a JSON file holds. Raises UserError if it cannot be read, or is not JSON."""
    if Path(path).exists() and not Path(path).is_file():  # reading from a pipe would wait for ever
        raise UserError(f"{path}: not a file")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON") from error


# ---------------------------------------------------------------------------------------- on the command line
def not_a_path(text):
    """Why no file can have this path, as "is empty"; None if one could."""
    text = str(text)
    if not text:
        return "is empty"
    if "\0" in text:
        return "holds a NUL character"
    if len(os.fsencode(text)) > 4000 or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        return "is too long"
    return None


def is_there(text):
    """Whether a text is the path of a file or a folder that exists."""
    return not_a_path(text) is None and Path(text).exists()


def items_of(text, weighted=False):
    """"A,B" -> ["A", "B"], where each may be NAME, PATH or NAME=PATH and, if `weighted`, with :WEIGHT behind
    it. A comma in a path that exists divides nothing."""
    pieces = text.split(",")
    items = []
    while pieces:
        n = len(pieces)
        while n > 1 and not is_item(",".join(pieces[:n]), weighted):
            n -= 1
        items.append(",".join(pieces[:n]).strip())
        pieces = pieces[n:]
    return items


def is_item(text, weighted):
    """Whether a text is PATH or NAME=PATH, perhaps with :WEIGHT, of a path that exists."""
    start, _, weight = text.rpartition(":")
    return leads_somewhere(text) or (weighted and "," not in weight and leads_somewhere(start))


def leads_somewhere(text):
    """Whether a text is PATH or NAME=PATH of a path that exists."""
    name, _, path = text.strip().partition("=")
    is_name = not set(name) & set(",:/")
    return is_there(text.strip()) or (is_name and is_there(path))


def named_path(text):
    """"NAME=PATH" -> (NAME, PATH); "PATH" -> (None, PATH). A path that exists is taken as it stands, and what
    has a slash before its first "=" is a path."""
    name, sign, path = text.partition("=")
    if not sign or "/" in name or is_there(text):
        name = None
        path = text
    elif not name or not path:
        raise UserError(f'"{text}": give NAME=PATH')
    why = not_a_path(path)
    if why and text:  # whoever reads an empty text says so in its own words
        raise UserError(f'"{text[:80]}": give NAME=PATH; this path {why}')
    return name, path


# -------------------------------------------------------------------------------------- here, or from the hub
def quiet():
    """Keep the libraries' own progress bars and notices out of the terminal: what is wrong they raise too."""
    for log in (diffusers_logging, transformers_logging):
        log.set_verbosity(logging.CRITICAL)
        log.disable_progress_bar()
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")


def fetched(where, files):
    """The local path of `where`: itself if it exists; otherwise the folder of a hub repository's `files` (a
    list of names or patterns; pickled .bin files stand in for *.safetensors that it lacks), downloaded now if
    they are not cached.

    Raises UserError if it is neither.
    """
    if Path(where).is_file() or Path(where).is_dir():
        return Path(where)
    if Path(where).exists():  # reading from a pipe would wait for ever
        raise UserError(f"{where}: neither a file nor a folder")
    if str(where).count("/") != 1 or str(where).startswith((".", "/")):
        raise UserError(f"{where}: no such file or folder")
    quiet()
    try:
        folder = Path(snapshot_download(where, allow_patterns=files))
        if "*.safetensors" in files and not list(folder.glob("*.safetensors")):
            snapshot_download(where, allow_patterns="*.bin")
        return folder
    except Exception as error:
        raise UserError(f"{where}: not on this machine, and the hub does not give it "
                        f"({type(error).__name__})") from error


def files_under(place):
    """A file itself, or all files in a folder, in order."""
    place = Path(place)
    inside = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [file for file in inside if file.is_file()]


def stamp(*places):
    """What tells files from others at the same places: [name, size, time of writing] of each, and of each in
    a folder."""
    stamps = []
    for place in places:
        for file in files_under(place):
            stamps.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return stamps
