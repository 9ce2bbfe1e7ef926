"""The tensors of a transformer in safetensors files, as slices: a process reads its own rows and no more."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from engine.errors import UserError
from engine.model.configs import check_config

INDEX = "diffusion_pytorch_model.safetensors.index.json"
ONE_FILE = "diffusion_pytorch_model.safetensors"
FULL_SIZE = 1e9  # parameters


def weight_files(folder):
    """{parameter name: file} of a diffusers transformer folder, sharded or one file."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        index = check_config(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(is_file_name(file) for file in index.values()):
            raise UserError(f"{folder / INDEX}: has no weight_map of tensors and the files beside it")
        return {name: folder / file for name, file in index.items()}
    with safe_open(folder / ONE_FILE, "pt") as file:
        return {name: folder / ONE_FILE for name in file.keys()}


def is_file_name(name):
    """Whether a value is the name of a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


class Source(NamedTuple):
    """Where a network comes from: its config, a dict; {name: slice of a file} of its tensors; the file or folder that
    they are in, for messages."""
    config: dict
    tensors: dict
    where: Path

    def on_meta(self, kind):
        """A diffusers model of class `kind`, without memory. Raises UserError if a tensor is missing, or not its
        own."""
        network = meta_network(kind, self.config)
        must_be_whole(network, self.tensors, self.where)
        return network


def meta_network(kind, config):
    """A diffusers model of class `kind`, without memory."""
    with torch.device("meta"):
        return kind.from_config(config)


def is_full_size(kind, config):
    """Whether a network has billions of parameters, which a CPU does not train."""
    return sum(parameter.numel() for parameter in meta_network(kind, config).parameters()) > FULL_SIZE


def tensors_in(folder):
    """{name: slice of a file} of the tensors of a diffusers transformer folder."""
    files = weight_files(folder)
    opened = {file: safe_open(file, "pt") for file in set(files.values())}
    return {name: opened[file].get_slice(name) for name, file in files.items()}


def must_be_whole(network, tensors, where):
    """Raise UserError unless every tensor of a network is there, of its shape, and no other: known before the
    network takes any memory."""
    shapes = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
    if tensors.keys() != shapes.keys():
        odd = sorted(tensors.keys() ^ shapes.keys())
        raise UserError(f"{where}: {len(odd)} tensors are missing or not {type(network).__name__}'s, "
                        f"such as {odd[0]}")
    for name, shape in shapes.items():
        if list(tensors[name].get_shape()) != shape:
            raise UserError(f"{where}: {name} is {tensors[name].get_shape()}, the config says {shape}")
        if tensors[name].get_dtype()[0] not in "FB":
            raise UserError(f"{where}: {name} holds {tensors[name].get_dtype()}, which are no weights")
