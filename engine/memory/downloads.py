"""Gradients that FSDP2 copies from the GPU to the host, added up over the batches of an update."""

from collections import deque

import torch

from engine.model.tensors import local_part

STAGED = 2**31  # bytes of gradients that may be on their way, each in pinned memory of its own


class Downloads:
    """Takes every gradient as FSDP2 hands it over, and adds it to that of the batches before.

    FSDP2 adds them itself, but then it copies each into memory that is not pinned, and waits for it. If a parameter has
    no gradient yet, it copies into pinned memory and does not wait. So the gradient is taken away from the parameter at
    once, and added a little later, when others are on their way. `finish` gives the sums to the parameters.
    """

    def __init__(self, parameters):
        """parameters: sharded, in the host's memory, and trained."""
        self.sums = {}
        self.coming = deque()  # (parameter, its gradient, when it has arrived)
        self.bytes = 0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.take)

    def take(self, parameter):
        """The hook: called by FSDP2 in the backward, on the stream of the copy."""
        gradient = parameter.grad
        parameter.grad = None
        self.coming.append((parameter, gradient, arrival()))
        self.bytes += local_part(gradient).nbytes
        while self.bytes > STAGED:
            self.add()

    @torch.no_grad()
    def add(self):
        """Add the gradient that has been on its way for the longest time."""
        parameter, gradient, arrived = self.coming.popleft()
        self.bytes -= local_part(gradient).nbytes
        if parameter not in self.sums:
            self.sums[parameter] = gradient
            return
        if arrived is not None:
            arrived.synchronize()
        local_part(self.sums[parameter]).add_(local_part(gradient))

    def finish(self):
        """Before a gradient is read: the last ones are added, and every parameter has its own."""
        last = self.coming[-1][2] if self.coming else None
        while self.coming:
            self.add()
        if last is not None:
            last.synchronize()
        for parameter, gradient in self.sums.items():
            parameter.grad = gradient
        self.sums = {}


def arrival():
    """An event after what the current stream has been given; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
