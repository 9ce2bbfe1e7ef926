"""Checkpoints, which hold all that a run needs to go on.

A checkpoint is a folder step_NNNNN of safetensors files, which torch.distributed.checkpoint writes, every
process its own, with two more: state.json, what the run remembers beside the tensors, and checksums.json, a
CRC-32 of every other file. Nothing in it is a pickle.
"""

import re
import warnings
import zlib
from itertools import count
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from engine.errors import UserError, one_line
from engine.files import read_json, remove_leftovers, write_json

# one process needs no process group
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# Frozen weights are not saved: beside a LoRA they are the base model's, which is loaded anyway. What is saved
# must be there when it is loaded, all the same: torch.distributed.checkpoint sees to it.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
TENSORS = "shard-*-model-*-of-*.safetensors"
STATE = "state.json"
SETTINGS = "optimizer"  # in it
SUMS = "checksums.json"

# At most this many bytes of tensors go into a file, or a single larger one. Torch makes a file in memory
# before it writes it, so this is what a process needs beside its tensors; twice if those are on a GPU.
FILE_SIZE = 2**28
CHUNK = 2**24  # bytes that are compared at a time

# All files that a checkpoint consists of, and so all that goes with it; and its folder, once it is finished,
# while it is written, and while it is removed.
OURS = (TENSORS, STATE, SUMS)
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
        if read_json(folder / SUMS)[STATE] != digest(folder / STATE):
            raise Damaged(f"{STATE} is not what was written")
        state = read_json(folder / STATE)
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


def is_of_an_earlier_version(folder):
    """Whether a checkpoint is of torch's other format, which was written here before and is not read."""
    return any(folder.glob("*.distcp"))


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
    tensors, settings = taken_apart(*get_state_dict(transformer, optimizer, options=TRAINED))
    writer = dcp.HuggingFaceStorageWriter(beside, files_of(tensors, world), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
        sums = {}
        mine = sorted(beside.glob(f"shard-{world.rank + 1:05d}-*"))
        for theirs in world.gather({file.name: digest(file) for file in mine}):
            sums |= theirs
        if world.main:
            finish(folder, beside, state | {SETTINGS: settings}, sums)
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
    write_json(beside / SUMS, sums | {STATE: digest(beside / STATE)})
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
    below = first
    while below is not None:
        if isinstance(below, OSError) and below.strerror:
            where = f"{Path(below.filename).name}: " if below.filename else ""
            return where + below.strerror
        below = below.__cause__ or below.__context__
    return one_line(first)


def taken_apart(weights, moments):
    """({name: tensor} of all that is trained and of the optimizer's state; a list of the settings of its
    parameter groups): a safetensors file holds tensors alone."""
    tensors = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    for name, state in moments["state"].items():
        tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    settings = [{key: value for key, value in group.items() if key != "params"}
                for group in moments["param_groups"]]
    return tensors, settings


def files_of(tensors, world):
    """{name of a tensor: number of the file that it goes to}; of each file every process writes a part."""
    numbers = {}
    number = 1
    taken = 0
    for name, tensor in tensors.items():
        if taken and taken + tensor.nbytes > FILE_SIZE * world.size:
            number += 1
            taken = 0
        numbers[name] = number
        taken += tensor.nbytes
    return numbers


def digest(path):
    """The CRC-32 of a file. Raises OSError."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


# ---------------------------------------------------------------------------------------------------- reading
def compare(folder):
    """Compare every file of a checkpoint with its digest, each process its share. Raises Damaged, on every
    process."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        found = difference(folder, rank, size)
    except (UserError, OSError) as error:
        found = cause_of(error)
    everyones = [found]
    if size > 1:
        everyones *= size
        dist.all_gather_object(everyones, found)
    for found in filter(None, everyones):
        raise Damaged(found)


def difference(folder, rank, size):
    """What is wrong with a process's share of a checkpoint's files, in words; None if nothing is."""
    sums = read_json(folder / SUMS)
    if not isinstance(sums, dict):
        return f"{SUMS} is not what was written"
    # torch reads every safetensors file that it finds there
    odd = sums.keys() ^ {STATE, *(file.name for file in folder.glob("*.safetensors"))}
    if odd:
        name = min(odd)
        return f"{name} is missing" if name in sums else f"{name} is not one of its files"
    for name in sorted(sums)[rank::size]:
        if sums[name] != digest(folder / name):
            return f"{name} is not what was written"
    return None


def load(folder, transformer, optimizer):
    """Restore what `save` wrote, on any number of processes; returns the state. Raises Damaged, on every
    process: before anything is loaded if a byte of it has changed; else, if it is of something else, the
    weights may be half loaded."""
    compare(folder)
    state = state_of(folder)
    weights, moments = get_state_dict(transformer, optimizer, options=TRAINED)
    tensors, _ = taken_apart(weights, moments)
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder))
        for group, settings in zip(moments["param_groups"], state.pop(SETTINGS), strict=True):
            # AdamW's betas are a tuple, of which JSON makes a list
            group |= {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    except (CheckpointException, LookupError, AttributeError, TypeError, ValueError) as error:
        raise Damaged(cause_of(error)) from error
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
