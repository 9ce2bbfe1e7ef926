"""The optimizer: torch's AdamW, or the same on bf16 weights, with the rest of float32 masters as state."""

import torch
from torch.optim.adamw import adamw

from engine.memory.layouts import ON_THE_HOST
from engine.model.tensors import local_part


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


def optimizer_of(parameters, lr, weight_decay, name, device):
    """AdamW with betas 0.9 and 0.999 for these parameters, as a --memory needs it."""
    if name == "split":
        return SplitAdamW(parameters, lr, weight_decay=weight_decay)
    # The unfused one moves the peak of a GPU's memory into the step, and is several times slower on the host.
    fused = device.type == "cuda" or name in ON_THE_HOST
    return torch.optim.AdamW(parameters, lr, (0.9, 0.999), weight_decay=weight_decay, fused=fused)
