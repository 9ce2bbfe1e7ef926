"""Claims about engine/memory/downloads.py: the sums that FSDP2 would make, and a parameter has none until they are
complete."""

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from engine.memory import downloads, layouts, parallel


def gradients(batches, staged=None):
    """Of a linear layer whose parameters are on the host, after `batches` backwards. staged: with `Downloads`, and so
    many bytes on their way; None: by FSDP2 alone."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 4)
    world = parallel.World(mesh=True)
    fully_shard(layer, mesh=world.mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    if staged is not None:
        layer.downloads = downloads.Downloads(list(layer.parameters()))
    for batch in range(batches):
        layer(torch.full((2, 8), 0.3 + batch)).sin().sum().backward()
        assert staged is None or all(parameter.grad is None for parameter in layer.parameters())
    layouts.finish_gradients(layer)
    layouts.finish_gradients(layer)  # once more changes nothing
    found = [parameter.grad.to_local().clone() for parameter in layer.parameters()]
    world.close()
    return found


@pytest.mark.parametrize("staged", [0, 40, 2**20], ids=["each at once", "one behind", "all at the end"])
@pytest.mark.parametrize("batches", [1, 3])
def test_the_sums_are_those_of_fsdp(monkeypatch, staged, batches):
    """Bit for bit, however many gradients wait to be added."""
    monkeypatch.setattr(downloads, "STAGED", staged)
    theirs = gradients(batches)
    ours = gradients(batches, staged)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_update_begins_without_the_sums_of_the_one_before(monkeypatch):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(3))
    sums = downloads.Downloads([parameter])
    for expected in (1, 5):
        (expected * parameter).sum().backward()
        sums.finish()
        assert torch.equal(parameter.grad, torch.full((3,), float(expected)))
        parameter.grad = None


@pytest.mark.parametrize("gpu, given, neighbours, threads", [
    (False, None, 1, 1), (False, "8", 1, 1), (True, None, 1, 12), (True, "1", 4, 3), (True, "1", 16, 1),
    (True, "6", 4, 5)])
def test_a_gpus_process_has_its_share_of_the_cores(monkeypatch, gpu, given, neighbours, threads):
    """12 cores. torchrun sets OMP_NUM_THREADS to 1; another number is the user's, and leaves torch's own 5."""
    seen = [5]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda process: range(12))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    parallel.choose_threads(neighbours)
    assert seen[-1] == threads
