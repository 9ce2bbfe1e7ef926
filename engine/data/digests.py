"""Files by what is in them: digests of contents, and of those that a cache has met already."""

import hashlib
from pathlib import Path

import torch

from engine.files import files_under, stamp

CHUNK = 2**24  # bytes that are hashed at a time, without holding up the training thread


def digest_of_files(places):
    """SHA-256 of the names and contents of all files in some places (files or folders)."""
    digest = hashlib.sha256()
    for place in places:
        for file in files_under(place):
            name = file.name if Path(place).is_file() else str(file.relative_to(place))
            digest.update(f"{name} {file.stat().st_size}\n".encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


def known_digest(places, cache):
    """`digest_of_files`, but files that a `Cache` has met are not read again as long as their paths, names,
    sizes and times of writing stay as they were."""
    seen = [[str(Path(place).resolve()), *stamp(place)] for place in places]
    key = cache.key("digest of files", seen)
    kept = cache.get(key)
    if kept is not None:
        return bytes(kept["sha256"].tolist()).hex()
    found = digest_of_files(places)
    cache.put(key, {"sha256": torch.tensor(list(bytes.fromhex(found)), dtype=torch.uint8)})
    return found
