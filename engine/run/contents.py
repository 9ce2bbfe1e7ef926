"""Digests of what a run reads: prompts, model, --weights, reward. They are compared by content, not by path. A folder
that was moved is still the same model; a folder whose files were replaced is another."""

import hashlib
import json
from threading import Thread

from engine.data.digests import digest_of_files
from engine.errors import UserError
from engine.files import stamp

FLAGS = "args.json"  # the name of the flags that may not change; earlier versions did not note them


def digest_in(found, name):
    """The digest under a name in the result of a `Contents`; None if the name is missing."""
    return found[name]["sha256"] if name in found else None


class Contents:
    """Digests of all that a run reads. Files are hashed once, in a background thread, while the run trains. They are
    hashed again only if a name, size or time of writing has changed."""

    def __init__(self, texts, places):
        """texts: {name: list of texts}; places: {name: list of files or folders}. Names are for messages."""
        self.places = places
        self.found = {name: {"sha256": hashlib.sha256(json.dumps(lines).encode()).hexdigest(), "stamp": None}
                      for name, lines in texts.items()}
        self.thread = None

    def begin(self):
        """Start the thread that hashes all files."""
        self.thread = Thread(target=self.hash, args=(self.places,), daemon=True)
        self.thread.start()

    def hash(self, names):
        for name in names:
            places = self.places[name]
            self.found[name] = {"sha256": digest_of_files(places), "stamp": stamp(*places)}

    def compare(self, then):
        """Raise UserError if a content differs from `then`, the `result` of the run when it began. Only files whose
        name, size or time of writing has changed are hashed."""
        for name, places in self.places.items():
            if then.get(name) and then[name]["stamp"] == stamp(*places):
                self.found[name] = then[name]
            else:
                self.hash([name])
        for name in self.found | then:
            noted = name in then or name != FLAGS
            if noted and digest_in(then, name) != digest_in(self.found, name):
                raise UserError(f"--resume: {name} is not what it was when the run began; give the same content, or "
                                "another --out")

    def result(self):
        """{name: {"sha256", "stamp"}}. Waits until all files are hashed."""
        if self.thread is not None:
            self.thread.join()
        return self.found
