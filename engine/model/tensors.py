"""Functions of a tensor that may be sharded: its local part, its rows, the full tensor, whether it is finite."""

import math
from itertools import islice

import torch
from torch.distributed.tensor import DTensor, Shard

from engine.model.float8 import FLOAT8, quantised


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
    """{name: parameter} of a network without its adapters and scales, under the names that it has without them. peft
    renames a layer with an adapter to base_layer, and puts the adapter's lora_A and lora_B beside it."""
    found = {}
    for name, parameter in network.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name and not name.endswith(".row_scale"):
            found[name.replace(".base_layer.", ".")] = parameter
    return found


@torch.no_grad()
def fill(parameter, tensor, scale=None):
    """Copy this rank's rows into a parameter. tensor: a full tensor, or a slice of a file. scale: the parameter of the
    rows' scales, if the rows are to be in float8."""
    first, last = my_rows(parameter)
    put(parameter, tensor[first:last], scale)


@torch.no_grad()
def put(parameter, rows, scale=None):
    """Copy rows, which are all that this rank holds, into a parameter, as `fill`."""
    local = local_part(parameter)
    if scale is None:
        local.copy_(rows.to(local.dtype))
        return
    numbers, scales = quantised(rows if rows.is_cuda else rows.to(local.device))
    local.copy_(numbers.view(local.dtype))
    local_part(scale).copy_(scales)


def values(parameter, scale=None):
    """The rows that this rank holds, float32."""
    local = local_part(parameter)
    if scale is None:
        return local.float()
    return local.view(FLOAT8).float() * local_part(scale).float()[:, None]


def full(tensor):
    """The full tensor on every rank, by an all-gather if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def are_finite(tensors):
    """Whether every number in this process's part of a list of tensors is finite. A GPU is waited for once."""
    largest = [norm for some in alike(tensors) for norm in torch._foreach_norm(some, float("inf"))]
    return all(math.isfinite(number) for norm in read(largest) for number in norm)


def alike(tensors):
    """Yields this process's parts of a list of tensors in lists of one dtype and device, without empty ones. Whole
    numbers are left out, since all are finite: so are the bytes of float8, whose scales tell what is not."""
    groups = {}
    for tensor in tensors:
        local = local_part(tensor.detach())
        if local.numel() == 0 or not local.is_floating_point():
            continue
        groups.setdefault((local.dtype, local.device), []).append(local)
    yield from groups.values()


def read(tensors):
    """The numbers of small tensors, a list for each. A GPU is waited for once, however many tensors there are."""
    groups = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor.detach().flatten().double())
    numbers = {device: iter(torch.cat(group).tolist()) for device, group in groups.items()}
    return [list(islice(numbers[tensor.device], tensor.numel())) for tensor in tensors]
