"""Predicts the memory and the work of an update, on any machine and without weights: `python train.py --plan
--world-size 8`.

FLOP and saved activations are counted by running the real modules on fake tensors, which have shapes but no values.
The rest is arithmetic. FSDP2 with float32 masters holds 16 bytes per parameter (parameter, gradient, two moments),
divided by the number of ranks that shard it; `held` has the arithmetic for every --memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from engine.errors import UserError
from engine.memory import gpus
from engine.memory.lean import parts_used
from engine.memory.modes import HELD_ON_THE_GPU, ON_THE_HOST, is_lean, stored_in_fp8
from engine.memory.parallel import blocks_of
from engine.model import lora

MIB, GIB = 2**20, 2**30
GIGA, TERA = 1e9, 1e12
# Of the copies that a rollout holds, how much more the allocator reserves: FSDP2 makes them on a stream of its own,
# whose freed memory no other stream gets. Rehearsed for FLUX.1-dev: 8 processes reserve 50.2 GiB.
KEPT = 0.3
MOST_PROCESSES = 64  # the largest number of GPUs that a message recommends


@dataclass
class Job:
    """What the cost of an update of a training run depends on."""
    model: str           # its name, for messages
    transformer: dict    # FluxTransformer2DModel's config
    vae: dict            # AutoencoderKL's config
    text_tokens: int     # of a prompt
    text_parameters: int  # of the text encoders, which every process loads whole, before the transformer
    size: int            # side of a picture, pixels
    image_tokens: int    # of a picture
    images: int          # of an update, of all processes together: the global batch
    batch: int           # images that a process computes at a time, at most
    updates: int         # of the run
    rollout_steps: int   # calls of the transformer without a gradient, per image; 0 for photographs
    calls: int           # calls with a gradient, per image: branches x injections
    checkpointing: bool  # activation checkpointing: the backward computes each block's activations again
    replicas: int        # HSDP: groups of processes that each hold all parameters
    # Returns a list of (network, call, times, texts), one for each reward. call(grad=False) runs the network on one
    # picture, with a gradient if grad is True. times: how often it runs for an image, 0 for a reward that is held out.
    # texts is not read. It is a function because networks that are made under fake tensors take no memory.
    reward_networks: Callable
    lora: int | None = None  # rank of the adapters that are trained; None: all weights are
    memory: str = "masters"  # how they are stored: a --memory other than auto
    reward_apart: bool = False  # the rewards are on a device of their own

    def share(self, processes):
        """(images in a batch, number of batches whose gradients are accumulated) of each process. If the number of
        processes does not divide the images, each process's share is rounded up."""
        mine = -(-self.images // processes)
        batch = max(n for n in range(1, min(self.batch, mine) + 1) if mine % n == 0)
        return batch, mine // batch


class Counts(NamedTuple):
    """Sizes and work of a job's networks, which do not depend on the number of processes. Activations and FLOP are for
    one image."""
    parameters: int     # of the transformer
    largest_block: int  # parameters of its largest block
    activations: int    # bytes that one call of the transformer saves for its backward
    reward_path: int    # bytes that decoding and the rewards save for their backward
    frozen: int         # bytes of the VAE and the reward networks
    forward: int        # FLOP of one call of the transformer
    decode: int         # FLOP of one decoded picture
    reward: int         # FLOP of one picture's rewards
    shapes: list        # a `Shape` for every parameter of the transformer
    adapters: int       # parameters of adapters of rank 1
    lean_path: int      # as reward_path, if `modes.is_lean`
    lean_frozen: int    # as frozen, if `modes.is_lean`
    rewards: "Rewards"  # the rewards' part of the four

    def without_rewards(self):
        """The same, if the rewards are on a device of their own."""
        return self._replace(**{name: getattr(self, name) - part for name, part in self.rewards._asdict().items()})


class Rewards(NamedTuple):
    """Bytes of the rewards, in `Counts`."""
    frozen: int = 0
    reward_path: int = 0
    lean_frozen: int = 0
    lean_path: int = 0

    def held(self, lean, batch):
        """Bytes that they take, for a batch of so many images."""
        return self.lean_frozen + batch * self.lean_path if lean else self.frozen + batch * self.reward_path


class Shape(NamedTuple):
    """The shape of a parameter, which is sharded by its rows."""
    rows: int
    row: int      # numbers in a row
    in_fp8: bool  # whether --memory fp8 stores it in float8

    def numel(self, shards):
        """How many numbers the first of `shards` processes holds, which has the most."""
        return -(-self.rows // shards) * self.row


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
    unpinned: float         # gradients that come to the host beside earlier ones: not pinned, and added there
    rewards: float          # of the rewards, wherever they are
    peak_in_texts: float    # while the text encoders are loaded, before the transformer is

    @property
    def peak(self):
        return max(self.peak_in_texts, self.peak_in_update, self.peak_in_rollout)

    @property
    def flop(self):
        return self.rollout + self.update + self.decode + self.reward


# ------------------------------------------------------------------------ counting, on tensors without values
def create(kind, config, dtype):
    """A diffusers module from a config, built in dtype, since fake tensors have no `to(dtype)`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return kind.from_config(config)
    finally:
        torch.set_default_dtype(before)


def forward(transformer, image_tokens, text_tokens, dtype):
    """One call of a FLUX transformer on zeros, for one image. Returns [1, image_tokens, C]."""
    config = transformer.config
    return transformer(
        hidden_states=torch.zeros(1, image_tokens, config.in_channels, dtype=dtype),
        encoder_hidden_states=torch.zeros(1, text_tokens, config.joint_attention_dim, dtype=dtype),
        pooled_projections=torch.zeros(1, config.pooled_projection_dim, dtype=dtype),
        timestep=torch.zeros(1), guidance=torch.zeros(1) if config.guidance_embeds else None,
        img_ids=torch.zeros(image_tokens, 3), txt_ids=torch.zeros(text_tokens, 3), return_dict=False)[0]


def attention_flop(query, key, value, *others, out_shape=None, **options):
    """FLOP of attention from the shapes of its inputs: two matrix products."""
    return sdpa_flop_count(query, key, value)


# FlopCounterMode does not know attention on a CPU, which is the device of the fake tensors.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop}


def flop_of(run, *arguments):
    """FLOP of run(*arguments), without a backward."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        run(*arguments)
    return counter.get_total_flops()


def saved_by(parameters, run, *arguments, **options):
    """Bytes that run(*arguments, **options) saves for a backward, without these parameters. As on a GPU, attention
    saves its inputs and its output, not its matrix."""
    own = {p.untyped_storage()._cdata for p in parameters}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # a reference, so that the address is not used again
        return tensor

    def unpack(tensor):
        return tensor

    with saved_tensors_hooks(pack, unpack):
        run(*arguments, **options)
    return sum(storage.nbytes() for storage in saved.values())


def saved_by_transformer(transformer, job, dtype):
    """The most bytes of activations that one call for one image holds until its backward is done."""
    call = (forward, transformer, job.image_tokens, job.text_tokens, dtype)
    whole = saved_by(transformer.parameters(), *call)
    if not job.checkpointing:
        return whole
    # Only the blocks' inputs are kept. The backward recomputes the activations of one block at a time.
    transformer.enable_gradient_checkpointing()
    inputs = saved_by(transformer.parameters(), *call)
    return inputs + whole / len(blocks_of(transformer))


def saved_by_decoder(vae, z):
    """Bytes that decoding saves if the decoder's parts are recomputed in the backward: the inputs of all parts, and the
    activations of the largest part."""
    parts = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    inputs = {}

    def note(part, arguments):
        inputs[part] = arguments

    hooks = [part.register_forward_pre_hook(note) for part in parts]
    vae.decode(z)
    for hook in hooks:
        hook.remove()
    largest = max(saved_by(vae.parameters(), part, *inputs[part]) for part in parts)
    vae.enable_gradient_checkpointing()
    return largest + saved_by(vae.parameters(), vae.decode, z)


def parameters_of(module):
    """The number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def bytes_of(module):
    """The bytes of a module's parameters."""
    return sum(p.nbytes for p in module.parameters())


def count(job, compute_dtype):
    """The `Counts` of a job. Its transformer and VAE compute in compute_dtype, its rewards in float32."""
    with FakeTensorMode():
        transformer = create(diffusers.FluxTransformer2DModel, job.transformer, compute_dtype)
        once = flop_of(forward, transformer, job.image_tokens, job.text_tokens, compute_dtype)
        activations = saved_by_transformer(transformer, job, compute_dtype)

        vae = create(diffusers.AutoencoderKL, job.vae, compute_dtype).requires_grad_(False)
        side = job.size // 2 ** (len(job.vae["block_out_channels"]) - 1)  # it halves a picture between levels
        z = torch.zeros(1, vae.config.latent_channels, side, side, dtype=compute_dtype, requires_grad=True)
        decode_flop = flop_of(vae.decode, z)
        path = saved_by(vae.parameters(), vae.decode, z)
        lean_path = saved_by_decoder(vae, z)
        frozen = lean_frozen = bytes_of(vae)

        reward_flop = 0
        rewards = Rewards()
        for network, call, times, _ in job.reward_networks():
            # In lean modes only what scoring runs is on the GPU, in 2 bytes a number.
            wide = next(network.parameters()).itemsize / 2
            used = sum(parameters_of(part) for part in parts_used(network, call))
            saved = 0
            if times:  # a reward that is held out takes memory, but does not run in an update
                reward_flop += times * flop_of(call)
                saved = times * saved_by(network.parameters(), call, grad=True)
            mine = (bytes_of(network), saved, 2 * used, saved / wide)
            rewards = Rewards(*(one + other for one, other in zip(rewards, mine, strict=True)))
        frozen += rewards.frozen
        path += rewards.reward_path
        lean_frozen += rewards.lean_frozen
        lean_path += rewards.lean_path

        shapes = []
        for name, parameter in transformer.named_parameters():
            row = parameter.numel() // len(parameter)
            shapes.append(Shape(len(parameter), row, stored_in_fp8(name, parameter)))
        layers = lora.layers_of(transformer).values()
        largest = max(parameters_of(block) for block in blocks_of(transformer))
        return Counts(parameters=parameters_of(transformer), largest_block=largest, activations=activations,
                      reward_path=path, frozen=frozen, forward=once, decode=decode_flop, reward=reward_flop,
                      shapes=shapes, adapters=sum(layer.in_features + layer.out_features for layer in layers),
                      lean_path=lean_path, lean_frozen=lean_frozen, rewards=rewards)


# ------------------------------------------------------------------------------------------------- arithmetic
def flop_per_call(job, once):
    """FLOP of one call with a gradient. once: FLOP of a forward.

    The backward takes `once` for the gradient of the inputs, and `once` for that of the parameters, which frozen
    parameters do not need. Activation checkpointing runs the forward again. The adapters' own work, about a hundredth,
    is left out.
    """
    backward = 1 if job.lora else 2
    return once * (1 + backward + job.checkpointing)


def forward_flop(job):
    """FLOP of one call of the transformer for one image."""
    with FakeTensorMode():
        transformer = create(diffusers.FluxTransformer2DModel, job.transformer, torch.bfloat16)
        return flop_of(forward, transformer, job.image_tokens, job.text_tokens, torch.bfloat16)


def update_flop(job, processes=1):
    """FLOP of the transformer in one update, for each of so many processes: the rollout and the calls with a
    gradient."""
    once = forward_flop(job)
    batch, accumulate = job.share(processes)
    return batch * accumulate * (job.rollout_steps * once + job.calls * flop_per_call(job, once))


class Held(NamedTuple):
    """What one process holds of the transformer, in bytes; on the GPU, except `host`."""
    parameters: float
    gradients: float
    optimizer: float
    gathered: float             # copies while a block computes, in forward or backward
    gathered_in_rollout: float  # copies in the rollout
    host: float = 0             # in the host's memory
    copied: float = 0           # from the host to the GPU, to compute with every block once


def held(job, counts, world_size, compute_dtype):
    """The `Held` of one of world_size processes, by what FSDP2 does with the layouts of engine/memory/layouts.py."""
    shards = world_size // job.replicas
    width = compute_dtype.itemsize
    all_of_it = counts.parameters
    block = counts.largest_block
    adapters = (job.lora or 0) * counts.adapters
    # A block computes with a copy gathered from all ranks, in the compute dtype, and frees it afterwards. Meanwhile the
    # next block is gathered, so that computing does not wait for the network: two copies at a time. In the backward
    # there are also the block's gradient and a float32 copy of it, which is reduced over the ranks.
    copies = 2 * width * block
    with_gradient = copies + (width + 4) * block
    # The rollout calls every block many times, and keeps all copies until its end (see parallel.gathered). A single
    # process keeps none: it copies each block just before the block computes.
    in_rollout = width * all_of_it if world_size > 1 else 0

    if job.memory == "masters":
        if world_size == 1 and compute_dtype == torch.float32:
            with_gradient = 0  # the masters themselves compute
        return Held(4 * all_of_it / shards, 4 * all_of_it / shards, 8 * all_of_it / shards, with_gradient,
                    in_rollout)
    if job.memory == "split":  # the optimizer holds the lower halves of the masters, and two moments in bf16
        return Held(2 * all_of_it / shards, 2 * all_of_it / shards, 6 * all_of_it / shards, with_gradient,
                    in_rollout)
    if job.memory in ("offload", "stream"):
        coming = 2 * 4 * block / shards  # the float32 shards of two blocks, copied from the host
        if job.memory == "offload":
            in_rollout = width * all_of_it + coming
        else:
            in_rollout = copies + coming
        host = 2 * pinned([4 * shape.numel(shards) for shape in counts.shapes]) + 8 * all_of_it / shards
        return Held(0, 0, 0, with_gradient + coming, in_rollout, host, 4 * all_of_it / shards)

    trained = adapters / shards
    of_block = adapters * block / all_of_it  # about the adapters' parameters in the largest block
    if job.memory == "bf16":  # the base is replicated, and computes without a copy
        in_rollout = width * adapters if world_size > 1 else 0
        return Held(2 * all_of_it + 4 * trained, 4 * trained, 8 * trained, (3 * width + 4) * of_block,
                    in_rollout)
    stored = [(1 if shape.in_fp8 else 2) * shape.numel(shards) for shape in counts.shapes]
    cast = copies + width * block  # two gathered blocks, and the next block's shard, cast to the compute dtype
    with_gradient = cast + (3 * width + 4) * of_block
    if job.memory == "fp8":
        return Held(sum(stored) + 4 * trained, 4 * trained, 8 * trained, with_gradient, cast)
    coming = block / shards
    # The adapters' matrices are small: `pinned` is taken to round them up by half.
    return Held(0, 0, 0, with_gradient + coming, cast + coming, pinned(stored) + (1.5 * 8 + 8) * trained,
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
    shards = world_size // job.replicas
    has = held(job, counts, world_size, compute_dtype)
    trained = job.lora * counts.adapters if job.lora else counts.parameters
    if job.reward_apart:
        counts = counts.without_rewards()

    batch, accumulate = job.share(world_size)
    activations = batch * counts.activations
    reward_path = batch * (counts.lean_path if is_lean(job.memory) else counts.reward_path)
    frozen = counts.lean_frozen if is_lean(job.memory) else counts.frozen
    # The rollout saves no activations, and the first one of an update finds no gradients. So the peak may be in the
    # update or in the rollout. The rollout counts for photographs too: the watched pictures are still sampled.
    # What blocks gather never lives together with what the decoder and the rewards save. With copies from the host the
    # allocator keeps both apart.
    apart = job.memory in ON_THE_HOST
    in_turn = has.gathered + reward_path if apart else max(has.gathered, reward_path)
    peak_in_update = has.parameters + has.gradients + has.optimizer + activations + in_turn + frozen
    peak_in_rollout = has.parameters + has.optimizer + has.gathered_in_rollout + frozen
    if accumulate > 1:
        peak_in_rollout += has.gradients
    if job.memory in HELD_ON_THE_GPU:
        peak_in_rollout += KEPT * has.gathered_in_rollout

    # Sharded parameters are gathered for the rollout, once or at every step; and twice for a call with a gradient, in
    # forward and backward. After each such call the float32 gradients are averaged inside the group, of which a process
    # already has its own 1 / shards; then each shard is averaged between the groups.
    steps = min(1, job.rollout_steps) if job.memory in HELD_ON_THE_GPU else job.rollout_steps
    passes = steps + 2 * job.calls
    sharded = trained if job.memory == "bf16" else counts.parameters
    received = (shards - 1) / shards * (sharded * passes * compute_dtype.itemsize + trained * job.calls * 4)
    received += job.calls * 4 * trained / shards * 2 * (job.replicas - 1) / job.replicas
    # With offloading, parameters are copied from the host as often, and the gradients are copied back. FSDP2 copies the
    # first ones of an update into pinned memory; the later ones into memory that is not, and adds them on the CPU.
    bus = unpinned = 0
    if job.memory in ON_THE_HOST:
        gradients = 4 * trained / shards
        bus = accumulate * has.copied * passes + gradients
        unpinned = (accumulate * job.calls - 1) * gradients

    images = batch * accumulate
    return Prediction(
        all_parameters=counts.parameters, parameters=has.parameters, gradients=has.gradients,
        optimizer=has.optimizer, activations=activations, gathered=has.gathered, reward_path=reward_path,
        frozen=frozen, peak_in_update=peak_in_update, peak_in_rollout=peak_in_rollout,
        rollout=images * job.rollout_steps * counts.forward,
        update=images * job.calls * flop_per_call(job, counts.forward),
        # The networks are frozen, so the backward costs as much as the forward: it has no gradient of parameters.
        decode=images * job.calls * (3 if is_lean(job.memory) else 2) * counts.decode,
        reward=images * job.calls * 2 * counts.reward,
        rewards=counts.rewards.held(is_lean(job.memory), batch),
        received=accumulate * received, host=has.host, bus=bus, unpinned=unpinned,
        peak_in_texts=compute_dtype.itemsize * job.text_parameters)


# ----------------------------------------------------------------------------------- what the scripts ask for
def achieved(flop, seconds, device):
    """{"tflop_per_second"} of a measured update of this process. On a GPU also "share_of_peak", None for a card that
    is not in gpus.PEAK; and "peak_gib", the most memory allocated so far."""
    rate = flop / seconds / TERA
    reached = {"tflop_per_second": round(rate, 4)}
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        peaks = [peak for name, peak in gpus.PEAK.items() if name in card]
        reached["share_of_peak"] = round(rate / peaks[0], 4) if peaks else None
        reached["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 2)
    return reached


def in_bytes(amount):
    """12884901888 -> "    12.0 GiB"."""
    return f"{amount / GIB:8.1f} GiB" if amount >= GIB / 10 else f"{amount / MIB:8.1f} MiB"


def in_flop(amount):
    """1.2e13 -> "    12.0 TFLOP"."""
    return f"{amount / TERA:8.1f} TFLOP" if amount >= TERA / 10 else f"{amount / GIGA:8.1f} GFLOP"


def in_time(seconds):
    """95 -> "1.6 min"; 7000 -> "1.9 h"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def check_replicas(replicas, world_size):
    """Raise UserError if the processes cannot be divided into so many groups."""
    if world_size % replicas:
        raise UserError(f"--replicas {replicas}: does not divide the {world_size} processes")


def show(job, world_size, card, share):
    """Print the plan of one of world_size processes, and the seconds of an update on a card. share: of the card's peak
    that is reached, 0 to 1. Raises UserError."""
    gpus.check(card)
    check_replicas(job.replicas, world_size)
    plan = predict(job, world_size, torch.bfloat16)
    memory = {"parameters": plan.parameters, "gradients": plan.gradients, "optimizer": plan.optimizer,
              "activations": plan.activations, "gathered": plan.gathered, "reward path": plan.reward_path,
              "frozen": plan.frozen, "text encoders": plan.peak_in_texts,
              "peak in the update": plan.peak_in_update,
              "peak in the rollout": plan.peak_in_rollout}
    if job.reward_apart:
        memory["the rewards' GPU"] = plan.rewards
    work = {"rollout": plan.rollout, "update": plan.update, "decode": plan.decode, "reward": plan.reward}
    seconds = plan.flop / TERA / (gpus.PEAK[card] * share)

    batch, accumulate = job.share(world_size)
    batches = f" x {accumulate} batches" if accumulate > 1 else ""
    print(f"predicted, not measured: {job.model}, {plan.all_parameters / 1e6:,.1f} M parameters, "
          f"{job.size} x {job.size} pixels, an update of {job.images} images: {batch} at a time{batches} a process, "
          f"{world_size} processes, "
          f"activation checkpointing {'on' if job.checkpointing else 'off'}")
    print("\nmemory per process")
    for name, amount in memory.items():
        print(f"    {name:20}{in_bytes(amount)}")
    print("\nwork per process and update")
    for name, amount in work.items():
        print(f"    {name:20}{in_flop(amount)} {100 * amount / plan.flop:6.1f} %")
    print(f"    {'received':20}{plan.received / GIGA:8.1f} GB")
    print(f"\n{in_flop(plan.flop).strip()} an update and process: {seconds:.3g} s on {card} at {share:.0%} of its "
          f"{gpus.PEAK[card]} TFLOP/s, without communication; {job.updates} updates: "
          f"{in_time(job.updates * seconds)}")
