"""The optimizer: torch's AdamW; or `SplitAdamW`, the same on bf16 weights, whose state holds the other 16 bits of
float32 masters."""

import torch
from torch.optim.adamw import adamw

from engine.memory.layouts import ON_THE_HOST
from engine.model.tensors import local_part


# -------------------------------------------------------------------------------------------------- optimizer
def split(master):
    """float32 -> (the nearest bf16, the rest as int16). The rest is the difference of the float32's bits and the bf16's
    bits, both read as int32; `join` adds it. Of two equally near bf16 numbers the one farther from 0 is taken."""
    bits = master.view(torch.int32)
    # Setting the last bit changes the rounding only where two bf16 numbers are equally near.
    high = (bits | 1).view(torch.float32).to(torch.bfloat16)
    return high, (bits - (high.view(torch.int16).to(torch.int32) << 16)).to(torch.int16)


def join(high, low):
    """The float32 that `split` was given, if it is finite; otherwise a float32 that is not finite."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


SMALL = 2**20  # numbers of a parameter: below this it is updated together with others


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on bf16 parameters, as exact as on float32 ones except for its bf16 moments. It takes 10 bytes a parameter
    instead of 16, gradient included.

    A bf16 weight of 0.02 is rounded to multiples of 1.2e-4, and an update changes it by 5e-6, so most updates would be
    lost. Therefore the parameter is the upper half of a float32 master, and the state keeps the lower half.
    """

    def __init__(self, parameters, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 moments=torch.bfloat16):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. `closure` is there for torch's interface, and is not called."""
        for group in self.param_groups:
            small = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                tensors = self.tensors_of(parameter)
                if tensors[0].numel() < SMALL:
                    small.append(tensors)
                else:
                    update(*tensors, group)
            if small:
                update_at_once(small, group)

    def tensors_of(self, parameter):
        """[weight, gradient, lower half, moments m and v, step] of a parameter, this process's parts. Makes the
        state."""
        state = self.state[parameter]
        if not state:
            # Loading a checkpoint casts state to the parameter's dtype, so these 16 bits are stored as a bf16 tensor.
            state["low"] = torch.zeros_like(parameter)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments)
            state["step"] = torch.zeros((), device=parameter.device)
        names = ("low", "exp_avg", "exp_avg_sq", "step")
        return [local_part(tensor) for tensor in (parameter, parameter.grad, *map(state.get, names))]


def update(weight, gradient, low, m, v, step, group):
    """Update one tensor with torch's own AdamW, on float32 copies that are freed on return."""
    master = join(weight, low.view(torch.int16))
    m_32, v_32 = m.float(), v.float()
    adamw([master], [gradient.float()], [m_32], [v_32], [], [step], foreach=False, fused=weight.is_cuda, amsgrad=False,
          beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
          weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
    high, rest = split(master)
    weight.copy_(high)
    low.copy_(rest.view(torch.bfloat16))
    m.copy_(m_32)
    v.copy_(v_32)


def update_at_once(small, group):
    """Update small parameters as one tensor, since each would take as many launches as a large one. small: for each its
    tensors, as `SplitAdamW.tensors_of` returns them; all have made the same number of steps."""
    weights, gradients, lows, ms, vs, steps = zip(*small, strict=True)
    joined = [torch.cat([tensor.flatten() for tensor in each]) for each in (weights, gradients, lows, ms, vs)]
    update(*joined, steps[0], group)
    if len(steps) > 1:
        torch._foreach_add_(list(steps[1:]), 1)
    sizes = [weight.numel() for weight in weights]
    for each, flat in zip((weights, lows, ms, vs), (joined[0], *joined[2:]), strict=True):
        parts = [part.view_as(tensor) for part, tensor in zip(flat.split(sizes), each, strict=True)]
        torch._foreach_copy_(list(each), parts)


def optimizer_of(parameters, lr, weight_decay, name, device):
    """The optimizer for a --memory (`name`): AdamW with betas 0.9 and 0.999."""
    if name == "split":
        return SplitAdamW(parameters, lr, weight_decay=weight_decay)
    # Unfused AdamW would make the step the peak of a GPU's memory, and is several times slower on the host.
    fused = device.type == "cuda" or name in ON_THE_HOST
    return torch.optim.AdamW(parameters, lr, (0.9, 0.999), weight_decay=weight_decay, fused=fused)
