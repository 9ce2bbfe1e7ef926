"""Checkpoints, which hold all that a run needs to go on, and the exported weights, which hold what users
load."""

import json
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from engine.files import read_json, write_json, write_whole
from engine.parallel import INDEX, ONE_FILE, full

# one process needs no process group
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def step_of(folder):
    """The number of the update after which a checkpoint was written: 12 of step_00012."""
    return int(folder.name.removeprefix("step_"))


def checkpoints(out, run):
    """The finished checkpoints of the run with id `run` in its folder, oldest first; other runs' are left
    alone."""
    found = []
    for folder in (Path(out) / "checkpoints").glob("step_*"):
        state = folder / "state.json"
        if re.fullmatch(r"step_\d{5,}", folder.name) and state.is_file() and read_json(state)["run"] == run:
            found.append(folder)
    return sorted(found, key=step_of)


def save(out, transformer, optimizer, state, world, keep):
    """Write out/checkpoints/step_NNNNN: weights and optimizer, sharded (every rank its own part), and `state`
    (with its "step", and the id of its "run") as JSON.

    Atomic: it is written beside, under another name, and renamed when complete, so a kill at any moment
    leaves the checkpoint before. The last `keep` stay. Raises OSError, which says what stays.
    """
    folder = Path(out) / "checkpoints" / f"step_{state['step']:05d}"
    beside = folder.with_name(".writing")
    if world.main:
        shutil.rmtree(beside, ignore_errors=True)
    world.gather(None)
    weights, moments = get_state_dict(transformer, optimizer)
    try:
        dcp.save({"transformer": weights, "optimizer": moments}, checkpoint_id=beside)
        if world.main:
            write_json(beside / "state.json", state)
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
            for old in checkpoints(out, state["run"])[:-keep]:
                shutil.rmtree(old)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(beside, ignore_errors=True)
        why = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
        stays = checkpoints(out, state["run"])
        rest = f"{stays[-1].name} stays" if stays else "there is none before"
        raise OSError(f"{folder}: cannot be written: {why}; {rest}") from error
    world.gather(None)


def load(folder, transformer, optimizer):
    """Restore what `save` wrote, on any number of processes; returns the JSON state."""
    weights, moments = get_state_dict(transformer, optimizer)
    dcp.load({"transformer": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(transformer, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return read_json(Path(folder) / "state.json")


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
