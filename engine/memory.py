"""How a transformer's parameters lie in memory, and which of them are trained: so one card of 12 to 141 GB
trains FLUX.1-dev, or many do.

`--lora R` says what is trained. Without it all weights are (a full fine-tune); with it the weights stay
frozen, and thin matrices beside them learn (engine/lora.py).

`--memory NAME` says how it fits. What is trained differs in no other way:

    full   masters      float32 weights, gradients and Adam moments, divided among the GPUs by FSDP2
           split        bf16 weights, gradients and moments; the optimizer keeps the 16 bits that a float32
                        weight has beyond its bf16 one, so that small updates are not lost
           offload      as masters, but in the host's memory; a bf16 copy stays on the GPU over a rollout
           stream       as offload, but every block is copied to the GPU whenever its turn comes
    LoRA   bf16         frozen weights in bf16, whole on every GPU
           fp8          the large ones in float8, divided among the GPUs; a block is cast when its turn comes
           fp8-offload  as fp8, but in the host's memory

The adapters themselves are float32 masters. On a CPU all compute in float32.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from engine import lora, parallel
from engine.errors import UserError

# In the order in which they are preferred where several fit: those behind are slower.
FULL = ("masters", "split", "offload", "stream")
LORA = ("bf16", "fp8", "fp8-offload")
NAMES = ("auto", *FULL, *LORA)
ON_THE_HOST = ("offload", "stream", "fp8-offload")
HELD_ON_THE_GPU = ("masters", "split", "offload", "bf16")  # all that computes, over a rollout


# ------------------------------------------------------------------------------------------------- the layout
def choices(rank):
    """The names of --memory for a LoRA of a rank, or for a full fine-tune (None or 0)."""
    return LORA if rank else FULL


def check(rank, name):
    """Raise UserError for a --memory that is not for what is trained."""
    if name == "auto" or name in choices(rank):
        return
    what = "--lora R" if name in LORA else "a full fine-tune, without --lora"
    raise UserError(f"--memory {name}: is for {what}; here it may be {', '.join(('auto', *choices(rank)))}")


def on_a_cpu(rank):
    """The --memory that computes without FSDP2, in one process on a CPU."""
    return "bf16" if rank else "masters"


def needs_mesh(name):
    """Whether one process on a CPU needs FSDP2 for it, as it does on a GPU: to cast parameters when a block's
    turn comes, or to keep them apart from the copies that compute."""
    return name not in ("auto", "masters", "bf16")


def is_lean(name):
    """Whether a --memory is for a card so small that decoding and the rewards must save too: the VAE's
    decoder is recomputed in the backward, and of a reward the image side alone is on the GPU, in bf16."""
    return name not in HELD_ON_THE_GPU


def stored_in_fp8(name, parameter):
    """Whether --memory fp8 stores a frozen parameter in float8: the matrices of the blocks."""
    return parameter.ndim == 2 and "transformer_blocks." in name


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


# -------------------------------------------------------------------------------------------------- optimizer
def split(master):
    """float32 -> (bf16, the rest as int16): the nearest bf16, and what is to be added to its bits, read as
    a float32's, to have the float32 back. Of two that are equally near the one farther from 0."""
    bits = master.view(torch.int32)
    # The last bit decides between two that are equally near; to set it decides nothing else.
    high = (bits | 1).view(torch.float32).to(torch.bfloat16)
    return high, (bits - (high.view(torch.int16).to(torch.int32) << 16)).to(torch.int16)


def join(high, low):
    """The float32 that `split` took apart, if it was finite; else one that is not."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on bf16 parameters as on float32 ones: 10 bytes a parameter instead of 16, with its gradient.

    An update of 5e-6 is far below what a bf16 weight of 0.02 can change by, 6e-5: added to it, most updates
    would be lost. So the state keeps the lower half of a float32 master, and the parameter is its upper half.
    """

    def __init__(self, parameters, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 moments=torch.bfloat16):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure=None):
        """An update of every parameter that has a gradient. A closure is not called: torch's own functions
        hand over None."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, self.state[parameter], group)

    def update(self, parameter, state, group):
        """One parameter's: torch's own AdamW on float32 copies, which live no longer than this call."""
        if not state:
            state["step"] = torch.tensor(0.0)
            # A checkpoint gives state the dtype of its parameter: these bits are kept as if they were bf16.
            state["low"] = torch.zeros_like(parameter)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments)
        names = ("low", "exp_avg", "exp_avg_sq")
        weight, gradient, low, m, v = map(local_part, (parameter, parameter.grad, *map(state.get, names)))
        master = join(weight, low.view(torch.int16))
        m_32, v_32 = m.float(), v.float()
        adamw([master], [gradient.float()], [m_32], [v_32], [], [state["step"]], foreach=False, amsgrad=False,
              beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
              weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
        high, rest = split(master)
        weight.copy_(high)
        low.copy_(rest.view(torch.bfloat16))
        m.copy_(m_32)
        v.copy_(v_32)


def local_part(tensor):
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def optimizer_of(parameters, lr, weight_decay, name, device):
    """AdamW with betas 0.9 and 0.999 for these parameters, as a --memory needs it."""
    if name == "split":
        return SplitAdamW(parameters, lr, weight_decay=weight_decay)
    # The unfused one moves the peak of a GPU's memory into the step, and is several times slower on the host.
    fused = device.type == "cuda" or name in ON_THE_HOST
    return torch.optim.AdamW(parameters, lr, (0.9, 0.999), weight_decay=weight_decay, fused=fused)


# -------------------------------------------------------------------------------------------- the reward path
def parts_used(network, call):
    """The outermost modules of a network that call() runs: its image side, if call() looks at a picture."""
    running = []
    found = []

    def enter(module, arguments):
        if not running:
            found.append(module)
        running.append(module)

    def leave(module, arguments, output):
        running.pop()

    hooks = []
    for module in network.modules():
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return found


def keep_only_what_is_used(network, call, dtype):
    """Of a frozen network leave on its device what call() runs, in dtype; the rest goes to the host. What is
    handed to those parts is cast."""
    device = next(network.parameters()).device
    parts = parts_used(network, call)
    network.to("cpu")
    for part in parts:
        part.to(device, dtype)
        part.register_forward_pre_hook(partial(cast, dtype), with_kwargs=True)


def cast(dtype, module, arguments, named):
    """The arguments of a module, those that are floating-point numbers in dtype."""
    def one(value):
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    return tuple(map(one, arguments)), {name: one(value) for name, value in named.items()}


# ------------------------------------------------------------------------------------------------ the machine
def host_bytes(meminfo="/proc/meminfo", group="/sys/fs/cgroup"):
    """Bytes of the host's memory that can still be taken, by this process or its container; None where Linux
    does not say."""
    free = []
    try:
        for line in Path(meminfo).read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        most = (Path(group) / "memory.max").read_text().strip()
        if most != "max":
            lines = (Path(group) / "memory.stat").read_text().splitlines()
            cached = sum(int(line.split()[1]) for line in lines if line.startswith("file "))
            taken = int((Path(group) / "memory.current").read_text())
            free.append(int(most) - taken + cached)  # files in memory make room for who needs it
    except (OSError, ValueError, IndexError):
        pass
    return min(free, default=None)
