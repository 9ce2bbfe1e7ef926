"""Checkpoints: everything that --resume needs to continue a run.

A checkpoint is a folder step_NNNNN. It holds safetensors files, which torch.distributed.checkpoint writes: each
process writes its own. state.json holds the run's state besides the tensors. checksums.json holds a CRC-32 of every
other file. Nothing in a checkpoint is a pickle.
"""

import errno
import os
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
from engine.files import fits, read_json, remove_leftovers, write_json
from engine.model.configs import slices_of

# A single process on a CPU has no process group, and needs none.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# Frozen weights are not saved: with a LoRA they are the base model's, which is loaded anyway. In spite of strict=False,
# torch.distributed.checkpoint raises if a tensor that was trained is missing.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
TENSORS = "shard-*-model-*-of-*.safetensors"
STATE = "state.json"
SETTINGS = "optimizer"  # the key in STATE of the optimizer's settings
SUMS = "checksums.json"

# The most bytes of tensors in a file, unless it holds a single larger tensor. Torch builds a file in memory before it
# writes it. So a process needs this much more memory; twice as much if the tensors are on a GPU.
FILE_SIZE = 2**28
CHUNK = 2**24  # bytes that are read at a time for a checksum

# All files of a checkpoint; only these are removed with it. Then the names of its folder: when it is finished, while it
# is written, and while it is removed.
OURS = (TENSORS, STATE, SUMS)
FINISHED = re.compile(r"step_(\d{5}|[1-9]\d{5,})")
WRITING = ".writing"
DISCARDED = re.compile(r"\.discarded_" + FINISHED.pattern)


class Damaged(Exception):
    """A file of a checkpoint is missing or has changed; the message says which."""


# ------------------------------------------------------------------------------------------- where they stand
def step_of(folder):
    """The number of the update after which a checkpoint was written: 12 for step_00012."""
    return int(folder.name.removeprefix("step_"))


def state_of(folder):
    """The state of a run in a checkpoint, a dict. Raises Damaged."""
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
    """The finished checkpoints in a run's folder, of any run, oldest first."""
    found = [folder for folder in (Path(out) / "checkpoints").glob("step_*")
             if FINISHED.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=step_of)


def is_of_an_earlier_version(folder):
    """Whether a checkpoint has torch's .distcp format, which earlier versions wrote and which is not read any more."""
    return any(folder.glob("*.distcp"))


def checkpoints(out, run):
    """The finished checkpoints of the run with id `run`, oldest first."""
    return [folder for folder in all_checkpoints(out) if owner_of(folder) == run]


def discard(folder):
    """Remove a checkpoint. It is renamed first, so a folder called step_NNNNN is never incomplete."""
    aside = folder.with_name(f".discarded_{folder.name}")
    if aside.exists():
        remove(aside)
    folder.rename(aside)
    remove(aside)


def remove(folder):
    """Remove a folder that holds a checkpoint, or a part of one. Other files in it may be a user's: they are kept, and
    the folder is renamed to NAME.N.kept. If the folder is a link, only the link is removed."""
    if folder.is_symlink():
        folder.unlink()
        return
    for pattern in OURS:
        for file in folder.glob(pattern):
            if not file.is_dir():
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
    """Remove checkpoints that a kill left half written or half removed. No process may be writing one."""
    for folder in (Path(out) / "checkpoints").glob(".*"):
        ours = folder.name == WRITING or DISCARDED.fullmatch(folder.name)
        if ours and folder.is_dir():
            remove(folder)


# ---------------------------------------------------------------------------------------------------- writing
def save(out, transformer, optimizer, state, world, keep):
    """Write out/checkpoints/step_NNNNN: the shards of weights and optimizer, each rank its own, and `state` as JSON.

    state: a dict with at least "step", a number, and "run", the run's id. Atomic: the folder is written under another
    name and renamed when complete, so a kill at any moment leaves the previous checkpoint. The newest `keep` stay.
    Raises OSError, which names the checkpoint that stays.
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
        rest = f"{stays[-1].name} stays" if stays else "there is no earlier checkpoint"
        raise OSError(f"{folder}: cannot be written: {cause_of(error)}; {rest}") from error
    world.gather(None)


def finish(folder, beside, state, sums):
    """Write a checkpoint's state and checksums, and give it its final name. beside: the folder while it is written.
    Raises OSError."""
    write_json(beside / STATE, state)
    write_json(beside / SUMS, sums | {STATE: digest(beside / STATE)})
    if folder.exists():
        if owner_of(folder) not in (state["run"], None):
            raise OSError(f"{folder} is another run's")
        discard(folder)
    beside.rename(folder)


def prune(out, state, keep):
    """Keep the newest `keep` checkpoints of the run up to the one with this state, and remove the older ones. A later
    one can only be damaged: it is not counted, and stays."""
    done = [folder for folder in checkpoints(out, state["run"]) if step_of(folder) <= state["step"]]
    for folder in done[:-keep]:
        discard(folder)


def cause_of(error):
    """In a few words, why a checkpoint could not be written or read. Torch wraps the errors of all processes in one
    error, and the error of the disk in another, so both are unwrapped."""
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
    """({name: tensor} of the trained weights and of the optimizer's state, [settings] of the optimizer's parameter
    groups). They are separated because a safetensors file holds only tensors."""
    tensors = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    for name, state in moments["state"].items():
        tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    settings = [{key: value for key, value in group.items() if key != "params"}
                for group in moments["param_groups"]]
    return tensors, settings


def files_of(tensors, world):
    """{name of a tensor: number of its file, from 1}. Every process writes its own part of each file."""
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
    if not Path(path).is_file():  # reading from a pipe would wait forever
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


# ---------------------------------------------------------------------------------------------------- reading
def compare(folder):
    """Compare every file of a checkpoint with its checksum; each process compares a part of the files. Raises Damaged
    on every process."""
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
    """What is wrong with the checkpoint's files that process `rank` of `size` compares, in words; None if nothing.
    Raises UserError or OSError if a file cannot be read."""
    sums = read_json(folder / SUMS)
    if not isinstance(sums, dict):
        return f"{SUMS} is not what was written"
    # torch reads every safetensors file in the folder, so an extra one is an error too
    odd = sums.keys() ^ {STATE, *(file.name for file in folder.glob("*.safetensors"))}
    if odd:
        name = min(odd)
        return f"{name} is missing" if name in sums else f"{name} is not one of its files"
    for name in sorted(sums)[rank::size]:
        if sums[name] != digest(folder / name):
            return f"{name} is not what was written"
        if name != STATE:
            slices_of(folder / name)  # torch prints a traceback of its own for a file that it cannot read
    return None


def load(folder, transformer, optimizer, shape=dict):
    """Restore what `save` wrote, on any number of processes. Returns the state, which must have a shape as
    `files.fits` has it.

    Raises Damaged on every process. If a file has changed, nothing has been loaded then. If the checkpoint belongs to
    another network or optimizer, some weights may have been loaded.
    """
    compare(folder)
    state = state_of(folder)
    if not fits(state, shape):
        raise Damaged(f"{STATE} is not the state of a run")
    weights, moments = get_state_dict(transformer, optimizer, options=TRAINED)
    tensors, _ = taken_apart(weights, moments)
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(folder))
        for group, settings in zip(moments["param_groups"], state.pop(SETTINGS), strict=True):
            # AdamW's betas are a tuple, which JSON stores as a list
            group |= {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    except (CheckpointException, LookupError, AttributeError, TypeError, ValueError) as error:
        raise Damaged(cause_of(error)) from error
    set_state_dict(transformer, optimizer, model_state_dict=weights, optim_state_dict=moments,
                   options=TRAINED)
    return state


def load_newest(folders, transformer, optimizer, world, shape=dict):
    """Restore the newest checkpoint that is not damaged. folders: checkpoints, oldest first; shape: of the state. A
    line names each damaged one. Returns the state. Raises UserError if all are damaged."""
    for folder in reversed(folders):
        try:
            return load(folder, transformer, optimizer, shape)
        except Damaged as error:
            world.say(f"{folder} is damaged: {error}; the one before is used")
    raise UserError(f"--resume: no checkpoint in {folders[-1].parent} is whole; start again with --overwrite")
