"""Many GPUs by torch's own means: torchrun, FSDP2 and HSDP.

One process on a CPU takes the same path with no mesh. The mean over ranks is taken by FSDP's gradient
reduction, so everything else in train.py is written as if there were one process.
"""

import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from tqdm import tqdm

from engine.errors import UserError, printable
from engine.model.tensors import fill, own_parameters


def device_and_dtype(local_rank=0):
    """(device, dtype to compute in): bf16 on a GPU, float32 on a CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank), torch.bfloat16
    return torch.device("cpu"), torch.float32


def one_thread_on_a_cpu():
    """A second thread gains a sixth on the miniature, and costs tenfold when the machine is busy."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def meet_the_others(backend, patience):
    """torch's init_process_group, which in its C++ waits for all processes, and hears no signal: so another
    thread does it. Who is asked to stop meanwhile can, though another process may have stopped already and
    never come."""
    errors = []

    def meet():
        try:
            dist.init_process_group(backend, timeout=patience)
        except Exception as error:
            errors.append(error)

    thread = Thread(target=meet, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


class World:
    """This process among all: rank, size, device, the mesh to shard over (None: one process on a CPU), and
    the dtype to compute in: bf16 on a GPU, float32 on a CPU. Masters and optimizer are float32."""

    def __init__(self, replicas=1, patience=timedelta(minutes=30), mesh=False):
        """Join the processes that torchrun started, if it did, and take this one's GPU, or one CPU thread.

        `replicas` is HSDP's: the parameters are sharded over size / replicas neighbours (a node) and
        replicated between them; UserError if it does not divide the size. `patience` is how long a process
        waits for the others. `mesh` asks for a mesh of one process on a CPU too, for what only FSDP2 can do
        (`memory.needs_mesh`).
        """
        gpu = torch.cuda.is_available()
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine
        if gpu and self.neighbours > torch.cuda.device_count():
            raise UserError(f"--nproc_per_node {self.neighbours}: there are {torch.cuda.device_count()} GPUs")
        if self.size % replicas:
            raise UserError(f"--replicas {replicas}: does not divide the {self.size} processes")
        self.device, self.dtype = device_and_dtype(local)
        self.mesh = None
        one_thread_on_a_cpu()
        if gpu:
            torch.cuda.set_device(self.device)
        # Gradient clipping and the exchange of Python objects use gloo on the CPU, all else NCCL on the GPU.
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        if "RANK" in os.environ:
            meet_the_others(backend, patience)
        elif gpu or mesh:  # one process without torchrun: FSDP2 wants a process group all the same
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if dist.is_initialized():
            if replicas > 1:
                shape, names = (replicas, self.size // replicas), ("replicate", "shard")
            else:
                shape, names = (self.size,), ("shard",)
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    @property
    def main(self):
        return self.rank == 0

    def say(self, text):
        """Print a line, once for all processes, under the progress bar if there is one."""
        if self.main:
            tqdm.write(printable(text))

    def rows(self, n):
        """The rows of this rank when n each are dealt to all ranks, in rank order: a slice."""
        return slice(self.rank * n, (self.rank + 1) * n)

    def gather(self, value):
        """The picklable `value` of every rank, a list in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def mean(self, numbers):
        """The mean of a list of {name: number}, each name's over those that have it and over all ranks."""
        everyones = [each for theirs in self.gather(numbers) for each in theirs]
        names = dict.fromkeys(name for each in everyones for name in each)
        return {name: fmean(each[name] for each in everyones if name in each) for name in names}

    def decide(self, function, *arguments):
        """What rank 0 finds by function(*arguments), on every rank. Where it finds a user's mistake, rank 0
        raises that UserError, and the others leave with its exit status and without a word."""
        found = None
        mistake = None
        if self.main:
            try:
                found = function(*arguments)
            except UserError as error:
                mistake = error
        theirs, stop = self.gather((found, mistake is not None))[0]
        if stop and self.main:
            raise mistake
        if stop:
            sys.exit(2)
        return found if self.main else theirs

    def close(self):
        """All processes leave together: one that left first could break the others' last exchange."""
        if dist.is_initialized():
            self.gather(None)
            dist.destroy_process_group()


# -------------------------------------------------------------------------------------- sharding and loading
def blocks_of(transformer):
    """All transformer blocks of a FLUX, double then single: the units of sharding, recomputation,
    compiling."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def shard(transformer, world, offload=False, replicated=(), hold=None):
    """FSDP2: every block its own unit, the rest one more. Compute in world.dtype, reduce gradients in
    float32.

    With `offload` the shards lie in the host's memory, their gradients too, and each unit is copied to the
    GPU when its turn comes. The parameters in `replicated` are left out: every process keeps them whole, in
    the dtype that they have. `hold` says whether `gathered` keeps the copies over a rollout; None: with more
    than one process.

    cast_forward_inputs is off, since it would cast timesteps, ids and RoPE tables too: `Flux.velocity` casts
    its own.
    """
    policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    if offload:
        # Copies between a GPU and pinned memory are fast and need not be waited for.
        where = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    else:
        where = OffloadPolicy()
    for unit in [*blocks_of(transformer), transformer]:
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, offload_policy=where,
                    ignored_params=set(replicated))
    transformer.hold_in_rollouts = world.size > 1 if hold is None else hold


def load_sharded(kind, source, device, dtype, world=None, layout=None):
    """A diffusers model of class `kind` from its `Source`; with a world that has a mesh: sharded over it, in float32,
    or as a `layouts.Layout` says.

    Built on meta, and each rank reads only its own rows of each tensor, so no process ever holds a full copy.
    Raises UserError if names or shapes differ from the config's.
    """
    sharded = world is not None and world.mesh is not None
    network = source.on_meta(kind)
    if layout is not None:
        device = layout.prepare(network, world)
    else:
        network.to(torch.float32 if sharded else dtype)
        if sharded:
            shard(network, world)
    network.to_empty(device=device)
    for name, parameter in own_parameters(network).items():
        fill(parameter, source.tensors[name])
    if layout is not None:
        layout.start(network)
    return network


def clock(device):
    """Seconds, when all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def gathered(transformer):
    """Inside, the parameters are gathered once and stay: 58 all-gathers for a rollout of FLUX.1-dev instead
    of 1,425. With one process there is nothing to gather, and unsharding would only copy; unless the
    parameters lie on the host, and there is room on the GPU for a copy of all.

    At the end every unit is resharded. One that is not would go on with its copy after the next step of the
    optimizer, which sees the shards alone; and `transformer.parameters()` would give the copies."""
    if not isinstance(transformer, FSDPModule):
        yield
        return
    if transformer.hold_in_rollouts:
        transformer.set_reshard_after_forward(False)
    try:
        yield
    finally:
        reshard(transformer)
        transformer.set_reshard_after_forward(True)


def reshard(transformer):
    """Free the gathered copies of all parameters, if there are any."""
    for module in transformer.modules():  # a module's own reshard() is not recursive
        if isinstance(module, FSDPModule):
            module.reshard()
