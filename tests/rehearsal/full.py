"""Two updates at FLUX.1-dev's size with the stub preloaded: `python full.py REPORT PROCESSES FLAG ...`, with the flags
of train.py, as the first of so many processes. REPORT becomes {"allocated", "reserved": bytes at their peak, "planned":
the plan's, "optimizer": what the stub counted in the optimizer's step}. For what keeps everything on the GPU."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from run import counts, since, stand_in
from torch.testing._internal.distributed.fake_pg import FakeStore

import recipe
import train
from engine.memory import modes, parallel, plan
from experiments import bench


def alone(size):
    """Be rank 0 of `size` processes of which no other one exists."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    parallel.meet_the_others = lambda backend, patience: dist.init_process_group(
        "cpu:fake,cuda:fake", store=FakeStore(), rank=0, world_size=size)
    parallel.World.gather = lambda self, value: [value] * self.size


def main():
    report, size, *argv = sys.argv[1:]
    if int(size) > 1:
        alone(int(size))
    kept = stand_in()
    a, model = recipe.read(argv)
    a.steps = 1
    world = parallel.World(a.replicas, mesh=modes.needs_mesh(a.memory))
    run = bench.random_run(a, model, world)
    told = {}
    step = run.optimizer.step

    def counted():
        before = counts()
        step()
        told["optimizer"] = since(before)

    run.optimizer.step = counted
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        train.update(a, run, 1)
    told |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
             "planned": plan.predict(run.job, int(size), torch.bfloat16).peak}
    Path(report).write_text(json.dumps(told))
    del kept


if __name__ == "__main__":
    main()
