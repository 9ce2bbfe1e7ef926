"""Functions of a tensor that may be sharded: its local part, its rows, the full tensor, whether it is finite."""

import torch
from torch.distributed.tensor import DTensor, Shard


def local_part(tensor):
    """This process's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def my_rows(parameter):
    """(first, last + 1) of the rows that this rank holds; all rows if the parameter is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            rows = parameter.shape[0]
            parts = parameter.device_mesh.size(axis)
            chunk = -(-rows // parts)  # as torch.chunk: full chunks first; the last ones may be short or empty
            first = min(parameter.device_mesh.get_local_rank(axis) * chunk, rows)
            return first, min(first + chunk, rows)
    return 0, parameter.shape[0]


def own_parameters(network):
    """{name: parameter} of a network without its adapters, under the names that it has without them. peft renames a
    layer with an adapter to base_layer, and puts the adapter's lora_A and lora_B beside it."""
    found = {}
    for name, parameter in network.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            found[name.replace(".base_layer.", ".")] = parameter
    return found


@torch.no_grad()
def fill(parameter, tensor):
    """Copy this rank's rows into a parameter. tensor: a full tensor, or a slice of a file."""
    first, last = my_rows(parameter)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(tensor[first:last].to(local.dtype))


def full(tensor):
    """The full tensor on every rank, by an all-gather if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def are_finite(tensors):
    """Whether every number in this process's part of a list of tensors is finite."""
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.dtype.itemsize == 1:
            local = local.to(torch.bfloat16)  # torch has no isfinite for float8
        if not local.detach().isfinite().all():
            return False
    return True
