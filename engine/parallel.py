"""Many GPUs by torch's own means: torchrun, FSDP2 and HSDP.

One process on a CPU takes the same path with no mesh. The mean over ranks is taken by FSDP's gradient
reduction, so everything else in train.py is written as if there were one process.
"""

import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from tqdm import tqdm

from engine.errors import UserError, printable
from engine.files import read_json

INDEX = "diffusion_pytorch_model.safetensors.index.json"
ONE_FILE = "diffusion_pytorch_model.safetensors"


def device_and_dtype(local_rank=0):
    """(device, dtype to compute in): bf16 on a GPU, float32 on a CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank), torch.bfloat16
    return torch.device("cpu"), torch.float32


def one_thread_on_a_cpu():
    """A second thread gains a sixth on the miniature, and costs tenfold when the machine is busy."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


class World:
    """This process among all: rank, size, device, the mesh to shard over (None: one process on a CPU), and
    the dtype to compute in: bf16 on a GPU, float32 on a CPU. Masters and optimizer are float32."""

    def __init__(self, replicas=1, patience=timedelta(minutes=30)):
        """Join the processes that torchrun started, if it did, and take this one's GPU, or one CPU thread.

        `replicas` is HSDP's: the parameters are sharded over size / replicas neighbours (a node) and
        replicated between them; UserError if it does not divide the size. `patience` is how long a process
        waits for the others.
        """
        gpu = torch.cuda.is_available()
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if gpu and neighbours > torch.cuda.device_count():
            raise UserError(f"--nproc_per_node {neighbours}: there are {torch.cuda.device_count()} GPUs")
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
            dist.init_process_group(backend, timeout=patience)
        elif gpu:  # one process without torchrun: FSDP2 wants a process group all the same
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


def shard(transformer, world):
    """FSDP2: every block its own unit, the rest one more. Compute in world.dtype, reduce gradients in
    float32.

    cast_forward_inputs is off, since it would cast timesteps, ids and RoPE tables too: `Flux.velocity` casts
    its own.
    """
    policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in blocks_of(transformer):
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(transformer, mesh=world.mesh, mp_policy=policy)


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


def weight_files(folder):
    """{parameter name: file} of a diffusers transformer folder, sharded or one file."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        return {name: folder / file for name, file in read_json(folder / INDEX)["weight_map"].items()}
    with safe_open(folder / ONE_FILE, "pt") as file:
        return {name: folder / ONE_FILE for name in file.keys()}


def load_sharded(kind, folder, device, dtype, world=None):
    """A diffusers model of class `kind` from its folder; with a world that has a mesh: sharded over it, in
    float32.

    Built on meta, and each rank reads only its own rows of each tensor, so no process ever holds a full copy.
    Raises UserError if names or shapes differ from the config's.
    """
    sharded = world is not None and world.mesh is not None
    with torch.device("meta"):
        network = kind.from_config(kind.load_config(folder))
    network.to(torch.float32 if sharded else dtype)
    if sharded:
        shard(network, world)
    network.to_empty(device=device)
    files = weight_files(folder)
    parameters = dict(network.named_parameters())
    if files.keys() != parameters.keys():
        odd = sorted(files.keys() ^ parameters.keys())
        raise UserError(f"{folder}: {len(odd)} tensors are missing or not {kind.__name__}'s, "
                        f"such as {odd[0]}")
    opened = {file: safe_open(file, "pt") for file in set(files.values())}
    for name, parameter in parameters.items():
        tensor = opened[files[name]].get_slice(name)
        if list(tensor.get_shape()) != list(parameter.shape):
            raise UserError(f"{folder}: {name} is {tensor.get_shape()}, the config says "
                            f"{list(parameter.shape)}")
        first, last = my_rows(parameter)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        with torch.no_grad():
            local.copy_(tensor[first:last])
    return network


def clock(device):
    """Seconds, when all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def full(tensor):
    """A tensor that may be sharded, in full on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def gathered(transformer):
    """Inside, the parameters are gathered once and stay: 58 all-gathers for a rollout of FLUX.1-dev instead
    of 1,425. With one process there is nothing to gather, and unsharding would only copy."""
    blocks = [m for m in transformer.modules() if isinstance(m, FSDPModule)]
    if not blocks or dist.get_world_size() == 1:
        yield
        return
    transformer.set_reshard_after_forward(False)
    yield
    for module in blocks:  # reshard() is not recursive
        module.reshard()
    transformer.set_reshard_after_forward(True)
