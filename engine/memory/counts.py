"""What an update of FLUX takes, counted without weights: the real modules run on fake tensors, which have shapes but no
values."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from engine.command_line import sides
from engine.memory.lean import parts_used
from engine.memory.modes import branches_are_one_call
from engine.memory.parallel import blocks_of
from engine.model import lora
from engine.model.float8 import is_stored_so
from engine.model.tensor_files import kind_of


@dataclass
class Job:
    """What the cost of an update of a training run depends on."""
    model: str           # its name, for messages
    transformer: dict    # the transformer's config
    vae: dict            # the VAE's config
    text_tokens: int     # of a prompt
    text_parameters: int  # of the text encoders, which a machine's first process loads whole, before the transformer
    size: int            # side of a picture, pixels
    image_tokens: int    # of a picture
    images: int          # of an update, of all processes together: the global batch
    batch: int           # images that a process computes at a time, at most
    updates: int         # of the run
    rollout_steps: int   # calls of the transformer without a gradient, per image; 0 for photographs
    calls: int           # calls with a gradient, per image: branches x injections
    checkpointing: bool  # activation checkpointing: the backward computes each block's activations again
    replicas: int        # HSDP: groups of processes that each hold all parameters
    # Returns a list of (network, call, times, texts), one for each reward; texts is unread. call(grad=False) runs it on
    # one picture, with a gradient if grad is True. times: how often it runs for an image, 0 for a reward that is held
    # out. It is a function because networks that are made under fake tensors take no memory.
    reward_networks: Callable
    lora: int | None = None  # rank of the adapters that are trained; None: all weights are
    memory: str = "masters"  # how they are stored: a --memory other than auto
    cfg: str | None = None   # classifier-free guidance in a call with a gradient: off, both or prompt; None: nowhere
    together: int = 1        # calls with a gradient that can be one (one_call.py)
    rollout_dtype: str = "same"  # "fp8": --rollout-dtype fp8
    reward_apart: bool = False   # the rewards are on a device of their own

    def share(self, processes):
        """(images in a batch, number of batches whose gradients are accumulated) of each process. If the number of
        processes does not divide the images, each process's share is rounded up."""
        mine = -(-self.images // processes)
        batch = max(n for n in range(1, min(self.batch, mine) + 1) if mine % n == 0)
        return batch, mine // batch

    def at_once(self, processes):
        """How many of an image's calls with a gradient the network of one of so many processes computes as one."""
        return self.together if branches_are_one_call(self.memory, processes, self.checkpointing) else 1


class Counts(NamedTuple):
    """Sizes and work of a job's networks, which do not depend on the number of processes. Activations and FLOP are for
    one image."""
    parameters: int     # of the transformer
    largest_block: int  # parameters of its largest block
    saved: int          # bytes that one call of the transformer saves for its backward
    recomputed: int     # bytes that its backward computes again at a time: the activations of one block
    reward_path: int    # bytes that decoding and the rewards save for their backward
    frozen: int         # bytes of the VAE and the reward networks
    forward: int        # FLOP of one call of the transformer
    decode: int         # FLOP of one decoded picture
    reward: int         # FLOP of one picture's rewards
    shapes: list        # a `Shape` for every parameter of the transformer
    adapters: int       # parameters of adapters of rank 1
    multiplied: int     # parameters that --rollout-dtype fp8 multiplies in float8
    lean_path: int      # as reward_path, if `modes.is_lean`
    lean_frozen: int    # as frozen, if `modes.is_lean`
    rewards: "Rewards"  # the rewards' part of the last four

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


# ------------------------------------------------------------------------------------ on tensors without values
def create(config, dtype):
    """The diffusers module of a config, built in dtype, since fake tensors have no `to(dtype)`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return kind_of(config).from_config(config)
    finally:
        torch.set_default_dtype(before)


def forward(transformer, image_tokens, text_tokens, dtype):
    """One call of a family's transformer on zeros, for one image. Returns [1, image_tokens, C]."""
    config = transformer.config
    axes = len(config.axes_dims_rope)
    more = {}
    if "pooled_projection_dim" in config:
        more["pooled_projections"] = torch.zeros(1, config.pooled_projection_dim, dtype=dtype)
    return transformer(
        hidden_states=torch.zeros(1, image_tokens, config.in_channels, dtype=dtype),
        encoder_hidden_states=torch.zeros(1, text_tokens, config.joint_attention_dim, dtype=dtype),
        timestep=torch.zeros(1), guidance=torch.zeros(1) if config.guidance_embeds else None,
        img_ids=torch.zeros(image_tokens, axes), txt_ids=torch.zeros(text_tokens, axes), return_dict=False, **more)[0]


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


class MostAlive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and exist at the same time: `most`. known: parameters,
    which are not counted."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive = self.most = 0

    def __torch_dispatch__(self, op, types, arguments=(), named=None):
        made = op(*arguments, **(named or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor):
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage):
        """A storage that an operator returned: a new one is counted until it is freed."""
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.alive += storage.nbytes()
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, address, size):
        """A storage that is freed. Another one may get its address."""
        self.known.discard(address)
        self.alive -= size


def most_alive(network, run, *arguments):
    """The most bytes that run(*arguments) holds at a time, without a backward, and without the network's
    parameters."""
    with MostAlive(network.parameters()) as alive, torch.no_grad():
        run(*arguments)
    return alive.most


def saved_by_transformer(transformer, job, dtype):
    """(bytes of activations that one call for one image saves until its backward, bytes that the backward recomputes
    at a time)."""
    call = (forward, transformer, job.image_tokens, job.text_tokens, dtype)
    whole = saved_by(transformer.parameters(), *call)
    if not job.checkpointing:
        return whole, 0
    # Only the blocks' inputs are kept. The backward recomputes the activations of one block at a time.
    transformer.enable_gradient_checkpointing()
    return saved_by(transformer.parameters(), *call), whole / len(blocks_of(transformer))


def latents(vae, job, dtype):
    """What a VAE decodes to one picture: zeros [1, c, h, w]."""
    factor = 2 ** (len(job.vae["block_out_channels"]) - 1)  # it halves a picture between levels
    height, width = (side // factor for side in sides(job.size))
    return torch.zeros(1, vae.config.latent_channels, height, width, dtype=dtype)


def shapes_of(transformer):
    """([a `Shape` for every parameter], the number of parameters of the largest block)."""
    shapes = []
    for name, parameter in transformer.named_parameters():
        row = parameter.numel() // len(parameter)
        shapes.append(Shape(len(parameter), row, is_stored_so(name, parameter)))
    return shapes, max(parameters_of(block) for block in blocks_of(transformer))


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
        transformer = create(job.transformer, compute_dtype)
        once = flop_of(forward, transformer, job.image_tokens, job.text_tokens, compute_dtype)
        saved, recomputed = saved_by_transformer(transformer, job, compute_dtype)

        vae = create(job.vae, compute_dtype).requires_grad_(False)
        z = latents(vae, job, compute_dtype).requires_grad_()
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
            of_reward = 0
            if times:  # a reward that is held out takes memory, but does not run in an update
                reward_flop += times * flop_of(call)
                of_reward = times * saved_by(network.parameters(), call, grad=True)
            mine = (bytes_of(network), of_reward, 2 * used, of_reward / wide)
            rewards = Rewards(*(one + other for one, other in zip(rewards, mine, strict=True)))
        frozen += rewards.frozen
        path += rewards.reward_path
        lean_frozen += rewards.lean_frozen
        lean_path += rewards.lean_path

        shapes, largest = shapes_of(transformer)
        layers = lora.layers_of(transformer).values()
        return Counts(parameters=parameters_of(transformer), largest_block=largest, saved=saved,
                      recomputed=recomputed, reward_path=path, frozen=frozen, forward=once, decode=decode_flop,
                      reward=reward_flop,
                      shapes=shapes, adapters=sum(layer.in_features + layer.out_features for layer in layers),
                      multiplied=sum(layer.weight.numel() for layer in layers),
                      lean_path=lean_path, lean_frozen=lean_frozen, rewards=rewards)
