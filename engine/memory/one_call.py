"""Several calls of the network as one, where every call copies its parameters from the host or from other GPUs."""

import torch


class Calls:
    """The calls of a network with a gradient for some noisy states of the same images. If `net.branches_are_one_call`
    they are one call, of all states as one batch, and one backward. So the parameters come to the GPU twice and not
    twice a state, and their gradients leave it once.

    The network's graph is cut at its output. The backward of each state's loss ends at the cut, so what decoding and
    the reward save is held for one state at a time. Then `backward` goes on through the network, for all states.
    """

    def __init__(self, net, states):
        """net: a `flow.Flow`; states: (x_t [B, N, C], sigma [B]) of K calls."""
        self.net = net
        self.states = states
        self.are_one = net.branches_are_one_call and len(states) > 1
        self.parts = None  # K times [B, N, C], of the cut
        self.output = None  # [K B, N, C], with the network's graph
        self.cut = None     # the same numbers, a leaf

    def velocity(self, x_t, sigma, c, guidance):
        """v_theta of the next state, [B, N, C] with gradient: as `flow.Flow.velocity` of it."""
        if not self.are_one:
            return self.net.velocity(x_t, sigma, c, guidance)
        if self.parts is None:
            x_t, sigma = (torch.cat(each) for each in zip(*self.states, strict=True))
            self.output = self.net.velocity(x_t, sigma, c.times(len(self.states)), guidance)
            self.cut = self.output.detach().requires_grad_()
            self.parts = iter(self.cut.chunk(len(self.states)))
        return next(self.parts)

    def backward(self):
        """After the backward of every state's loss: that of the network, if it is not done yet."""
        if self.are_one and self.cut.grad is not None:
            self.output.backward(self.cut.grad)
