"""A --memory (engine/memory/modes.py) put into practice: what is trained, each parameter's dtype, where it lies."""

from typing import NamedTuple

import torch

from engine.memory import parallel
from engine.memory.modes import HELD_ON_THE_GPU, ON_THE_HOST, needs_mesh, stored_in_fp8
from engine.model import lora


class Layout(NamedTuple):
    """What is trained and how it fits, for `parallel.load_sharded`. `name` is a --memory other than auto."""
    lora: int | None
    name: str
    seed: int

    def prepare(self, transformer, world):
        """Between building on the meta device and loading: adds the adapters, gives every parameter its
        dtype, and shards. Returns the device on which the parameters are to lie."""
        if self.lora:
            lora.add_adapters(transformer, self.lora)
        for name, parameter in transformer.named_parameters():
            parameter.data = parameter.data.to(self.dtype_of(name, parameter, world))
        if world.mesh is not None:
            # A frozen base in bf16 is small enough to be whole everywhere. Then nothing of it is gathered,
            # and the processes exchange the adapters' gradients alone.
            replicated = [p for p in transformer.parameters() if self.name == "bf16" and not p.requires_grad]
            parallel.shard(transformer, world, self.name in ON_THE_HOST, replicated, self.hold())
        elif needs_mesh(self.name):
            raise RuntimeError(f"--memory {self.name} needs parallel.World(mesh=True)")
        return torch.device("cpu") if self.name in ON_THE_HOST else world.device

    def dtype_of(self, name, parameter, world):
        """The dtype in which a parameter is stored. FSDP2 casts to world.dtype what computes."""
        if parameter.requires_grad:
            if self.name == "split":
                return torch.bfloat16
            return torch.float32
        if self.name.startswith("fp8") and stored_in_fp8(name, parameter):
            return torch.float8_e4m3fn
        return world.dtype

    def hold(self):
        """For `parallel.shard`: whether the copies that compute are kept over a rollout."""
        if self.name == "offload":
            return True   # even with one process, since a copy comes over the bus
        if self.name not in HELD_ON_THE_GPU:
            return False  # there is no room for a copy in bf16
        return None

    def start(self, transformer):
        """After loading: the values of the adapters."""
        if self.lora:
            lora.start(transformer, self.seed)


def trainable(transformer):
    """The parameters that the optimizer gets: all, or the adapters'."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]
