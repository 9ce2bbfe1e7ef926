"""LoRA (arXiv 2106.09685): adapters beside a FLUX's linear layers, and their file in diffusers' format.

A layer computes y = W x + B A x. W [out, in] is frozen. A [R, in] starts random and B [out, R] zero, so that training
starts from the base model. The layers are peft's. What peft does not do for a sharded transformer that was built on the
meta device is done here: to fill its adapters, and to read and write them.
"""

import importlib
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from engine.errors import UserError
from engine.model import lora_files
from engine.model.export import export as export_full
from engine.model.export import export_as, finite, plain, write
from engine.model.float8 import scales_of
from engine.model.lora_files import FILE, PREFIX
from engine.model.tensors import fill, full, my_rows, own_parameters, put, values


# ----------------------------------------------------------------------------------------------- the adapters
def library():
    """The library peft. It is imported only when a LoRA is trained, since the import takes more than a second."""
    return importlib.import_module("peft")


def has_adapter(layer):
    """Whether a linear layer of this name gets an adapter: all in the blocks, except in their norms."""
    return "transformer_blocks." in layer and "norm" not in layer


def layers_of(transformer):
    """{name: layer} of all linear layers that get an adapter: 418 of FLUX.1-dev."""
    found = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and has_adapter(name):
            found[name] = module
    return found


def add_adapters(transformer, rank):
    """Add adapters of a rank to the layers of `layers_of`, and freeze all other parameters. alpha is the rank, so
    peft's factor alpha / R is 1. The transformer may be on the meta device."""
    names = list(layers_of(transformer))
    config = library().LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    library().inject_adapter_in_model(config, transformer)


def adapters(transformer):
    """{name in the file: parameter} of all adapters. The file's names lack ".default", peft's name of the adapter."""
    found = {}
    for name, parameter in transformer.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            found[PREFIX + name.replace(".default.", ".")] = parameter
    return found


def start(transformer, seed):
    """Give the adapters their first values: A random, B zero. Each process draws the full matrix, from its name and
    the seed, and keeps its own rows. So the values are the same on any number of processes."""
    for name, parameter in adapters(transformer).items():
        values = torch.zeros(parameter.shape)
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            nn.init.kaiming_uniform_(values, a=5**0.5, generator=generator)  # as peft, and nn.Linear
        fill(parameter, values)


@contextmanager
def adapter_off(transformer):
    """Inside this context the adapters are off, so the transformer is its base model. A transformer without adapters
    is not changed."""
    layers = [module for module in transformer.modules() if hasattr(module, "lora_A")]
    # Not peft's enable_adapters(False), which also freezes the adapters: FSDP2 checks only at their first all-gather
    # whether they need a gradient.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


# --------------------------------------------------------------------------------------------------- the file
def is_lora(place):
    """Whether a folder or a file holds a LoRA. Raises UserError for a safetensors file that cannot be read."""
    return lora_files.file_in(place) is not None


def exported(transformer, dtype):
    """{name in the file: tensor on the CPU} of all adapters, on every rank. Raises NotFinite."""
    return {name: finite(name, full(parameter.detach()).to("cpu", dtype).contiguous())
            for name, parameter in adapters(transformer).items()}


def write_lora(path, tensors, world, about=None):
    """Write the tensors of a LoRA as a safetensors file, with {key: text} in its metadata, by rank 0. Raises OSError
    and NotFinite."""
    write(path, [plain(name, tensor, tensor.dtype) for name, tensor in tensors.items()], world, about)


def export(transformer, folder, world, dtype=torch.float32, about=None):
    """Write what was trained: the adapters, if there are any, as pytorch_lora_weights.safetensors, which
    FluxPipeline.load_lora_weights and ComfyUI load; otherwise all weights. about: {key: text} of the file's metadata.
    Raises OSError and NotFinite."""
    if adapters(transformer):
        write_lora(Path(folder) / FILE, exported(transformer, dtype), world, about)
    else:
        export_full(transformer, folder, world, dtype, about)


def save_as(transformer, path, world, name, about=None):
    """Write what was trained as one file in bf16. name: of `command_line.SAVE_AS`. Raises OSError and NotFinite."""
    if name != "kohya":
        export_as(transformer, path, world, name, about)
        return
    tensors = exported(transformer, torch.bfloat16)
    pairs = {}
    for key in tensors:
        if ".lora_A." in key:
            pairs[lora_files.layer_of(key)] = lora_files.Pair(tensors[key], tensors[key.replace("lora_A", "lora_B")])
    write_lora(path, lora_files.in_kohyas_names(pairs, transformer.config), world, about)


def fitting(transformer, place, rank=None):
    """{layer: `Pair`} of the LoRA in a folder or file. Raises UserError if it does not fit the transformer, which may
    be on the meta device; or, if a rank is given, if adapters of that rank cannot start from it."""
    path, pairs = lora_files.read(place, transformer.config)
    merged = "without --lora it is merged into the weights, as python -m engine.merge does"
    for layer, (A, _, bias) in pairs.items():
        if rank is not None and len(A) != rank:
            ranks = sorted({len(pair.A) for pair in pairs.values()})
            on = f"--lora {len(A)} goes on with it; " if len(ranks) == 1 else f"it has ranks {ranks}; "
            raise UserError(f"{path}: of another rank than --lora {rank}; {on}{merged}")
        if rank is not None and (not has_adapter(layer) or bias is not None):
            what = "has a bias" if has_adapter(layer) else "gets no adapter with --lora"
            raise UserError(f"{path}: {layer} {what}; {merged}")
    return pairs


def load_into(transformer, place, strength=1.0):
    """Read a LoRA into the adapters of a transformer, as strength B A. A layer that is not in the file stays as it is.

    Raises UserError, before anything is changed, if the LoRA has another architecture or rank.
    """
    parameters = adapters(transformer)
    rank = next(len(parameter) for name, parameter in parameters.items() if ".lora_A." in name)
    for layer, pair in fitting(transformer, place, rank).items():
        for side, tensor in (("A", pair.A), ("B", strength * pair.B)):
            fill(parameters[f"{PREFIX}{layer}.lora_{side}.weight"], tensor)


@torch.no_grad()
def merge_into(transformer, place, strength=1.0):
    """Add the LoRA in a folder or file to the weights of a transformer without adapters: W + strength B A. The weights
    may be sharded.

    Raises UserError, before anything is changed, if the LoRA has another architecture.
    """
    pairs = fitting(transformer, place)
    parameters = own_parameters(transformer)
    scales = scales_of(transformer)
    for layer, (A, B, bias) in pairs.items():
        for kind, change in (("weight", B), ("bias", bias)):
            if change is not None:
                parameter = parameters[f"{layer}.{kind}"]
                first, last = my_rows(parameter)
                scale = scales.get(f"{layer}.{kind}")
                change = B[first:last] @ A if kind == "weight" else change[first:last]
                put(parameter, values(parameter, scale) + strength * change.to(parameter.device), scale)
