"""Predicts the memory and the work of an update, on any machine and without weights: `python train.py --plan
--world-size 8`.

FLOP and saved activations are counted by running the real modules on fake tensors, which have shapes but no values.
The rest is arithmetic. FSDP2 with float32 masters holds 16 bytes per parameter (parameter, gradient, two moments),
divided by the number of ranks that shard it; `held` has the arithmetic for every --memory.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.errors import UserError
from engine.memory.counts import count
from engine.memory.downloads import STAGED
from engine.memory.modes import HELD_ON_THE_GPU, ON_THE_HOST, is_lean
from engine.memory.work import flop_per_call, flop_per_step

GIB = 2**30


@dataclass
class Prediction:
    """One update of one process: memory and communication in bytes, work in FLOP."""
    all_parameters: int     # number (not bytes) of the transformer's parameters, of all processes together
    parameters: float       # on the GPU; so are gradients and optimizer
    gradients: float
    optimizer: float        # Adam's two moments, and its other state
    activations: int        # of the transformer
    gathered: int           # copies of blocks while they compute, and gradients on their way to the reduction
    reward_path: int        # activations of decoding and of the rewards
    frozen: int             # the VAE and the reward networks
    peak_in_update: float
    peak_in_rollout: float
    rollout: int
    update: int
    decode: int
    reward: int
    received: float
    host: float             # in the host's memory, of this process
    bus: float              # copied between the host's pinned memory and the GPU
    rewards: float          # of the rewards, wherever they are
    peak_in_texts: float    # while the text encoders are loaded, before the transformer is

    @property
    def peak(self):
        return max(self.peak_in_texts, self.peak_in_update, self.peak_in_rollout)

    @property
    def flop(self):
        return self.rollout + self.update + self.decode + self.reward


class Held(NamedTuple):
    """What one process holds of the transformer, in bytes; on the GPU, except `host`."""
    parameters: float
    gradients: float
    optimizer: float
    gathered: float             # copies of a block while it computes, in forward or backward
    gathered_in_rollout: float  # copies in the rollout
    apart: float = 0            # on FSDP2's own streams: what it gathers ahead, and a block's float32 gradients
    host: float = 0             # in the host's memory
    copied: float = 0           # from the host to the GPU, to compute with every block once


def stored_by(shapes, shards):
    """[bytes of each parameter's shard] of a base in float8: the blocks' matrices 1 a number, the rest 2."""
    return [(1 if shape.in_fp8 else 2) * shape.numel(shards) for shape in shapes]


def held(job, counts, world_size, compute_dtype):
    """The `Held` of one of world_size processes, by what FSDP2 does with the layouts of engine/memory/layouts.py."""
    shards = world_size // job.replicas
    several = world_size > 1
    width = compute_dtype.itemsize
    block = counts.largest_block
    # With several processes two blocks are gathered ahead, so that computing does not wait for the network. A block's
    # gradient has a float32 copy, which is averaged over the processes.
    ahead = several * 2 * width * block * (1 + 1 / shards)
    if job.lora:
        return held_of_lora(job, counts, shards, several, width, ahead)

    n = counts.parameters / shards
    largest = max(shape.numel(1) for shape in counts.shapes)
    # A block computes with a copy in the compute dtype. In the backward there are also its gradient, and the float32
    # copy of that. The rollout calls every block many times, and keeps all copies until its end (parallel.gathered).
    copies = width * block
    with_gradient = 2 * copies + several * 4 * block
    in_rollout = width * counts.parameters
    apart = ahead + 4 * block / shards
    if job.memory == "masters":
        if not several and compute_dtype == torch.float32:
            with_gradient = in_rollout = 0  # the masters themselves compute
        return Held(4 * n, 4 * n, 8 * n, with_gradient, in_rollout, apart)
    if job.memory == "split":  # the optimizer holds the lower halves of the masters, and two moments in bf16
        if not several and compute_dtype == torch.bfloat16:  # computes with what it stores, without FSDP2
            with_gradient = width * largest
            in_rollout = apart = 0
        return Held(2 * n, 2 * n, 6 * n, with_gradient, in_rollout, apart)
    # float32 shards on their way to the copies: of two blocks, or of one parameter
    coming = 4 * (2 * block / shards if several else largest)
    in_rollout = coming + (in_rollout if job.memory == "offload" else copies)
    host = 2 * pinned([4 * shape.numel(shards) for shape in counts.shapes]) + 8 * n
    return Held(0, 0, 0, with_gradient + coming, in_rollout, apart, host, 4 * n)


def held_of_lora(job, counts, shards, several, width, ahead):
    """`held` of a LoRA. several: whether there is more than one process; width: bytes of a number that computes; ahead:
    bytes of the blocks that are gathered ahead."""
    block = counts.largest_block
    adapters = job.lora * counts.adapters
    trained = adapters / shards
    of_block = adapters * block / counts.parameters  # about the adapters' parameters in the largest block
    gradient = 2 * width * of_block  # of the adapters in a block, and their copies that compute
    if job.memory == "bf16":  # the base is replicated, and computes without a copy
        return Held(2 * counts.parameters + 4 * trained, 4 * trained, 8 * trained, gradient, width * adapters,
                    4 * of_block / shards)
    # A base in float8 is gathered as it is stored, and cast a matrix at a time. One process that has it on the GPU
    # gathers nothing.
    stored = stored_by(counts.shapes, shards)
    largest = max(shape.numel(1) for shape in counts.shapes)
    copies = width * largest
    if several or job.memory == "fp8-offload":
        copies += block
    apart = ahead / width + 4 * of_block / shards
    if job.memory == "fp8":
        return Held(sum(stored) + 4 * trained, 4 * trained, 8 * trained, copies + gradient, copies, apart)
    coming = 2 * block / shards if several else largest
    # The adapters' matrices are small: `pinned` is taken to round them up by half.
    return Held(0, 0, 0, copies + gradient + coming, copies + coming, apart, pinned(stored) + (1.5 * 8 + 8) * trained,
                sum(stored) + 4 * trained)


def pinned(sizes):
    """Bytes that tensors of these sizes, in bytes, take in pinned memory of the host, from which a GPU copies. Torch
    rounds each up to a power of two."""
    return sum(2 ** (size - 1).bit_length() for size in sizes)


def predict(job, world_size, compute_dtype):
    """The `Prediction` for one of world_size processes."""
    return divide(job, count(job, compute_dtype), world_size, compute_dtype)


def divide(job, counts, world_size, compute_dtype):
    """The `Prediction` for one of world_size processes, from the `Counts`. Raises UserError as `check_replicas`."""
    check_replicas(job.replicas, world_size)
    has = held(job, counts, world_size, compute_dtype)
    if job.reward_apart:
        counts = counts.without_rewards()

    batch, accumulate = job.share(world_size)
    states = job.at_once(world_size) * batch * (2 if job.cfg == "both" else 1)
    saved = states * counts.saved
    recomputed = states * counts.recomputed
    reward_path = batch * (counts.lean_path if is_lean(job.memory) else counts.reward_path)
    frozen = counts.lean_frozen if is_lean(job.memory) else counts.frozen
    # The backward first goes through what decoding and the rewards have saved, and frees it; then through one block
    # after the other. What FSDP2 makes on streams of its own, float32 gradients too, no other stream gets; the
    # allocator keeps it for the next update.
    state = has.parameters + has.optimizer + frozen
    apart = has.gradients + has.apart
    in_turn = max(reward_path, recomputed + has.gathered)
    if job.memory == "stream":  # rehearsed: the block's gradient finds no room in what the reward path has left
        in_turn = reward_path + compute_dtype.itemsize * counts.largest_block
    peak_in_update = state + saved + in_turn + apart
    # The rollout saves no activations, and the first one of an update finds no gradients. It counts for photographs
    # too: the watched pictures are still sampled.
    peak_in_rollout = state + has.gathered_in_rollout + apart
    if job.rollout_dtype == "fp8" and job.memory in HELD_ON_THE_GPU:
        # a byte for each weight until the rollout ends, and two float32 copies of the one that is cast
        peak_in_rollout += counts.multiplied + 8 * max(shape.numel(1) for shape in counts.shapes)

    received, bus, staged = exchanged(job, has, counts, world_size, compute_dtype)
    images = batch * accumulate
    return Prediction(
        all_parameters=counts.parameters, parameters=has.parameters, gradients=has.gradients,
        optimizer=has.optimizer, activations=saved + recomputed, gathered=has.gathered + has.apart,
        reward_path=reward_path, frozen=frozen, peak_in_update=peak_in_update, peak_in_rollout=peak_in_rollout,
        rollout=images * job.rollout_steps * flop_per_step(job, counts.forward),
        update=images * job.calls * flop_per_call(job, counts.forward),
        # The networks are frozen, so the backward costs as much as the forward: it has no gradient of parameters.
        decode=images * job.calls * (3 if is_lean(job.memory) else 2) * counts.decode,
        reward=images * job.calls * 2 * counts.reward,
        rewards=counts.rewards.held(is_lean(job.memory), batch),
        received=received, host=has.host + staged, bus=bus,
        peak_in_texts=compute_dtype.itemsize * job.text_parameters)


def exchanged(job, has, counts, world_size, compute_dtype):
    """What one of world_size processes exchanges in an update, bytes: (received from other processes, copied between
    the host and the GPU, of gradients that wait in the host's memory to be added). has: the `Held`."""
    shards = world_size // job.replicas
    trained = job.lora * counts.adapters if job.lora else counts.parameters
    _, accumulate = job.share(world_size)
    times = job.calls // job.at_once(world_size)
    # Sharded parameters are gathered for the rollout, once or at every step; and twice for a call with a gradient, in
    # forward and backward. After each such call the float32 gradients are averaged inside the group, of which a process
    # already has its own 1 / shards; then each shard is averaged between the groups.
    steps = min(1, job.rollout_steps) if job.memory in HELD_ON_THE_GPU else job.rollout_steps
    passes = steps + (3 if job.cfg == "prompt" else 2) * times
    sharded = trained if job.memory == "bf16" else counts.parameters
    received = (shards - 1) / shards * (sharded * passes * compute_dtype.itemsize + trained * times * 4)
    received += times * 4 * trained / shards * 2 * (job.replicas - 1) / job.replicas
    if job.memory not in ON_THE_HOST:
        return accumulate * received, 0, 0
    # Parameters are copied from the host as often, and the gradients of every backward are copied back and added there
    # (downloads.py).
    gradients = 4 * trained / shards
    staged = min(STAGED, gradients) if accumulate * times > 1 else 0
    return accumulate * received, accumulate * (has.copied * passes + times * gradients), staged


def check_replicas(replicas, world_size):
    """Raise UserError if the processes cannot be divided into so many groups."""
    if world_size % replicas:
        raise UserError(f"--replicas {replicas}: does not divide the {world_size} processes")
