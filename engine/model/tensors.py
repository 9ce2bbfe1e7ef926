"""Functions of a tensor that may be sharded: its local part, its rows, the full tensor, whether it is finite."""

import math
from itertools import islice

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
    """Whether every number in this process's part of a list of tensors is finite. A GPU is waited for once."""
    largest = [norm for some in alike(tensors) for norm in torch._foreach_norm(some, float("inf"))]
    return all(math.isfinite(number) for norm in read(largest) for number in norm)


def alike(tensors):
    """Yields this process's parts of a list of tensors in lists of one dtype and device, without empty ones. Whole
    numbers are left out, since all are finite; float8 comes as bf16, one tensor at a time, for torch computes no
    more with it than to cast it."""
    groups = {}
    for tensor in tensors:
        local = local_part(tensor.detach())
        if local.numel() == 0 or not local.is_floating_point():
            continue
        if local.dtype.itemsize == 1:
            yield [local.to(torch.bfloat16)]
        else:
            groups.setdefault((local.dtype, local.device), []).append(local)
    yield from groups.values()


def read(tensors):
    """The numbers of small tensors, a list for each. A GPU is waited for once, however many tensors there are."""
    groups = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor.detach().flatten().double())
    numbers = {device: iter(torch.cat(group).tolist()) for device, group in groups.items()}
    return [list(islice(numbers[tensor.device], tensor.numel())) for tensor in tensors]
