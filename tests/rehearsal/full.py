"""Two updates, or a sampled picture, at FLUX.1-dev's size with the stub preloaded: `python full.py REPORT PROCESSES
LINE ...`, as the first of so many processes. A LINE has the flags of train.py, or "sample" and those of sample.py.
REPORT becomes {LINE: {"allocated", "reserved": bytes at their peak, "planned": the plan's, and of updates "optimizer":
the launches of its step}}.

Nothing large is written on the host: its memory is address space, with no page behind it.
"""

import gc
import json
import os
import sys
from collections import Counter
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from run import counts, since, stand_in
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import command
import flow
import prepare
import sample
import train
from engine.command_line import sides
from engine.memory import layouts, modes, parallel, plan, sampling
from engine.memory.counts import count
from experiments import bench

LARGE = 10**5  # numbers of a tensor of the host that is not written


def alone(size):
    """Be rank 0 of `size` processes of which no other one exists."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    parallel.meet_the_others = lambda backend, patience: dist.init_process_group(
        "cpu:fake,cuda:fake", store=FakeStore(), rank=0, world_size=size)
    parallel.World.gather = lambda self, value: [value] * self.size


# ---------------------------------------------------------------------------------------------------- on the host
def random_weights_of_the_card(transformer, device):
    """In place of bench.fill_at_random: the values do not matter."""


def pinned(tensor):
    """In place of Tensor.pin_memory: pinned memory of the same size, into which nothing is copied."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class NothingOnTheHost(TorchDispatchMode):
    """Leaves out what adds to large tensors of the host: the gradients of --memory offload."""

    def __torch_dispatch__(self, op, types, arguments=(), named=None):
        if op is torch.ops.aten.add_.Tensor and arguments[0].device.type == "cpu" and arguments[0].numel() > LARGE:
            return arguments[0]
        return op(*arguments, **(named or {}))


def forget(a, run, step, looks):
    """In place of train.optimizer_step, where the optimizer is on the host: only the gradients are freed."""
    for parameter in layouts.trainable(run.net.transformer):
        parameter.grad = None
    return torch.zeros(())


# ---------------------------------------------------------------------------------------------------------- a line
@cache
def counted():
    """The `Counts`, which are the same for every line of updates."""
    return count(prepare.job(*command.read([])), torch.bfloat16)


def updates(argv, size):
    """Two updates. Returns {"planned": what the plan says of their peak, bytes; "optimizer"}; of the text encoders
    nothing is rehearsed."""
    a, model = command.read(["--rollout-steps", "2", "--global-batch", str(size), *argv])
    a.steps = 1
    world = parallel.World(a.replicas, mesh=modes.needs_mesh(a.memory))
    run = bench.random_run(a, model, world)
    step = train.optimizer_step
    launches = []

    def counting(*arguments):
        before = counts()
        found = forget(*arguments) if a.memory in modes.ON_THE_HOST else step(*arguments)
        launches.append(since(before)["launches"])
        return found

    train.optimizer_step = counting
    with NothingOnTheHost() if a.memory in modes.ON_THE_HOST else nullcontext():
        for _ in range(2):
            train.update(a, run, 1)
    train.optimizer_step = step
    planned = plan.divide(run.job, counted(), size, torch.bfloat16)
    return {"planned": max(planned.peak_in_update, planned.peak_in_rollout), "optimizer": launches[-1]}


def picture(argv):
    """A picture in two steps. Returns {"planned"}."""
    args, model = command.of_script(sample.flags(), argv)
    world = parallel.World()
    net = bench.random_flow(model, world, *sampling.how(args.memory, None, model, world))
    grid = net.grid(*sides(args.size))
    prompt = bench.random_embeddings(net, ["a prompt"], model.configs.text_tokens)
    flow.sample(net, prompt.txt, prompt.pooled, flow.noise(net, grid, [0]), grid, 2, args.guidance)
    return {"planned": sampling.predictions(sampling.job(model, args.size, 1))[args.memory].peak_in_pictures}


def by_stream():
    """GiB that the allocator reserves for each stream."""
    taken = Counter()
    for segment in torch.cuda.memory_snapshot():
        taken[segment["stream"]] += segment["total_size"]
    return [round(size / 2**30, 2) for size in taken.values()]


def main():
    report, size, *lines = sys.argv[1:]
    size = int(size)
    if size > 1:
        alone(size)
    kept = stand_in()
    bench.fill_at_random = random_weights_of_the_card
    torch.Tensor.pin_memory = pinned
    told = {}
    parallel.device_and_dtype()  # sets how the allocator works, before it is first used
    for line in lines:
        torch.cuda.reset_peak_memory_stats()
        first, *rest = line.split()
        found = picture(rest) if first == "sample" else updates([first, *rest], size)
        bytes_of = {"planned": found["planned"], "allocated": torch.cuda.max_memory_allocated(),
                    "reserved": torch.cuda.max_memory_reserved()}
        told[line] = found | bytes_of
        print(line, {name: round(value / 2**30, 2) for name, value in bytes_of.items()}, by_stream(), flush=True)
        dist.destroy_process_group()
        gc.collect()
        torch.cuda.empty_cache()
    Path(report).write_text(json.dumps(told))
    del kept


if __name__ == "__main__":
    main()
