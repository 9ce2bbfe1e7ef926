"""The tensors of a transformer in safetensors files, as slices, so that a process reads only its own rows."""

from pathlib import Path
from typing import NamedTuple

import diffusers
import torch

from engine.errors import UserError
from engine.model.configs import FLOATS, check_config, slices_of
from engine.model.single_file import named

INDEX = "diffusion_pytorch_model.safetensors.index.json"
ONE_FILE = "diffusion_pytorch_model.safetensors"
FULL_SIZE = 1e9  # parameters


def weight_files(folder):
    """{parameter name: file} of a diffusers transformer folder with one weight file or several. Raises UserError."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        index = check_config(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(is_file_name(file) for file in index.values()):
            raise UserError(f"{folder / INDEX}: has no weight_map from tensors to files beside it")
        return {name: folder / file for name, file in index.items()}
    return dict.fromkeys(slices_of(folder / ONE_FILE), folder / ONE_FILE)


def is_file_name(name):
    """Whether a value is a plain file name, without a path to another folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


class Source(NamedTuple):
    """What a network is loaded from: its config, a dict; its tensors, {name: slice of a file}; the file or folder that
    holds them, for messages."""
    config: dict
    tensors: dict
    where: Path

    def on_meta(self, kind):
        """A diffusers model of class `kind` on the meta device, which takes no memory. Raises UserError as
        `must_be_whole`."""
        network = meta_network(kind, self.config)
        must_be_whole(network, self.tensors, self.where)
        return network


def kind_of(config):
    """The class of diffusers that a checked config names. diffusers imports it only when it is first used."""
    return getattr(diffusers, config["_class_name"])


def meta_network(kind, config):
    """A diffusers model of class `kind` on the meta device, which takes no memory."""
    with torch.device("meta"):
        return kind.from_config(config)


def is_full_size(kind, config):
    """Whether a network has billions of parameters, which a CPU does not train."""
    return sum(parameter.numel() for parameter in meta_network(kind, config).parameters()) > FULL_SIZE


def tensors_in(folder):
    """{name: slice of a file} of the tensors of a diffusers transformer folder. Raises UserError, also for a file that
    holds other tensors than the index says."""
    files = weight_files(folder)
    slices = {}
    for file in sorted(set(files.values())):
        here = slices_of(file)
        odd = sorted(here.keys() ^ {name for name, its in files.items() if its == file})
        if odd:
            raise UserError(f"{file}: holds other tensors than {INDEX} says, such as {odd[0]}")
        slices |= here
    return named(slices, sorted(set(files.values())), folder)


def must_be_whole(network, tensors, where):
    """Raise UserError unless the tensors are exactly the network's, with its shapes and a floating-point dtype. The
    network may be on the meta device."""
    shapes = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
    if tensors.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        such = [f"{names[0]} ({what})" for names, what in ((missing, "missing"), (unknown, "unknown")) if names]
        raise UserError(f"{where}: {len(missing) + len(unknown)} tensors are missing or not "
                        f"{type(network).__name__}'s, such as {', '.join(such)}")
    for name, shape in shapes.items():
        if list(tensors[name].get_shape()) != shape:
            raise UserError(f"{where}: {name} is {tensors[name].get_shape()}, the config says {shape}")
        if tensors[name].get_dtype() not in FLOATS:
            raise UserError(f"{where}: {name} holds {tensors[name].get_dtype()}, which are no weights")
