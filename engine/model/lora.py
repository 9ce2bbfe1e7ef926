"""LoRA (arXiv 2106.09685) beside a FLUX's linear layers, and its file as users know it.

A layer computes y = W x + B A x: W stays frozen, A [R, in] starts random and B [out, R] zero, so that
training starts from the base model. The layers are peft's. What peft does not do for a transformer that is
built on the meta device and sharded by FSDP2 is here: to give the matrices their values, and to read and
write them.
"""

import importlib
import json
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from engine.errors import UserError, one_line
from engine.files import write_whole
from engine.model import single_file
from engine.model.export import export as export_full
from engine.model.tensors import fill, full, local_part, my_rows, own_parameters
from engine.paths import not_a_path

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
PREFIX = "transformer."                    # whose a tensor of that file is: diffusers' and ComfyUI's word


# ----------------------------------------------------------------------------------------------- the adapters
def library():
    """peft. It is imported when a LoRA is trained and not before: it takes more than a second."""
    return importlib.import_module("peft")


def has_adapter(layer):
    """Whether a linear layer of this name gets an adapter: those of the blocks but for the norms'."""
    return "transformer_blocks." in layer and "norm" not in layer


def layers_of(transformer):
    """{name: layer} of all linear layers that get an adapter: 418 of FLUX.1-dev."""
    found = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and has_adapter(name):
            found[name] = module
    return found


def add_adapters(transformer, rank):
    """Put adapters of a rank beside these layers, and freeze the rest. alpha is the rank, so that B A enters
    as it is. It may be on the meta device."""
    names = list(layers_of(transformer))
    config = library().LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    library().inject_adapter_in_model(config, transformer)


def adapters(transformer):
    """{name in the file: parameter} of all adapters: peft's own name for an adapter, default, is left out."""
    found = {}
    for name, parameter in transformer.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            found[PREFIX + name.replace(".default.", ".")] = parameter
    return found


def start(transformer, seed):
    """Give the adapters their values. Each is drawn from its name and the seed, in full, and every process
    keeps its rows, so that any number of processes start from the same."""
    for name, parameter in adapters(transformer).items():
        values = torch.zeros(parameter.shape)
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            nn.init.kaiming_uniform_(values, a=5**0.5, generator=generator)  # as peft, and nn.Linear
        fill(parameter, values)


@contextmanager
def adapter_off(transformer):
    """Inside, a transformer with adapters is its base model; without any it is what it is."""
    layers = [module for module in transformer.modules() if hasattr(module, "lora_A")]
    # Not peft's enable_adapters(False), which freezes the adapters as well: FSDP2 looks once, when it first
    # gathers them, whether they need a gradient.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


# --------------------------------------------------------------------------------------------------- the file
def is_lora(place):
    """Whether a folder or a file holds a LoRA, and not a transformer's weights. Raises UserError for a
    .safetensors file that cannot be read."""
    if not_a_path(place):
        return False
    if single_file.is_single_file(place):
        return any("lora" in name for name in single_file.slices_of(place))
    return (Path(place) / FILE).is_file()


def export_adapters(transformer, folder, world, dtype=torch.float32):
    """Write the adapters as pytorch_lora_weights.safetensors, which FluxPipeline.load_lora_weights and
    ComfyUI load. Raises OSError."""
    tensors = {}
    for name, parameter in adapters(transformer).items():  # gathering takes every process
        tensors[name] = full(parameter.detach()).to("cpu", dtype).contiguous()
    if world.main:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder) / FILE, save(tensors, {"format": "pt"}))


def export(transformer, folder, world, dtype=torch.float32):
    """Write what was trained, as users load it: the adapters, or all weights. Raises OSError."""
    if adapters(transformer):
        export_adapters(transformer, folder, world, dtype)
    else:
        export_full(transformer, folder, world, dtype)


def read(place):
    """(path, {layer: (A [R, in], B [out, R])}) of the LoRA that a folder holds, or a file is; the layer as
    diffusers names it.

    Raises UserError for what is none of a transformer's, such as another tool's names, or a text encoder's.
    """
    path = Path(place) / FILE if Path(place).is_dir() else Path(place)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            scale = scale_of(file.metadata() or {})
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
    pairs = {}
    for name, tensor in tensors.items():
        layer, _, side = name.removesuffix(".weight").rpartition(".")
        other = name.replace("lora_A", "lora_B") if side == "lora_A" else name.replace("lora_B", "lora_A")
        ours = name.startswith(PREFIX) and name.endswith(".weight") and side in ("lora_A", "lora_B")
        if not ours or other not in tensors or tensor.ndim != 2 or not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is not known; a LoRA has {PREFIX}LAYER.lora_A.weight and "
                            ".lora_B.weight, as diffusers saves it")
        if side == "lora_A":
            pairs[layer.removeprefix(PREFIX)] = (tensor.float(), scale * tensors[other].float())
    if not pairs:
        raise UserError(f"{path}: holds no tensor")
    return path, pairs


def scale_of(metadata):
    """alpha / R, as diffusers notes it in a file's metadata; 1 where it notes nothing."""
    noted = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return noted.get(f"{PREFIX}lora_alpha", 1) / noted.get(f"{PREFIX}r", 1)


def fitting(transformer, place, rank=None):
    """{layer: (A, B)} of the LoRA in a folder or file, which fits a transformer, perhaps one on the meta
    device; and, if a rank is given, adapters of that rank, which are to go on with it. Raises UserError."""
    path, pairs = read(place)
    parameters = own_parameters(transformer)
    for layer, (A, B) in pairs.items():
        weight = parameters.get(f"{layer}.weight")
        if weight is None:
            raise UserError(f"{path}: this transformer has no layer {layer}")
        if weight.shape != (B.shape[0], A.shape[1]) or A.shape[0] != B.shape[1]:
            raise UserError(f"{path}: {layer} is {B.shape[0]} x {A.shape[1]}, and here "
                            f"{' x '.join(map(str, weight.shape))}: another model's")
        if rank is not None and len(A) != rank:
            raise UserError(f"{path}: of another rank than --lora {rank}; --lora {len(A)} goes on with it, "
                            "and without --lora it is merged into the weights")
        if rank is not None and not has_adapter(layer):
            raise UserError(f"{path}: this transformer has no adapter beside {layer}")
    return pairs


def load_into(transformer, place):
    """Read a LoRA into the adapters that a transformer has. A layer that the file leaves out stays as it is.

    Raises UserError if it is of another architecture or rank; nothing has been changed then.
    """
    parameters = adapters(transformer)
    rank = next(len(parameter) for name, parameter in parameters.items() if ".lora_A." in name)
    for layer, pair in fitting(transformer, place, rank).items():
        for side, tensor in zip("AB", pair, strict=True):
            fill(parameters[f"{PREFIX}{layer}.lora_{side}.weight"], tensor)


@torch.no_grad()
def merge_into(transformer, place):
    """Add the LoRA in a folder or file to the weights of a transformer without adapters, W + B A, sharded or
    not.

    Raises UserError if it is of another architecture; nothing has been changed then.
    """
    pairs = fitting(transformer, place)
    parameters = own_parameters(transformer)
    for layer, (A, B) in pairs.items():
        weight = parameters[f"{layer}.weight"]
        first, last = my_rows(weight)
        local = local_part(weight)
        local.copy_(local.float() + (B[first:last] @ A).to(local.device))
