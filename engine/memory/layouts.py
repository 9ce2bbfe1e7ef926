"""Applies a --memory (engine/memory/modes.py) to a transformer: which parameters are trained, their dtypes, and
whether they are on the GPU or the host."""

from typing import NamedTuple

import torch

from engine.memory import parallel
from engine.memory.modes import HELD_ON_THE_GPU, ON_THE_HOST, needs_mesh, stored_in_fp8
from engine.model import lora


class Layout(NamedTuple):
    """What is trained and how it is stored, for `parallel.load_sharded`. lora: the adapters' rank, or None; name: a
    --memory other than auto; seed: of the adapters."""
    lora: int | None
    name: str
    seed: int

    def prepare(self, transformer, world):
        """Add the adapters, give every parameter its dtype, and shard. The transformer is on the meta device, and not
        loaded yet. Returns the device for the parameters."""
        if self.lora:
            lora.add_adapters(transformer, self.lora)
        for name, parameter in transformer.named_parameters():
            parameter.data = parameter.data.to(self.dtype_of(name, parameter, world))
        if world.mesh is not None:
            # A frozen base in bf16 is small enough to be replicated on every GPU. Then it needs no all-gather, and the
            # processes exchange only the adapters and their gradients.
            replicated = [p for p in transformer.parameters() if self.name == "bf16" and not p.requires_grad]
            parallel.shard(transformer, world, self.name in ON_THE_HOST, replicated, self.hold())
        elif needs_mesh(self.name):
            raise RuntimeError(f"--memory {self.name} needs parallel.World(mesh=True)")
        return torch.device("cpu") if self.name in ON_THE_HOST else world.device

    def dtype_of(self, name, parameter, world):
        """The dtype in which a parameter is stored. FSDP2 computes with a copy in world.dtype."""
        if parameter.requires_grad:
            if self.name == "split":
                return torch.bfloat16
            return torch.float32
        if self.name.startswith("fp8") and stored_in_fp8(name, parameter):
            return torch.float8_e4m3fn
        return world.dtype

    def hold(self):
        """Whether `parallel.gathered` keeps the gathered copies for a whole rollout; None: `parallel.shard` decides."""
        if self.name == "offload":
            return True   # even for one process: each copy would come over the bus again
        if self.name not in HELD_ON_THE_GPU:
            return False  # a bf16 copy of everything would not fit
        return None

    def start(self, transformer):
        """Give the adapters their first values, after loading."""
        if self.lora:
            lora.start(transformer, self.seed)


def trainable(transformer):
    """The parameters that are trained: all, or the adapters'."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]
