"""For small cards: of a frozen network, keep on the GPU only the parts that a call runs."""

from functools import partial

import torch


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
