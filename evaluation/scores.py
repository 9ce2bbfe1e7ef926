"""Scores on disk, a line a picture: an evaluation that was stopped goes on where it was, and scores nothing
twice."""

import hashlib
import json

from engine.files import append, stamp


def settings_of(name, files, args):
    """What a metric's scores depend on beside a picture and its prompt: its name, the words of --control and
    --neg, its files."""
    return [name, args.control, args.neg, str(files), stamp(*paths_in(files))]


def paths_in(files):
    """The paths in what a metric's fetch gave: a path, a tuple of such, or None."""
    if files is None:
        return []
    if isinstance(files, tuple):
        return [path for part in files for path in paths_in(part)]
    return [files]


class Scores:
    """The scores that one metric gave to the pictures of one row.

    They stand in a file for each process, NAME.RANK.jsonl, and all of them are read: a picture's key tells
    what its score depends on, so it does not matter who wrote it, and when.
    """

    def __init__(self, folder, name, columns, settings, rank):
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.columns = columns
        self.known = {}  # {key: {column: value}}
        for file in folder.glob(f"{name}.*.jsonl"):
            for line in file.read_bytes().split(b"\n"):
                self.read(line)
        self.path = folder / f"{name}.{rank}.jsonl"
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            append(self.path, "\n")  # a kill cut off the last line

    def read(self, line):
        """Know a line's score. A damaged line is passed over, and its picture scored again."""
        try:
            entry = json.loads(line)
            self.known[entry["key"]] = {column: float(entry["scores"][column]) for column in self.columns}
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            pass

    def key(self, picture, file):
        """What the score of a picture depends on, as one word: the file's bytes, the prompt and the settings.
        Raises OSError."""
        words = json.dumps([picture.prompt, picture.entry, *self.settings]).encode()
        return hashlib.sha256(file.read_bytes() + words).hexdigest()[:24]

    def keys(self, method, pictures, unreadable):
        """{picture's name: key} of those that are there; what is wrong with a file goes to `unreadable`."""
        keys = {}
        for picture in pictures:
            file = method.path(picture)
            try:
                if file.exists():
                    keys[picture.name] = self.key(picture, file)
            except OSError as error:
                unreadable.append(f"{file}: cannot be read as a picture: {error.strerror}")
        return keys

    def add(self, pictures, keys, values):
        """Keep what is new in the scores {column: [B]} of B pictures, by their keys {name: key}."""
        lines = []
        for i, picture in enumerate(pictures):
            key = keys[picture.name]
            if key not in self.known:
                self.known[key] = {column: float(values[column][i]) for column in self.columns}
                line = {"picture": picture.name, "key": key, "scores": self.known[key]}
                lines.append(json.dumps(line) + "\n")
        append(self.path, "".join(lines))
