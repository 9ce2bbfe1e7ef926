"""A tensor that may be sharded: this process's rows, the whole, whether it is finite."""

import torch
from torch.distributed.tensor import DTensor, Shard


def local_part(tensor):
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def my_rows(parameter):
    """(first, last) of the rows of a full tensor that this rank holds; all of them if it is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            rows = parameter.shape[0]
            parts = parameter.device_mesh.size(axis)
            chunk = -(-rows // parts)  # as torch.chunk: full chunks first, the last ones short or empty
            first = min(parameter.device_mesh.get_local_rank(axis) * chunk, rows)
            return first, min(first + chunk, rows)
    return 0, parameter.shape[0]


def own_parameters(network):
    """{name: parameter} as a network has them without adapters. To a layer that has one, peft gives another
    name, base_layer, and its adapter's matrices are lora_A and lora_B beside it."""
    found = {}
    for name, parameter in network.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            found[name.replace(".base_layer.", ".")] = parameter
    return found


@torch.no_grad()
def fill(parameter, tensor):
    """Copy this rank's rows of a full tensor, or of a slice of a file, into a parameter."""
    first, last = my_rows(parameter)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(tensor[first:last].to(local.dtype))


def full(tensor):
    """A tensor that may be sharded, in full on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def are_finite(tensors):
    """Whether every number of some tensors is finite, of this process's part of them."""
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.dtype.itemsize == 1:
            local = local.to(torch.bfloat16)  # torch cannot ask a float8
        if not local.detach().isfinite().all():
            return False
    return True
