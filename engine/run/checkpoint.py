"""Checkpoints, which hold all that a run needs to go on, and the exported weights, which hold what users
load.

A checkpoint is a folder step_NNNNN of torch.distributed.checkpoint's files, sharded, with two more:
state.json, what the run remembers beside the weights, and checksums.json, a CRC-32 of every tensor's bytes
and of the other files.
"""

import io
import json
import mmap
import pickle
import re
import warnings
import zlib
from itertools import count
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from engine.errors import UserError, one_line
from engine.files import read_json, remove_leftovers, write_json

# one process needs no process group
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# Frozen weights are not saved: beside a LoRA they are the base model's, which is loaded anyway. What is saved
# must be there when it is loaded, all the same: torch.distributed.checkpoint sees to it.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
METADATA = ".metadata"
STATE = "state.json"
SUMS = "checksums.json"

# All files that a checkpoint consists of, and so all that goes with it; and its folder, once it is finished,
# while it is written, and while it is removed.
OURS = ("__*_*.distcp", METADATA, f"{METADATA}.tmp", STATE, SUMS)
FINISHED = re.compile(r"step_(\d{5}|[1-9]\d{5,})")
WRITING = ".writing"
DISCARDED = re.compile(r"\.discarded_" + FINISHED.pattern)


class Damaged(Exception):
    """A checkpoint that is not as it was written."""


# ------------------------------------------------------------------------------------------- where they stand
def step_of(folder):
    """The number of the update after which a checkpoint was written: 12 of step_00012."""
    return int(folder.name.removeprefix("step_"))


def state_of(folder):
    """What the run remembered in a checkpoint. Raises Damaged."""
    try:
        content = (folder / STATE).read_bytes()
        if read_json(folder / SUMS)[STATE] != zlib.crc32(content):
            raise Damaged(f"{STATE} is not what was written")
        state = json.loads(content)
        if state["step"] != step_of(folder):
            raise Damaged(f"it is of step {state['step']}")
        return state
    except (OSError, ValueError, LookupError, TypeError) as error:  # UserError is a ValueError
        raise Damaged(f"{STATE} or {SUMS} cannot be read: {one_line(error)}") from error


def owner_of(folder):
    """The id of the run that wrote a checkpoint; None if its state is damaged."""
    try:
        return state_of(folder).get("run")
    except Damaged:
        return None


def all_checkpoints(out):
    """The finished checkpoints in a run's folder, whoever wrote them, oldest first."""
    found = [folder for folder in (Path(out) / "checkpoints").glob("step_*")
             if FINISHED.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=step_of)


def checkpoints(out, run):
    """The finished checkpoints of the run with id `run`, oldest first."""
    return [folder for folder in all_checkpoints(out) if owner_of(folder) == run]


def discard(folder):
    """Remove a checkpoint: under its own name it is whole, or not there."""
    aside = folder.with_name(f".discarded_{folder.name}")
    if aside.exists():
        remove(aside)
    folder.rename(aside)
    remove(aside)


def remove(folder):
    """Remove a folder that holds a checkpoint, or a part of one. If there is more in it, that is someone's:
    it is kept, in a folder whose name ends in .kept. Of a link only the link goes."""
    if folder.is_symlink():
        folder.unlink()
        return
    for pattern in OURS:
        for file in folder.glob(pattern):
            file.unlink()
    for name in (STATE, SUMS):
        remove_leftovers(folder, [name])
    if not any(folder.iterdir()):
        folder.rmdir()
        return
    name = folder.name.removeprefix(".discarded_").removeprefix(".")
    free = (folder.with_name(f"{name}.{n}.kept") for n in count(1))
    folder.rename(next(place for place in free if not place.exists()))


def remove_unfinished(out):
    """Remove what a kill left half written or half removed. Nobody may be writing there."""
    for folder in (Path(out) / "checkpoints").glob(".*"):
        ours = folder.name == WRITING or DISCARDED.fullmatch(folder.name)
        if ours and folder.is_dir():
            remove(folder)


# ---------------------------------------------------------------------------------------------------- writing
def save(out, transformer, optimizer, state, world, keep):
    """Write out/checkpoints/step_NNNNN: weights and optimizer, sharded (every rank its own part), and `state`
    (with its "step", and the id of its "run") as JSON.

    Atomic: it is written beside, under another name, and renamed when complete, so a kill at any moment
    leaves the checkpoint before. The last `keep` stay. Raises OSError, which says what stays.
    """
    folder = Path(out) / "checkpoints" / f"step_{state['step']:05d}"
    beside = folder.with_name(WRITING)
    if world.main:
        remove_unfinished(out)
    world.gather(None)
    weights, moments = get_state_dict(transformer, optimizer, options=TRAINED)
    try:
        dcp.save({"transformer": weights, "optimizer": moments}, checkpoint_id=beside)
        sums = {}
        for theirs in world.gather(checksums(beside, world.rank)):
            sums |= theirs
        if world.main:
            finish(folder, beside, state, sums)
            prune(out, state, keep)
    except (OSError, CheckpointException) as error:
        if world.main and beside.exists():
            remove(beside)
        stays = checkpoints(out, state["run"])
        rest = f"{stays[-1].name} stays" if stays else "there is none before"
        raise OSError(f"{folder}: cannot be written: {cause_of(error)}; {rest}") from error
    world.gather(None)


def finish(folder, beside, state, sums):
    """Give a checkpoint what it lacks beside the tensors, and its name."""
    write_json(beside / STATE, state)
    for name in (METADATA, STATE):
        sums[name] = zlib.crc32((beside / name).read_bytes())
    write_json(beside / SUMS, sums)
    if folder.exists():
        if owner_of(folder) not in (state["run"], None):
            raise OSError(f"{folder} is another run's")
        discard(folder)
    beside.rename(folder)


def prune(out, state, keep):
    """Remove the run's checkpoints but for the last `keep` up to the one with this state, which is whole. A
    later one is damaged: it does not count."""
    done = [folder for folder in checkpoints(out, state["run"]) if step_of(folder) <= state["step"]]
    for folder in done[:-keep]:
        discard(folder)


def cause_of(error):
    """In a few words, why a checkpoint could not be written or read. Torch wraps the errors of all processes
    in one, and makes another one of what the disk said."""
    causes = [cause for cause, _ in getattr(error, "failures", {}).values()]
    first = causes[0] if causes else error
    if isinstance(first, Damaged):
        return str(first)
    below = first
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            where = f"{Path(below.filename).name}: " if below.filename else ""
            return where + below.strerror
        below = below.__cause__ or below.__context__
    return one_line(first)


def checksums(folder, rank):
    """{"file at offset": CRC-32} of what a rank has just written."""
    sums = {}
    places = read_metadata((folder / METADATA).read_bytes()).storage_data.values()
    for place in sorted(places, key=lambda place: (place.relative_path, place.offset)):
        if place.relative_path.startswith(f"__{rank}_"):
            with open(folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                sums[f"{place.relative_path} at {place.offset}"] = zlib.crc32(file.read(place.length))
    return sums


# ---------------------------------------------------------------------------------------------------- reading
class KnownClasses(pickle.Unpickler):
    """Unpickles a checkpoint's metadata, which torch pickles: nothing but the classes that it is made of. Any
    other could run code of whoever made the file."""

    KNOWN = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "PurePosixPath"}}
    DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

    def find_class(self, module, name):
        if module == "torch" and f"torch.{name}" in self.DTYPES:
            return self.DTYPES[f"torch.{name}"]
        if name in self.KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise Damaged(f"its metadata names {module}.{name}, which no checkpoint holds")


def read_metadata(content):
    """torch.distributed.checkpoint's Metadata from the bytes of its file. Raises Damaged."""
    try:
        metadata = KnownClasses(io.BytesIO(content)).load()
    except Damaged:
        raise
    except Exception as error:
        raise Damaged(f"its metadata cannot be read: {one_line(error)}") from error
    if not isinstance(metadata, dcp.Metadata):
        raise Damaged("its metadata are not a checkpoint's")
    return metadata


class CheckedReader(dcp.FileSystemReader):
    """Reads a checkpoint, each piece compared with its checksum before anything is made of it."""

    def __init__(self, folder):
        super().__init__(folder)
        self.folder = Path(folder)
        self.sums = read_json(self.folder / SUMS)
        if not isinstance(self.sums, dict):
            raise Damaged(f"{SUMS} is not what was written")
        self.compared = 0

    def compare(self, name, content):
        if self.sums.get(name) != zlib.crc32(content):
            raise Damaged(f"{name} is not what was written")
        self.compared += 1

    def read_metadata(self, *arguments, **options):
        content = (self.folder / METADATA).read_bytes()
        self.compare(METADATA, content)
        metadata = read_metadata(content)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _slice_file(self, file, info):
        """What torch calls for every piece that it reads."""
        # Mapped, so that nothing is copied: what torch reads next is still in the page cache.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
            with content[info.offset:info.offset + info.length] as piece:
                self.compare(f"{info.relative_path} at {info.offset}", piece)
        return super()._slice_file(file, info)


class PlainLoadPlanner(DefaultLoadPlanner):
    """What is no tensor (the optimizer's settings) is read as plain values; torch would run any pickle."""

    def load_bytes(self, read_item, value):
        plain = torch.load(value, weights_only=True)
        resaved = io.BytesIO()
        torch.save(plain, resaved)
        resaved.seek(0)
        super().load_bytes(read_item, resaved)


def load(folder, transformer, optimizer):
    """Restore what `save` wrote, on any number of processes; returns the state. Raises Damaged, on every
    process, if a byte of it has changed; the weights are then half loaded."""
    weights, moments = get_state_dict(transformer, optimizer, options=TRAINED)
    try:
        reader = CheckedReader(folder)
        dcp.load({"transformer": weights, "optimizer": moments}, storage_reader=reader,
                 planner=PlainLoadPlanner())
        state = state_of(folder)
    except Damaged:
        raise
    except (CheckpointException, UserError, OSError) as error:
        raise Damaged(cause_of(error)) from error
    if reader.compared < 2:
        raise RuntimeError("this version of torch reads checkpoints by another way: they were not compared "
                           "with their checksums")
    set_state_dict(transformer, optimizer, model_state_dict=weights, optim_state_dict=moments,
                   options=TRAINED)
    return state


def load_newest(folders, transformer, optimizer, world):
    """Restore the newest of some checkpoints (oldest first) that is whole; the others are named. Returns its
    state. Raises UserError if none is."""
    for folder in reversed(folders):
        try:
            return load(folder, transformer, optimizer)
        except Damaged as error:
            world.say(f"{folder} is damaged: {error}; the one before is used")
    raise UserError(f"--resume: no checkpoint in {folders[-1].parent} is whole; start again with --overwrite")
