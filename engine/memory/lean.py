"""For small cards: keep only those parts of a frozen network on the GPU that are used."""

from functools import partial

import torch


# -------------------------------------------------------------------------------------------- the reward path
def parts_used(network, call):
    """The outermost modules of a network that call() runs. If call() encodes a picture, this is its image side."""
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
    """Keep the parts of a frozen network that call() runs on its device, in dtype, and move the rest to the host. The
    inputs of those parts are cast to dtype."""
    device = next(network.parameters()).device
    parts = parts_used(network, call)
    network.to("cpu")
    for part in parts:
        part.to(device, dtype)
        part.register_forward_pre_hook(partial(cast, dtype), with_kwargs=True)


def cast(dtype, module, arguments, named):
    """The arguments of a module, with floating-point tensors cast to dtype."""
    def one(value):
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    return tuple(map(one, arguments)), {name: one(value) for name, value in named.items()}
