"""A cache on disk, key -> tensors: for what would otherwise be computed again in every run.

A key is a digest of everything that the tensors depend on, so an entry is never out of date. A damaged entry is
computed again. An entry is one safetensors file, written under another name and then renamed, so any number of runs
can share a folder. When the folder grows beyond `MOST`, the entries that were not used for the longest time are
removed. The cache never ends a run: if the disk is full, one line says so.
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

from engine.errors import one_line, printable
from engine.files import must_be_writable, write_whole

GIB = 2**30
MOST = 32 * GIB    # bytes of all entries; less if that is more than half of (their bytes + the disk's free bytes)
# Only files with one of these two names are ever removed: an entry, and a part of one that a kill left.
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
HALF = re.compile(r"\.[0-9a-f]{64}\.safetensors\.[0-9]+")
LEFTOVER = 86_400  # age in seconds after which such a part is removed: no process is still writing it


def folder_of(flag, is_full_size):
    """The folder of the cache for --cache; None if it is off. "auto" is a folder in the user's home, and off for a
    small model, which is quick to compute again. Raises UserError for a folder that cannot be written."""
    if flag != "auto":
        if flag is not None:
            must_be_writable(flag, "--cache", "; give another, or off")
        return flag
    if not is_full_size:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "srpo"


def digest_of_tensors(tensors):
    """SHA-256, in hex, of the names, dtypes, shapes and values of {name: tensor}."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Cache:
    """A folder of entries. If the folder is None, nothing is kept."""

    def __init__(self, folder=None, most=MOST):
        """folder: made when the first entry is put there; most: the largest size of all entries, bytes."""
        self.folder = None if folder is None else Path(folder)
        self.most = most
        self.since = None  # bytes added since `trim` last measured all entries; None: not measured yet

    def key(self, *what):
        """The key, in hex. what: all that the tensors depend on, as values that JSON can hold."""
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def path(self, key):
        return self.folder / f"{key}.safetensors"

    def get(self, key):
        """The tensors {name: tensor} of a key; None if there is no entry. If the entry is damaged: a line says so,
        and None."""
        if self.folder is None or not self.path(key).is_file():
            return None
        try:
            with safe_open(self.path(key), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                about = file.metadata() or {}
            if about.get("key") != key or about.get("sha256") != digest_of_tensors(tensors):
                raise ValueError("its digest differs")
            self.mark(key)
        except (FileNotFoundError, RuntimeError):  # another run has removed it meanwhile; torch opens it a second time
            return None
        except (OSError, SafetensorError, ValueError) as error:
            print(printable(f"{self.path(key)}: damaged ({one_line(error)}); it is computed again"))
            return None
        return tensors

    def mark(self, key):
        """Set the time at which an entry was last used to now."""
        try:
            os.utime(self.path(key))
        except OSError:  # it belongs to another user, or has been removed
            pass

    def put(self, key, tensors):
        """Write the tensors {name: tensor} of a key. If that fails, a line says so, and nothing more is written."""
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
        """Remove the entries that were not used for the longest time until the rest is small enough; and parts of
        entries that a kill left."""
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
