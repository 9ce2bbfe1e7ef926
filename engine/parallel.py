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
from threading import Thread

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from tqdm import tqdm

from engine.configs import check_config, check_folder
from engine.errors import UserError, printable
from engine.single_file import tensors_of

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
        index = check_config(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(is_file_name(file) for file in index.values()):
            raise UserError(f"{folder / INDEX}: has no weight_map of tensors and the files beside it")
        return {name: folder / file for name, file in index.items()}
    with safe_open(folder / ONE_FILE, "pt") as file:
        return {name: folder / ONE_FILE for name in file.keys()}


def is_file_name(name):
    """Whether a value is the name of a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def own_parameters(network):
    """{name: parameter} as a network has them without adapters. To a layer that has one, peft gives another
    name, base_layer, and its adapter's matrices are lora_A and lora_B beside it."""
    found = {}
    for name, parameter in network.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            found[name.replace(".base_layer.", ".")] = parameter
    return found


def on_meta(kind, folder, file=None):
    """(a diffusers model of class `kind`, without memory; {name: slice of a file} of its tensors, which are
    the folder's or, if one is given, a single file's). Raises UserError if a tensor is missing, or not its
    own."""
    check_folder(folder)
    with torch.device("meta"):
        network = kind.from_config(kind.load_config(folder))
    tensors = tensors_in(folder) if file is None else tensors_of(file)
    must_be_whole(network, tensors, file or folder)
    return network, tensors


def load_sharded(kind, folder, device, dtype, world=None, layout=None, file=None):
    """A diffusers model of class `kind` from its folder, or of the folder's config with the tensors of a
    single file; with a world that has a mesh: sharded over it, in float32, or as a `memory.Layout` says.

    Built on meta, and each rank reads only its own rows of each tensor, so no process ever holds a full copy.
    Raises UserError if names or shapes differ from the config's.
    """
    sharded = world is not None and world.mesh is not None
    network, tensors = on_meta(kind, folder, file)
    if layout is not None:
        device = layout.prepare(network, world)
    else:
        network.to(torch.float32 if sharded else dtype)
        if sharded:
            shard(network, world)
    network.to_empty(device=device)
    for name, parameter in own_parameters(network).items():
        fill(parameter, tensors[name])
    if layout is not None:
        layout.start(network)
    return network


@torch.no_grad()
def fill(parameter, tensor):
    """Copy this rank's rows of a full tensor, or of a slice of a file, into a parameter."""
    first, last = my_rows(parameter)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(tensor[first:last].to(local.dtype))


def tensors_in(folder):
    """{name: slice of a file} of the tensors of a diffusers transformer folder."""
    files = weight_files(folder)
    opened = {file: safe_open(file, "pt") for file in set(files.values())}
    return {name: opened[file].get_slice(name) for name, file in files.items()}


def must_be_whole(network, tensors, where):
    """Raise UserError unless every tensor of a network is there, of its shape, and no other: known before the
    network takes any memory."""
    shapes = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
    if tensors.keys() != shapes.keys():
        odd = sorted(tensors.keys() ^ shapes.keys())
        raise UserError(f"{where}: {len(odd)} tensors are missing or not {type(network).__name__}'s, "
                        f"such as {odd[0]}")
    for name, shape in shapes.items():
        if list(tensors[name].get_shape()) != shape:
            raise UserError(f"{where}: {name} is {tensors[name].get_shape()}, the config says {shape}")
        if tensors[name].get_dtype()[0] not in "FB":
            raise UserError(f"{where}: {name} holds {tensors[name].get_dtype()}, which are no weights")


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
