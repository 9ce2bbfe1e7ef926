"""Scores on disk, one line for each picture. So an evaluation that was stopped continues, and scores nothing twice."""

import hashlib
import json

from engine.files import append, stamp


def settings_of(name, files, args):
    """What a metric's scores depend on, apart from a picture and its prompt: its name, --control, --neg, its files."""
    return [name, args.control, args.neg, str(files), stamp(*paths_in(files))]


def paths_in(files):
    """All paths in the return value of a metric's fetch: a path, a tuple of such values, or None."""
    if files is None:
        return []
    if isinstance(files, tuple):
        return [path for part in files for path in paths_in(part)]
    return [files]


class Scores:
    """The scores that one metric gave to the pictures of one row.

    Each process writes its own file, NAME.RANK.jsonl, and reads all of them. A score's key is a hash of all that the
    score depends on. So a score is valid no matter which process wrote it, or when.
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
            append(self.path, "\n")  # a killed process left its last line unfinished

    def read(self, line):
        """Remember the score in a line. A damaged line is skipped, so its picture is scored again."""
        try:
            entry = json.loads(line)
            self.known[entry["key"]] = {column: float(entry["scores"][column]) for column in self.columns}
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            pass

    def key(self, picture, file):
        """A hash of all that a picture's score depends on: the file's bytes, the prompt and the settings. Raises
        OSError."""
        words = json.dumps([picture.prompt, picture.entry, *self.settings]).encode()
        return hashlib.sha256(file.read_bytes() + words).hexdigest()[:24]

    def keys(self, method, pictures, unreadable):
        """{picture's name: key} of the pictures that exist. For a file that cannot be read, a text is added to
        `unreadable`."""
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
        """Keep the scores {column: [B]} of B pictures under their keys {name: key}, and write the new ones to disk."""
        lines = []
        for i, picture in enumerate(pictures):
            key = keys[picture.name]
            if key not in self.known:
                self.known[key] = {column: float(values[column][i]) for column in self.columns}
                line = {"picture": picture.name, "key": key, "scores": self.known[key]}
                lines.append(json.dumps(line) + "\n")
        append(self.path, "".join(lines))
