"""Paths as users type them: NAME, PATH, NAME=PATH, or several separated by commas; and texts that no path can be."""

import os
from pathlib import Path

from engine.errors import UserError
from engine.files import is_unicode


# ---------------------------------------------------------------------------------------- on the command line
def not_a_path(text):
    """Why no file can have this path, in words such as "is empty"; None if a file could have it."""
    text = str(text)
    if not text:
        return "is empty"
    if "\0" in text:
        return "holds a NUL character"
    if not is_unicode(text):
        return "is no UTF-8 text"
    if len(os.fsencode(text)) > 4000 or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        return "is too long"
    return None


def is_there(text):
    """Whether a text is the path of a file or a folder that exists."""
    return not_a_path(text) is None and Path(text).exists()


def items_of(text, weighted=False):
    """"A,B" -> ["A", "B"]. Each item is NAME, PATH or NAME=PATH; if `weighted`, :WEIGHT may follow it. A comma inside
    a path that exists does not separate items."""
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
    """Whether a text is PATH or NAME=PATH, where the path exists; if `weighted`, :WEIGHT may follow."""
    start, _, weight = text.rpartition(":")
    return leads_somewhere(text) or (weighted and "," not in weight and leads_somewhere(start))


def leads_somewhere(text):
    """Whether a text is PATH or NAME=PATH, where the path exists."""
    name, _, path = text.strip().partition("=")
    is_name = not set(name) & set(",:/")
    return is_there(text.strip()) or (is_name and is_there(path))


def named_path(text):
    """"NAME=PATH" -> (NAME, PATH); "PATH" -> (None, PATH). A text that is a path that exists is a PATH; so is a text
    with a slash before its first "=". Raises UserError."""
    name, sign, path = text.partition("=")
    if not sign or "/" in name or is_there(text):
        name = None
        path = text
    elif not name or not path:
        raise UserError(f'"{text}": give NAME=PATH')
    why = not_a_path(path)
    if why and text:  # each caller refuses an empty text with its own message
        raise UserError(f'"{text[:80]}": give NAME=PATH; this path {why}')
    return name, path
