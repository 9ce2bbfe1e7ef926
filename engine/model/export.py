"""Writes full weights as one safetensors file in diffusers' layout, tensor by tensor."""

import json
from pathlib import Path

import torch

from engine.files import write_json, write_whole
from engine.model.tensor_files import INDEX, ONE_FILE
from engine.model.tensors import full


def header_of(transformer, dtype):
    """The header of a safetensors file, bytes: its length in 8 bytes, then JSON, padded to a multiple of 8."""
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
    """Yields the content of a safetensors file in pieces: the header, then each full tensor. An all-gather needs every
    rank, so every rank must consume all pieces."""
    yield header_of(transformer, dtype)
    for parameter in transformer.parameters():
        tensor = full(parameter.detach()).to("cpu", dtype).contiguous()
        yield tensor.view(torch.uint8).numpy().tobytes()


def export(transformer, folder, world, dtype=torch.float32):
    """Write config.json and one diffusion_pytorch_model.safetensors in diffusers' layout, which FluxPipeline and
    ComfyUI load.

    The file is written tensor by tensor, so no process holds a full copy. It is renamed when complete: if the disk is
    full, an existing file stays as it was. Raises OSError.
    """
    folder = Path(folder)
    pieces = bytes_of(transformer, dtype)
    if not world.main:
        for _ in pieces:  # only to take part in each all-gather
            pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ONE_FILE, pieces)
    config = json.loads(transformer.to_json_string())
    config["_class_name"] = type(transformer).__name__.removeprefix("FSDP")  # FSDP2 renames the class that it shards
    write_json(folder / "config.json", config)
    (folder / INDEX).unlink(missing_ok=True)
