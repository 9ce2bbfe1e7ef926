"""Paths as users type them: NAME, PATH, NAME=PATH, several with commas, and what can be no path."""

import os
from pathlib import Path

from engine.errors import UserError


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
