"""Writes full weights, tensor by tensor: as diffusers' folder, or as one safetensors file for another tool. What is
written is finite."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from engine.errors import NotFinite
from engine.files import write_json, write_whole
from engine.model import released
from engine.model.float8 import quantised
from engine.model.single_file import MARKER
from engine.model.tensor_files import INDEX, ONE_FILE
from engine.model.tensors import full

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}


class Entry(NamedTuple):
    """Tensors of a file, written one after the other. heads: (name, shape, dtype) of each; make: a function that
    returns the tensors, on the CPU. It may gather a sharded parameter, so every rank must call it."""
    heads: list
    make: object


# ------------------------------------------------------------------------------------------------ what is written
def finite(name, tensor):
    """The tensor. Raises NotFinite if it holds a NaN or an infinity."""
    if not tensor.isfinite().all():
        raise NotFinite(f"{name} holds numbers that are not finite, so it is not written")
    return tensor


def plain(name, parameter, dtype):
    """The `Entry` of a parameter under its own name."""
    return Entry([(name, list(parameter.shape), dtype)],
                 lambda: [finite(name, full(parameter.detach()).to("cpu", dtype))])


def in_diffusers_names(transformer, dtype):
    """An `Entry` for each parameter."""
    return [plain(name, parameter, dtype) for name, parameter in transformer.named_parameters()]


def in_released_names(transformer, dtype, float8=False):
    """An `Entry` for each tensor with black-forest-labs' name. float8: the blocks' matrices are stored so, each with
    its scale beside it, in the spelling that every ComfyUI reads."""
    parameters = dict(transformer.named_parameters())
    entries = []
    if float8:  # two numbers: ComfyUI then computes the products in full precision
        entries.append(Entry([(MARKER, [2], torch.float8_e4m3fn)], lambda: [torch.zeros(2, dtype=torch.float8_e4m3fn)]))
    for name, parts in released.parts_of(transformer.config).items():
        rows = sum(parameters[ours].shape[0] for ours in parts)
        shape = [rows, *parameters[next(iter(parts))].shape[1:]]
        make = partial(joined, name, {parameters[ours]: pieces for ours, pieces in parts.items()}, rows, dtype)
        if float8 and len(shape) == 2 and "_blocks." in name:
            scale = name.removesuffix("weight") + "scale_weight"
            heads = [(name, shape, torch.float8_e4m3fn), (scale, [], torch.float32)]
            entries.append(Entry(heads, partial(scaled, make)))
        else:
            entries.append(Entry([(name, shape, dtype)], make))
    return entries


def joined(name, parts, rows, dtype):
    """[the tensor with black-forest-labs' name] of parts {parameter: its `released.Piece`s of the tensor's rows}."""
    found = []
    for parameter, pieces in parts.items():
        tensor = full(parameter.detach()).to("cpu", dtype)
        for piece in pieces:
            first, last = piece.of(rows)
            found.append((first, tensor[:last - first]))
            tensor = tensor[last - first:]
    return [finite(name, torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])]))]


def scaled(make):
    """[a tensor in float8, its scale]: the tensor is the product. ComfyUI has one scale for all rows."""
    tensor, = make()
    numbers, scale = quantised(tensor.flatten())
    return [numbers.view(tensor.shape), scale]


# --------------------------------------------------------------------------------------------------- the files
def header_of(entries, about=None):
    """The header of a safetensors file, bytes: its length in 8 bytes, then JSON, padded to a multiple of 8. about:
    {key: text} of further metadata."""
    header = {"__metadata__": {"format": "pt"} | (about or {})}
    end = 0
    for entry in entries:
        for name, shape, dtype in entry.heads:
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(entries, about=None):
    """Yields the content of a safetensors file in pieces: the header, then each full tensor. An all-gather needs every
    rank, so every rank must consume all pieces. Raises NotFinite."""
    yield header_of(entries, about)
    for entry in entries:
        for tensor in entry.make():
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path, entries, world, about=None):
    """Write a safetensors file, with {key: text} in its metadata. No process holds a full copy. The file is renamed
    when complete: if the disk is full, or a tensor is not finite, an existing file stays as it was. Raises OSError and
    NotFinite."""
    pieces = bytes_of(entries, about)
    if not world.main:
        for _ in pieces:  # only to take part in each all-gather
            pass
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, pieces)


def export(transformer, folder, world, dtype=torch.float32, about=None):
    """Write config.json and one diffusion_pytorch_model.safetensors in diffusers' layout, which FluxPipeline and
    ComfyUI load. about: {key: text} of its metadata. Raises as `write`."""
    folder = Path(folder)
    write(folder / ONE_FILE, in_diffusers_names(transformer, dtype), world, about)
    if not world.main:
        return
    config = json.loads(transformer.to_json_string())
    config["_class_name"] = type(transformer).__name__.removeprefix("FSDP")  # FSDP2 renames the class that it shards
    write_json(folder / "config.json", config)
    (folder / INDEX).unlink(missing_ok=True)


def export_as(transformer, path, world, name, about=None):
    """Write full weights as one file in bf16. name: of `command_line.SAVE_AS`, except kohya. Raises as `write`."""
    if name == "diffusers":
        entries = in_diffusers_names(transformer, torch.bfloat16)
    else:
        entries = in_released_names(transformer, torch.bfloat16, float8=name == "comfyui-fp8")
    write(path, entries, world, about)
