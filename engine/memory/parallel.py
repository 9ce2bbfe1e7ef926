"""Many GPUs, with torch's torchrun, FSDP2 and HSDP.

One process on a CPU runs the same code without a mesh. FSDP2's gradient reduction takes the mean over the ranks, so
the rest of train.py is written as if there were one process.
"""

import os
import socket
import sys
import time
from contextlib import contextmanager
from copy import copy
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

from engine.errors import UserError, one_line, printable
from engine.model.float8 import scales_of
from engine.model.tensors import fill, own_parameters

LOOK_UP = 10  # seconds in which the name in MASTER_ADDR must be found; a machine that starts needs some
OLDEST = (8, 0)  # the compute capability of Ampere, the first with bf16 in hardware


def device_and_dtype(local_rank=0):
    """(device, dtype to compute in): bf16 on a GPU, float32 on a CPU. Raises UserError for a GPU without bf16, which
    torch would emulate, many times slower."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # FSDP2 allocates on several streams, whose memory is kept apart. Segments that grow lose less by it.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", local_rank)
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        raise UserError(f"{torch.cuda.get_device_name(device)}: compute capability {found[0]}.{found[1]}, and bf16 "
                        f"needs {OLDEST[0]}.{OLDEST[1]} (Ampere, 2020); take a newer GPU, or CUDA_VISIBLE_DEVICES= for "
                        "the CPU")
    return device, torch.bfloat16


def choose_threads(neighbours=1):
    """Choose how many threads compute on the host.

    Without a GPU, one: on the miniature a second one saves a sixth of the time, but on a busy machine it takes ten
    times as long. With a GPU, the cores are divided among the processes of this machine, since --memory offload has its
    optimizer there; torchrun would leave one core to each. OMP_NUM_THREADS of 2 or more is left as it is.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # OpenMP takes a list, such as 4,2
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    elif not (asked.isdecimal() and int(asked) > 1):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))


def must_be_found(name):
    """Raise UserError if a machine's name cannot be looked up within LOOK_UP seconds; torch would try for as long as it
    waits for the others."""
    end = time.monotonic() + LOOK_UP
    while True:
        try:
            return socket.getaddrinfo(name, None)
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= end:
                raise UserError(f"MASTER_ADDR={name} in the environment: no machine of that name is found here; give "
                                "the first machine's name or address") from error
        time.sleep(1)


def meet_the_others(backend, patience):
    """torch's init_process_group, in another thread: its C++ code waits for all processes, and handles no signal. So a
    process can be stopped while it waits for another one that has already stopped. patience: a timedelta."""
    errors = []

    def meet():
        try:
            must_be_found(os.environ["MASTER_ADDR"])
            dist.init_process_group(backend, timeout=patience)
        except dist.DistNetworkError as error:
            address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
            errors.append(UserError(f"{address}: the processes cannot meet there: {one_line(error)}"))
        except Exception as error:
            errors.append(error)

    thread = Thread(target=meet, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


class World:
    """This process among all of them: its rank, the number of processes (size), its device, the mesh to shard over
    (None: one process on a CPU), and the dtype to compute in: bf16 on a GPU, float32 on a CPU."""

    def __init__(self, replicas=1, patience=timedelta(minutes=30), mesh=False):
        """Join the processes that torchrun started, if it did, and take this one's GPU, or one CPU thread.

        replicas: HSDP's number of groups; the parameters are sharded inside each group of size / replicas processes (a
        node), and replicated between the groups. patience: how long a process waits for the others. mesh: make a mesh
        even for one process on a CPU, as `modes.needs_mesh` asks. Raises UserError if replicas does not divide the
        size, or there are fewer GPUs than processes.
        """
        gpu = torch.cuda.is_available()
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.local = local = int(os.environ.get("LOCAL_RANK", 0))
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
        if gpu and self.neighbours > torch.cuda.device_count():
            raise UserError(f"--nproc_per_node {self.neighbours}: there are {torch.cuda.device_count()} GPUs")
        if self.size % replicas:
            raise UserError(f"--replicas {replicas}: does not divide the {self.size} processes")
        self.device, self.dtype = device_and_dtype(local)
        self.mesh = None
        choose_threads(self.neighbours)
        if gpu:
            torch.cuda.set_device(self.device)
        # Gradient clipping and the exchange of Python objects use gloo on the CPU; everything else uses NCCL.
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        if "RANK" in os.environ:
            meet_the_others(backend, patience)
        elif gpu or mesh:  # one process without torchrun: FSDP2 needs a process group even so
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if dist.is_initialized():
            if replicas > 1:
                shape, names = (replicas, self.size // replicas), ("replicate", "shard")
            else:
                shape, names = (self.size,), ("shard",)
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def beside(self, name):
        """The device of a --reward-device, or None for None. cuda:N is for the first process of a machine; the others
        take the GPUs after it. Raises UserError if there is no such GPU, or it is a process's own."""
        if name is None or name == "cpu":
            return name and torch.device(name)
        number = int(name.removeprefix("cuda:"))
        there = torch.cuda.device_count()
        if number < self.neighbours:
            raise UserError(f"--reward-device {name}: is the GPU of a process; the first free one is "
                            f"cuda:{self.neighbours}, or leave the flag out")
        if number + self.neighbours > there:
            raise UserError(f"--reward-device {name}: {self.neighbours} processes need GPUs {number} to "
                            f"{number + self.neighbours - 1} for their rewards, and there are {there} GPUs")
        return torch.device("cuda", number + self.local)

    @property
    def main(self):
        return self.rank == 0

    def say(self, text):
        """Print a line, once for all processes, without breaking a progress bar."""
        if self.main:
            tqdm.write(printable(text))

    def rows(self, n):
        """The rows of this rank, a slice, if each rank has n rows, in rank order."""
        return slice(self.rank * n, (self.rank + 1) * n)

    def gather(self, value):
        """The picklable `value` of every rank, a list in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def mean(self, numbers):
        """{name: mean} of a list of {name: number}, over the lists of all ranks; of a name, over those that have it."""
        everyones = [each for theirs in self.gather(numbers) for each in theirs]
        names = dict.fromkeys(name for each in everyones for name in each)
        return {name: fmean(each[name] for each in everyones if name in each) for name in names}

    def decide(self, function, *arguments):
        """Call function(*arguments) on rank 0, and return its result on every rank. If it raises UserError, rank 0
        raises that, and the other ranks exit with status 2 and no message."""
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

    def from_the_first_here(self, function):
        """Call function() in the first process of this machine. It returns a value for each process of the machine, in
        rank order; return this one's. If it raises, the other processes exit with status 2 and no message."""
        if self.local:
            received = [None]
            dist.recv_object_list(received, self.rank - self.local, device="cpu")
            if received[0] is None:
                sys.exit(2)
            return received[0]
        values = [None] * self.neighbours
        try:
            values = function()
        finally:
            for number, value in enumerate(values[1:], 1):
                dist.send_object_list([value], self.rank + number, device="cpu")
        return values[0]

    def alone(self):
        """This process as a `World` of its own, with a mesh of itself; collective."""
        own = copy(self)
        own.size, own.rank = 1, 0
        own.mesh = init_device_mesh(self.device.type, (self.size, 1), mesh_dim_names=("processes", "own"))["own"]
        return own

    def close(self):
        """End the process group, after waiting for all processes: one that ended early could break another's last
        exchange."""
        if dist.is_initialized():
            self.gather(None)
            dist.destroy_process_group()


# -------------------------------------------------------------------------------------- sharding and loading
def blocks_of(transformer):
    """All transformer blocks of a FLUX, first the double ones, then the single ones. Each is one unit of sharding, of
    activation checkpointing and of torch.compile."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def shard(transformer, world, offload=False, replicated=(), hold=True):
    """Shard a transformer by FSDP2: every block is a unit, and the rest is one more. It computes in world.dtype, and
    reduces gradients in float32.

    offload: shards and their gradients are in the host's memory, and a unit is copied to the GPU before it computes.
    replicated: parameters that are not sharded; every process keeps them, in their own dtype. hold: whether `gathered`
    keeps the gathered copies for a whole rollout.

    cast_forward_inputs is off, since it would also cast timesteps, ids and RoPE tables: a family's `predict` casts its
    inputs itself.
    """
    policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    if offload:
        # Copies between a GPU and pinned memory are fast, and asynchronous.
        where = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    else:
        where = OffloadPolicy()
    for unit in [*blocks_of(transformer), transformer]:
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, offload_policy=where,
                    ignored_params=set(replicated))
    transformer.hold_in_rollouts = hold


def load_sharded(kind, source, device, dtype, world=None, layout=None):
    """A diffusers model of class `kind`, loaded from its `Source`. If the world has a mesh, the model is sharded over
    it, in float32. A `layouts.Layout`, if given, decides dtype, device and sharding.

    The model is built on the meta device. Each rank reads only its own rows of each tensor, so no process holds a full
    copy. Raises UserError if names or shapes differ from the config's.
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
    scales = scales_of(network)
    for name, parameter in own_parameters(network).items():
        fill(parameter, source.tensors[name], scales.get(name))
    if layout is not None:
        layout.start(network)
    return network


def mark(device):
    """A moment between two pieces of work that are queued on a device. The process does not wait for them."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first, last):
    """Seconds between two moments of `mark`. Waits until the device has reached the later one."""
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000


def moved(tensor, device):
    """A tensor of the CPU on a device. The process does not wait for a GPU: the copy is made from pinned memory."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


@contextmanager
def gathered(transformer):
    """Inside this context, parameters that have been gathered stay gathered, if `shard` was told to hold them. A
    rollout of FLUX.1-dev then needs 58 all-gathers instead of 1,425. One process gathers nothing, but it casts float32
    masters, or copies them from the host: each then once, and not at every step.

    At the end every unit is resharded. Otherwise a unit would keep its copy after the optimizer's next step, which
    changes only the shards; and `transformer.parameters()` would return the copies."""
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
    """Free the gathered copies of all parameters, if any."""
    for module in transformer.modules():  # a module's own reshard() is not recursive
        if isinstance(module, FSDPModule):
            module.reshard()
