"""Digests of the contents of files; `known_digest` keeps them in a cache, so that large files are read once."""

import hashlib
import os
from pathlib import Path

import torch

from engine.files import files_under, stamp

CHUNK = 2**24  # bytes that are hashed at a time; hashing releases the GIL, so training goes on meanwhile


def digest_of_files(places):
    """SHA-256, in hex, of the names and contents of a list of files and of all files in a list of folders."""
    digest = hashlib.sha256()
    for place in places:
        for file in files_under(place):
            name = file.name if Path(place).is_file() else str(file.relative_to(place))
            digest.update(os.fsencode(f"{name} {file.stat().st_size}\n"))
            with open(file, "rb") as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


def known_digest(places, cache):
    """`digest_of_files`, kept in a `Cache`. The files are read again only if a path, name, size or time of writing
    has changed."""
    seen = [[str(Path(place).resolve()), *stamp(place)] for place in places]
    key = cache.key("digest of files", seen)
    kept = cache.get(key)
    if kept is not None:
        return bytes(kept["sha256"].tolist()).hex()
    found = digest_of_files(places)
    cache.put(key, {"sha256": torch.tensor(list(bytes.fromhex(found)), dtype=torch.uint8)})
    return found
