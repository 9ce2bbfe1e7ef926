"""Full weights as one safetensors file in diffusers' layout, streamed tensor by tensor."""

import json
from pathlib import Path

import torch

from engine.files import write_whole
from engine.model.tensor_files import INDEX, ONE_FILE
from engine.model.tensors import full


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
    write_whole(folder / ONE_FILE, pieces)
    write_whole(folder / "config.json", transformer.to_json_string())
    (folder / INDEX).unlink(missing_ok=True)
