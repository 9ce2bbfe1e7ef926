"""Many GPUs by torch's own means: torchrun, FSDP2 and HSDP, torch.distributed.checkpoint.

One process on a CPU takes the same path with no mesh. The mean over ranks is taken by FSDP's gradient
reduction, so everything else in train.py is written as if there were one process.
"""

import json
import os
import shutil
import time
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

# one process needs no process group
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
ONE_FILE = "diffusion_pytorch_model.safetensors"


def device_and_dtype(local_rank=0):
    """(device, dtype to compute in): bf16 on a GPU, float32 on a CPU, there on one thread: a second one gains
    a sixth on the miniature, and costs tenfold on a busy machine."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank), torch.bfloat16
    torch.set_num_threads(1)
    return torch.device("cpu"), torch.float32


class World:
    """This process among all: rank, size, device, the mesh to shard over (None: one process on a CPU), and
    the dtype to compute in: bf16 on a GPU, float32 on a CPU. Masters and optimizer are float32."""

    def __init__(self, replicas=1, patience=timedelta(minutes=30)):
        """Join the processes that torchrun started, if it did. `replicas` is HSDP's: the parameters are
        sharded over size / replicas neighbours (a node) and replicated between them; ValueError if it does
        not divide the size. `patience` is how long a process waits for the others."""
        gpu = torch.cuda.is_available()
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if gpu and here > torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node {here}: this machine has {torch.cuda.device_count()} GPUs")
        (self.device, self.dtype), self.mesh = device_and_dtype(local), None
        if self.size % replicas:
            raise ValueError(f"--replicas {replicas}: does not divide the {self.size} processes")
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=patience)
        elif gpu:
            dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        if gpu:
            torch.cuda.set_device(self.device)
        if dist.is_initialized():
            shape = (replicas, self.size // replicas) if replicas > 1 else (self.size,)
            names = ("replicate", "shard") if replicas > 1 else ("shard",)
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    @property
    def main(self):
        return self.rank == 0

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

    def close(self):
        """All processes leave together: one that left first could break the others' last exchange."""
        if dist.is_initialized():
            self.gather(None)
            dist.destroy_process_group()


def is_anothers_end(error):
    """Whether an error of a collective only says that another process is gone: that one's own error is the
    one to show."""
    return dist.is_initialized() and any(words in str(error) for words in (
        "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited"))


def shard(transformer, world):
    """FSDP2: every block its own unit, the rest one more. Compute in world.dtype, reduce gradients in
    float32.

    cast_forward_inputs is off, since it would cast timesteps, ids and RoPE tables too: flux.velocity casts
    its own.
    """
    policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(transformer, mesh=world.mesh, mp_policy=policy)


def my_rows(parameter):
    """(first, last) of the rows of a full tensor that this rank holds; all of them if it is not sharded."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            n, parts = parameter.shape[0], parameter.device_mesh.size(axis)
            chunk = -(-n // parts)  # as torch.chunk: full chunks first, the last ones short or empty
            first = min(parameter.device_mesh.get_local_rank(axis) * chunk, n)
            return first, min(first + chunk, n)
    return 0, parameter.shape[0]


def weight_files(folder):
    """{parameter name: file} of a diffusers transformer folder, sharded or one file."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        return {k: folder / f for k, f in json.loads((folder / INDEX).read_text())["weight_map"].items()}
    with safe_open(folder / ONE_FILE, "pt") as f:
        return {k: folder / ONE_FILE for k in f.keys()}


def load_transformer(folder, device, dtype, world=None):
    """FluxTransformer2DModel from a diffusers folder; with a world that has a mesh: sharded over it, in
    float32.

    Built on meta, and each rank reads only its own rows of each tensor, so no process ever holds a full copy.
    Raises ValueError if names or shapes differ from the config's.
    """
    sharded = world is not None and world.mesh is not None
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
    transformer.to(torch.float32 if sharded else dtype)
    if sharded:
        shard(transformer, world)
    transformer.to_empty(device=device)
    files, parameters = weight_files(folder), dict(transformer.named_parameters())
    if files.keys() != parameters.keys():
        odd = sorted(files.keys() ^ parameters.keys())
        raise ValueError(f"{folder}: {len(odd)} tensors are missing or not FLUX's, such as {odd[0]}")
    opened = {}
    for name, parameter in parameters.items():
        if files[name] not in opened:
            opened[files[name]] = safe_open(files[name], "pt")
        rows = opened[files[name]].get_slice(name)
        if tuple(rows.get_shape()) != tuple(parameter.shape):
            raise ValueError(f"{folder}: {name} is {rows.get_shape()}, the config says "
                             f"{list(parameter.shape)}")
        first, last = my_rows(parameter)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        with torch.no_grad():
            local.copy_(rows[first:last])
    return transformer


def clock(device):
    """Seconds, when all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def whole(tensor):
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
    for module in blocks:
        module.reshard()
    transformer.set_reshard_after_forward(True)


# --------------------------------------------------------------------------------- checkpoints and the result
def checkpoints(out):
    """The finished checkpoints of a run, oldest first."""
    return sorted((Path(out) / "checkpoints").glob("step_*"))


def save(out, transformer, optimizer, state, world, keep):
    """Write out/checkpoints/step_NNNNN: weights and optimizer, sharded (every rank its own part), and `state`
    (with its "step") as JSON.

    Atomic: it is written beside, under another name, and renamed when complete, so a kill at any moment
    leaves the checkpoint before. The last `keep` stay.
    """
    folder = Path(out) / "checkpoints" / f"step_{state['step']:05d}"
    beside = folder.with_name(".writing")
    if world.main:
        shutil.rmtree(beside, ignore_errors=True)
    world.gather(None)
    weights, moments = get_state_dict(transformer, optimizer)
    try:
        dcp.save({"transformer": weights, "optimizer": moments}, checkpoint_id=beside)
        if world.main:
            (beside / "state.json").write_text(json.dumps(state))
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
            for old in checkpoints(out)[:-keep]:
                shutil.rmtree(old)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(beside, ignore_errors=True)
        why = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
        stays = [c.name for c in checkpoints(out)]
        raise OSError(f"{folder}: cannot be written: {why}; "
                      + (f"{stays[-1]} stays" if stays else "there is none before"))
    world.gather(None)


def load(folder, transformer, optimizer):
    """Restore what `save` wrote, on any number of processes; returns the JSON state."""
    weights, moments = get_state_dict(transformer, optimizer)
    dcp.load({"transformer": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(transformer, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return json.loads((Path(folder) / "state.json").read_text())


def export(transformer, folder, world, dtype=None):
    """Write config.json and one diffusion_pytorch_model.safetensors in diffusers layout, which FluxPipeline
    and ComfyUI load; dtype None keeps float32.

    The file is streamed tensor by tensor (header first, then the bytes in its order), so no process ever
    holds a full copy, and renamed when complete.
    """
    folder, dtype = Path(folder), dtype or torch.float32
    code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, parameter in transformer.named_parameters():
        size = parameter.numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    beside = folder / "writing.tmp"
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        transformer.save_config(folder)
    with open(beside, "wb") if world.main else nullcontext() as file:
        if world.main:
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            file.write(len(text).to_bytes(8, "little") + text)
        for parameter in transformer.parameters():
            full = whole(parameter.detach())  # a collective: every rank takes part
            if world.main:
                file.write(full.to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes())
    if world.main:
        beside.replace(folder / ONE_FILE)
        (folder / INDEX).unlink(missing_ok=True)
