"""What was computed once and need not be computed again, on disk: a key -> tensors.

A key is a digest of all that the tensors depend on, so an entry is never out of date: it is right, absent, or
damaged and computed again. An entry is one safetensors file, written beside its place and renamed, so any
number of runs share a folder. Where it grows beyond `MOST`, what was not used for longest goes. A cache never
ends a run: a disk that is full is told once.
"""

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from engine.errors import UserError, one_line, printable
from engine.files import write_whole

GIB = 2**30
MOST = 32 * GIB    # of all entries; half of what they take and what is free on their disk, if that is less
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")             # no other file of the folder is ever removed,
HALF = re.compile(r"\.[0-9a-f]{64}\.safetensors\.[0-9]+")    # but what a kill left of one
LEFTOVER = 86_400  # seconds after which what a kill left half written may go: nobody writes it any more


def folder_of(flag, is_full_size):
    """Where the cache is, for --cache: a folder, None if it is off; "auto" is one in the user's home, and off
    for a model so small that nothing is worth keeping. Raises UserError for one that cannot be written."""
    if flag != "auto":
        if flag is not None:
            must_be_writable(flag)
        return flag
    if not is_full_size:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "srpo"


def must_be_writable(folder):
    """Raise UserError if a folder cannot be written, or made. Nothing is made yet."""
    place = Path(folder).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"--cache {folder}: cannot be written: {place} is not a folder; give another, or off")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--cache {folder}: cannot be written: {place} may not be changed; give another, or "
                        "off")


def digest_of_tensors(tensors):
    """SHA-256 of the names, dtypes, shapes and numbers of {name: tensor}."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Cache:
    """A folder of entries; with the folder None it keeps nothing."""

    def __init__(self, folder=None, most=MOST):
        """folder: made as soon as something is put there; most: bytes of all entries."""
        self.folder = None if folder is None else Path(folder)
        self.most = most
        self.since = None  # bytes put since all entries were counted

    def key(self, *what):
        """The key of what the tensors depend on: values that JSON can hold."""
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def path(self, key):
        return self.folder / f"{key}.safetensors"

    def get(self, key):
        """The tensors {name: tensor} of a key, or None. A damaged entry is told, and is None."""
        if self.folder is None or not self.path(key).is_file():
            return None
        try:
            with safe_open(self.path(key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                about = file.metadata() or {}
            if about.get("key") != key or about.get("sha256") != digest_of_tensors(tensors):
                raise ValueError("its digest is another")
            self.mark(key)
        except FileNotFoundError:  # another run has removed it meanwhile
            return None
        except (OSError, SafetensorError, ValueError) as error:
            print(printable(f"{self.path(key)}: damaged ({one_line(error)}); it is computed again"))
            return None
        return tensors

    def mark(self, key):
        """Mark an entry as used just now."""
        try:
            os.utime(self.path(key))
        except OSError:  # somebody else's, or gone
            pass

    def put(self, key, tensors):
        """Keep the tensors {name: tensor} of a key. Where that cannot be done, it is told once."""
        if self.folder is None:
            return
        about = {"key": key, "sha256": digest_of_tensors(tensors)}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, about)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.path(key), content)
            if self.since is None or self.since > self.most / 100:
                self.trim()
            self.since += len(content)
        except OSError as error:
            print(printable(f"{self.folder}: {error.strerror}; nothing more is cached there"))
            self.folder = None

    def trim(self):
        """Remove what was not used for longest, until the rest is no more than it may be; and what a kill
        left."""
        self.since = 0
        entries = []
        for path in self.folder.iterdir():
            try:
                about = path.lstat()
                if ENTRY.fullmatch(path.name):
                    entries.append((about.st_mtime_ns, about.st_size, path))
                elif HALF.fullmatch(path.name) and time.time() - about.st_mtime > LEFTOVER:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:  # another run has removed it meanwhile
                pass
        total = sum(size for _, size, _ in entries)
        room = min(self.most, (total + shutil.disk_usage(self.folder).free) / 2)
        for _, size, path in sorted(entries):
            if total <= room:
                return
            path.unlink(missing_ok=True)
            total -= size


OFF = Cache()
