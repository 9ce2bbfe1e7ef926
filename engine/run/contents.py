"""What a run learns from, by content and not by path: a folder that was moved is the same model, and a folder
whose files were replaced is another."""

import hashlib
import json
from threading import Thread

from engine.data.digests import digest_of_files
from engine.errors import UserError
from engine.files import stamp


def digest_in(found, name):
    """The digest of what is called so in the result of a `Contents`; None if nothing is."""
    return found[name]["sha256"] if name in found else None


class Contents:
    """The contents of what a run reads. Files are hashed once, in the background, while the run goes on; as
    long as their names, sizes and times of writing stay as they were, they are taken to be the same."""

    def __init__(self, texts, places):
        """texts: {what it is called: texts}; places: {what it is called: files or folders}."""
        self.places = places
        self.found = {name: {"sha256": hashlib.sha256(json.dumps(lines).encode()).hexdigest(), "stamp": None}
                      for name, lines in texts.items()}
        self.thread = None

    def begin(self):
        """Start to hash all files."""
        self.thread = Thread(target=self.hash, args=(self.places,), daemon=True)
        self.thread.start()

    def hash(self, names):
        for name in names:
            places = self.places[name]
            self.found[name] = {"sha256": digest_of_files(places), "stamp": stamp(*places)}

    def compare(self, then):
        """Raise UserError if something is not what it was in `then`, the result of an earlier run. Only files
        that look changed are hashed."""
        for name, places in self.places.items():
            if then.get(name) and then[name]["stamp"] == stamp(*places):
                self.found[name] = then[name]
            else:
                self.hash([name])
        for name in self.found | then:
            if digest_in(then, name) != digest_in(self.found, name):
                raise UserError(f"--resume: {name} is not what it was when the run began; give the same, or "
                                "another --out")

    def result(self):
        """{name: {"sha256", "stamp"}}, as soon as all is hashed."""
        if self.thread is not None:
            self.thread.join()
        return self.found
