"""Checkpoints, which hold all that a run needs to go on, and the exported weights, which hold what users
load.

A checkpoint is a folder step_NNNNN of torch.distributed.checkpoint's files, sharded, with two more:
state.json, what the run remembers beside the weights, and checksums.json, a CRC-32 of every tensor's bytes.
"""

import io
import json
import mmap
import pickle
import re
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from engine.errors import UserError, one_line
from engine.files import read_json, write_json, write_whole
from engine.parallel import INDEX, ONE_FILE, full

# one process needs no process group
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

METADATA = ".metadata"


# ------------------------------------------------------------------------------------------- where they stand
def step_of(folder):
    """The number of the update after which a checkpoint was written: 12 of step_00012."""
    return int(folder.name.removeprefix("step_"))


def owner_of(folder):
    """The id of the run that wrote a checkpoint; None if its state cannot be read."""
    try:
        return read_json(folder / "state.json")["run"]
    except (UserError, KeyError, TypeError):
        return None


def all_checkpoints(out):
    """The finished checkpoints in a run's folder, whoever wrote them, oldest first."""
    found = [folder for folder in (Path(out) / "checkpoints").glob("step_*")
             if re.fullmatch(r"step_\d{5,}", folder.name) and folder.is_dir()]
    return sorted(found, key=step_of)


def checkpoints(out, run):
    """The finished checkpoints of the run with id `run`, oldest first."""
    return [folder for folder in all_checkpoints(out) if owner_of(folder) == run]


def discard(folder):
    """Remove a checkpoint: under its own name it is whole, or not there."""
    aside = folder.with_name(f".discarded_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


# ---------------------------------------------------------------------------------------------------- writing
def save(out, transformer, optimizer, state, world, keep):
    """Write out/checkpoints/step_NNNNN: weights and optimizer, sharded (every rank its own part), and `state`
    (with its "step", and the id of its "run") as JSON.

    Atomic: it is written beside, under another name, and renamed when complete, so a kill at any moment
    leaves the checkpoint before. The last `keep` stay. Raises OSError, which says what stays.
    """
    folder = Path(out) / "checkpoints" / f"step_{state['step']:05d}"
    beside = folder.with_name(".writing")
    if world.main:
        for left in folder.parent.glob(".*"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
    world.gather(None)
    weights, moments = get_state_dict(transformer, optimizer)
    try:
        dcp.save({"transformer": weights, "optimizer": moments}, checkpoint_id=beside)
        sums = {}
        for theirs in world.gather(checksums(beside, world.rank)):
            sums |= theirs
        if world.main:
            sums[METADATA] = zlib.crc32((beside / METADATA).read_bytes())
            write_json(beside / "checksums.json", sums)
            write_json(beside / "state.json", state)
            if folder.exists():
                discard(folder)
            beside.rename(folder)
            for old in checkpoints(out, state["run"])[:-keep]:
                discard(old)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(beside, ignore_errors=True)
        why = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
        stays = checkpoints(out, state["run"])
        rest = f"{stays[-1].name} stays" if stays else "there is none before"
        raise OSError(f"{folder}: cannot be written: {why}; {rest}") from error
    world.gather(None)


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
class Damaged(Exception):
    """A checkpoint that is not as it was written."""


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
        self.sums = read_json(self.folder / "checksums.json")
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
    weights, moments = get_state_dict(transformer, optimizer)
    try:
        reader = CheckedReader(folder)
        dcp.load({"transformer": weights, "optimizer": moments}, storage_reader=reader,
                 planner=PlainLoadPlanner())
        state = read_json(Path(folder) / "state.json")
    except (CheckpointException, UserError, OSError) as error:
        causes = getattr(error, "failures", {}).values()
        cause = next((found for found, _ in causes if isinstance(found, Damaged)), None)
        raise Damaged(str(cause) if cause else one_line(error)) from error
    if reader.compared < 2:
        raise RuntimeError("this version of torch reads checkpoints by another way: they were not compared "
                           "with their checksums")
    set_state_dict(transformer, optimizer, model_state_dict=weights, optim_state_dict=moments)
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


def header_of(transformer, dtype):
    """The head of a safetensors file: its length in 8 bytes, then JSON, padded to a multiple of 8."""
    code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in transformer.named_parameters():
        start, end = end, end + parameter.numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(transformer, dtype):
    """The content of a safetensors file piece by piece: its head, then one tensor after the other, in full.
    Gathering a tensor is a collective: every rank must run through all pieces."""
    yield header_of(transformer, dtype)
    for parameter in transformer.parameters():
        tensor = full(parameter.detach()).to("cpu", dtype).contiguous()
        yield tensor.view(torch.uint8).numpy().tobytes()


def export(transformer, folder, world, dtype=torch.float32):
    """Write config.json and one diffusion_pytorch_model.safetensors in diffusers layout, which FluxPipeline
    and ComfyUI load.

    The file is streamed tensor by tensor, so no process ever holds a full copy, and renamed when complete: a
    full disk leaves the file before, if there was one. Raises OSError.
    """
    folder = Path(folder)
    pieces = bytes_of(transformer, dtype)
    if not world.main:
        for _ in pieces:  # only to take part in the gathering
            pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    transformer.save_config(folder)
    write_whole(folder / ONE_FILE, pieces)
    (folder / INDEX).unlink(missing_ok=True)
