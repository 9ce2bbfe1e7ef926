"""Applies a --memory (engine/memory/modes.py) to a transformer: which parameters are trained, their dtypes, and
whether they are on the GPU or the host."""

from typing import NamedTuple

import torch

from engine.memory import parallel
from engine.memory.downloads import Downloads
from engine.memory.modes import HELD_ON_THE_GPU, ON_THE_HOST, needs_mesh
from engine.model import float8, lora


class Layout(NamedTuple):
    """What is trained and how it is stored, for `parallel.load_sharded`. lora: the adapters' rank, or None; name: a
    --memory other than auto; seed: of the adapters."""
    lora: int | None
    name: str
    seed: int
    trains: bool = True  # False: the weights are frozen, for a transformer that only samples

    def prepare(self, transformer, world):
        """Add the adapters, give every parameter its dtype, and shard. The transformer is on the meta device, and not
        loaded yet. Returns the device for the parameters."""
        if not self.trains:
            transformer.requires_grad_(False)
        if self.lora:
            lora.add_adapters(transformer, self.lora)
        if self.name.startswith("fp8"):
            float8.store(transformer)
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(self.dtype_of(parameter, world))
        if world.mesh is not None and not self.needs_no_copies(transformer, world):
            # A frozen base in bf16 is small enough to be replicated on every GPU. Then it needs no all-gather, and the
            # processes exchange only the adapters and their gradients. One process has all of a base in float8, and
            # FSDP2 would copy each block once more.
            whole = self.name == "bf16" or self.name == "fp8" and world.size == 1
            replicated = [p for p in transformer.parameters() if whole and not p.requires_grad]
            hold = self.name in HELD_ON_THE_GPU
            parallel.shard(transformer, world, self.name in ON_THE_HOST, replicated, hold)
        elif world.mesh is None and needs_mesh(self.name):
            raise RuntimeError(f"--memory {self.name} needs parallel.World(mesh=True)")
        return torch.device("cpu") if self.name in ON_THE_HOST else world.device

    def needs_no_copies(self, transformer, world):
        """Whether the process computes with the parameters as it stores them: it has all of them on its device, in the
        dtype that computes. FSDP2 would copy every block before each use all the same, so it is left out."""
        dtypes = {parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point()}
        return world.size == 1 and self.name not in ON_THE_HOST and dtypes == {world.dtype}

    def dtype_of(self, parameter, world):
        """The dtype in which a parameter is stored. FSDP2 computes with a copy in world.dtype; the bytes of float8 stay
        as they are."""
        if not parameter.is_floating_point():
            return parameter.dtype
        if parameter.requires_grad:
            return torch.bfloat16 if self.name == "split" else torch.float32
        return world.dtype

    def start(self, transformer):
        """After loading: give the adapters their first values, and let `Downloads` take what comes to the host."""
        if self.lora:
            lora.start(transformer, self.seed)
        if self.name in ON_THE_HOST:
            transformer.downloads = Downloads(trainable(transformer))


def finish_gradients(transformer):
    """Before a gradient is read: every parameter has the sum of what was copied to the host, if it was."""
    downloads = getattr(transformer, "downloads", None)
    if downloads is not None:
        downloads.finish()


def trainable(transformer):
    """The parameters that are trained: all, or the adapters'."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]
