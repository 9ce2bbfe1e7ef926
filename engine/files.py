"""Where a scorer's files are (a local path or the hub), and loading them with no tensor missing or unread."""

import warnings
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging


def quiet():
    """Keep the libraries' own progress bars and notices out of the terminal."""
    for log in (diffusers_logging, transformers_logging):
        log.set_verbosity_error()
        log.disable_progress_bar()
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")


def one_line(error):
    """The first line of what an exception says, 200 characters at most; its type's name if it is silent."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def fetched(where, files):
    """The local path of `where`: itself if it exists; otherwise the folder of a hub repository's `files` (a
    list of names or patterns; pickled .bin files stand in for *.safetensors that it lacks), downloaded now if
    they are not cached.

    Raises ValueError, one line, if it is neither.
    """
    if Path(where).exists():
        return Path(where)
    if str(where).count("/") != 1 or str(where).startswith((".", "/")):
        raise ValueError(f"{where}: no such file or folder")
    quiet()
    try:
        folder = Path(snapshot_download(where, allow_patterns=files))
        if "*.safetensors" in files and not list(folder.glob("*.safetensors")):
            snapshot_download(where, allow_patterns="*.bin")
        return folder
    except Exception as error:
        raise ValueError(f"{where}: not on this machine, and the hub does not give it "
                         f"({type(error).__name__})") from error


def stamp(*places):
    """What tells files from others at the same places: [name, size, time of writing] of each, and of each in
    a folder."""
    files = [f for place in map(Path, places)
             for f in (sorted(place.rglob("*")) if place.is_dir() else [place]) if f.is_file()]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def strict(cls, folder, dtype, unread=()):
    """cls.from_pretrained(folder) on the CPU in `dtype`, evaluating, frozen. Raises ValueError, one line, if
    the file lacks a tensor of the model, or holds one that is not read and starts with none of `unread`."""
    quiet()
    try:
        model, told = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise ValueError(f"{folder}: cannot be loaded as {cls.__name__}: {one_line(error)}") from error
    odd = [*told["missing_keys"], *told.get("mismatched_keys", []),
           *(k for k in told["unexpected_keys"] if not k.startswith(tuple(unread)))]
    if odd:
        raise ValueError(f"{folder}: not a {cls.__name__}: {len(odd)} tensors are missing or not its own, "
                         f"such as {odd[0]}")
    return model.eval().requires_grad_(False)
