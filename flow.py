"""What FLUX.1 and FLUX.2-klein share: the network's class, classifier-free guidance, the rollout, loading, sampling.

flux.py and klein.py add what differs: the network's call, the latents, the time shift, the text. Every constant comes
from the model's own config, which engine/model/folder.py has read and checked.

Shapes: B images, N image tokens, L text tokens, C channels a token (2 x 2 latents).
"""

import importlib
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from direct_align import sigma_steps
from engine.data.cache import OFF
from engine.errors import NotFinite, UserError
from engine.hub import quiet
from engine.memory import parallel
from engine.model import configs, float8, lora, tensor_files, text, trained
from engine.model.folder import PATCH, token_grid
from engine.model.tensor_files import kind_of
from engine.model.tensors import are_finite
from engine.run.finite import weights_are_finite


# ------------------------------------------------------------------------------------------------ the network
class Condition(NamedTuple):
    """What the network gets beside x_t and sigma: txt [B, L, D], pooled [B, D'] (D' = 0 for a family without a pooled
    text), and the picture's shape in tokens, grid (rows, columns)."""
    txt: torch.Tensor
    pooled: torch.Tensor
    grid: tuple

    def rows(self, rows):
        """The same for some of the prompts."""
        return Condition(self.txt[rows], self.pooled[rows], self.grid)

    def times(self, k):
        """The same for all prompts, k times one after another."""
        return Condition(self.txt.repeat(k, 1, 1), self.pooled.repeat(k, 1), self.grid)


def euler(x, v, s, s_next):
    """An Euler step of x [B, N, C] along its velocity v, from the noise level s to s_next."""
    return x + (s_next - s) * v


class Guidance(NamedTuple):
    """Classifier-free guidance (CFG), for a model without a guidance embedding: two calls for one velocity.

    scale: g of `guided`. txt [L, D], pooled [D']: the empty prompt. keep_norm: as in `guided`. gradient: what a call
    with a gradient does:

    off     the prompt alone, g = 1
    both    guided, as without a gradient
    prompt  guided, but the empty prompt's call has no gradient
    """
    scale: float
    txt: torch.Tensor
    pooled: torch.Tensor
    gradient: str = "off"
    keep_norm: bool = False

    def empty(self, c):
        """The `Condition` of as many empty prompts as c has prompts."""
        b = len(c.txt)
        return Condition(self.txt.to(c.txt).expand(b, -1, -1), self.pooled.to(c.pooled).expand(b, -1), c.grid)


def guided(v, v_empty, g, keep_norm=False):
    """Classifier-free guidance (arXiv 2207.12598):  v_g = v_empty + g (v - v_empty).

    v, v_empty [B, N, C]: the velocity for the prompt, and for the empty prompt; g = 1 gives v. keep_norm: each token of
    v_g is scaled to the norm of the same token of v, as the authors' second recipe does. Returns [B, N, C].
    """
    v_g = v_empty + g * (v - v_empty)
    if keep_norm:
        v_g = v_g * (v.norm(dim=-1, keepdim=True) / v_g.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return v_g


class ExactTimes:
    """Passes 1000 sigma and 1000 guidance to the time embedding in float32.

    diffusers casts both to the dtype that the network computes in. bf16 would round them to multiples of 4. So
    `predict` puts the exact numbers into `scales`, and a hook on the module passes them on once.
    """

    def __init__(self, module):
        self.scales = None
        module.register_forward_pre_hook(self.replace)

    def replace(self, module, arguments):
        """The hook: what the module is called with, in place of what diffusers passes."""
        if self.scales is None:
            return arguments
        exact = [1000 * scale for scale in self.scales]
        self.scales = None
        return (*exact, *arguments[len(exact):])


@dataclass
class Flow:
    """The two networks of a flow that training and sampling use, and the scheduler's config. A family adds `predict`,
    `shift`, `decode`, `encode`, `time_embedding`, `text_encoders` and `encode_text`."""
    transformer: torch.nn.Module  # sharded or not
    vae: torch.nn.Module          # frozen
    scheduler: dict
    device: torch.device
    dtype: torch.dtype            # of the computation; the parameters may be float32 masters
    guidance: Guidance = None     # None: one call for a velocity

    def __post_init__(self):
        self.branches_are_one_call = False  # see engine/memory/modes.py
        self.rollouts = []  # (beginning, end) of every rollout, `parallel.mark`s, for the log
        if self.transformer is not None:
            self.exact_times = ExactTimes(self.time_embedding())

    def grid(self, height, width):
        """(rows, columns) of tokens of a picture of height x width pixels; N = rows x columns."""
        return token_grid(self.vae.config, height, width)

    def numbers(self, value, b):
        """A number or a tensor, [b] or [], as float32 [b] on the device. A number is made there, and not copied."""
        if not torch.is_tensor(value):
            return torch.full((b,), float(value), device=self.device)
        return value.to(self.device, torch.float32).expand(b)

    def velocity(self, x_t, sigma, c, guidance):
        """v_theta(x_t, sigma, c) = eps - x0, as the network predicts it, or as `guided` makes it of two predictions.

        x_t [B, N, C]; sigma [B] or a number, in [0, 1]; c a `Condition` of B prompts; guidance a number (3.5 is
        FLUX.1-dev's own; ignored by models without a guidance embedding). Returns [B, N, C] float32.
        """
        cfg = self.guidance
        with_gradient = torch.is_grad_enabled()
        if cfg is None or (with_gradient and cfg.gradient == "off"):
            return self.predict(x_t, sigma, c, guidance)
        empty = cfg.empty(c)
        if with_gradient and cfg.gradient == "prompt":
            with torch.no_grad():
                v_empty = self.predict(x_t, sigma, empty, guidance)
            v = self.predict(x_t, sigma, c, guidance)
        else:  # both as one batch: the parameters are read, gathered or copied once
            b = len(x_t)
            twice = self.numbers(sigma, b).repeat(2)
            both = Condition(torch.cat([c.txt, empty.txt]), torch.cat([c.pooled, empty.pooled]), c.grid)
            v, v_empty = self.predict(torch.cat([x_t, x_t]), twice, both, guidance).split(b)
        return guided(v, v_empty, cfg.scale, cfg.keep_norm)

    def guide(self, scale, empty, gradient="off", keep_norm=False):
        """From now on velocities are guided, as `Guidance` says; with a scale of None or 1 they are not. empty: (txt,
        pooled) of the empty prompt, as `Embeddings` has it."""
        self.guidance = None if scale in (None, 1) else Guidance(scale, *empty, gradient, keep_norm)

    @torch.no_grad()
    def rollout(self, start, c, sigmas, guidance, step=euler, dtype="same"):
        """Noise to clean latents by Euler steps, x <- x + (s_next - s) v(x, s), without gradient; or by
        another `step`(x, v, s, s_next). dtype: "fp8" multiplies in float8 (engine/model/float8.py).

        start [B, N, C] standard normal; sigmas [S + 1] from 1 to 0, or to where it is to stop. Returns x
        [B, N, C] float32. On many GPUs the parameters are gathered once, not at every step.
        """
        began = parallel.mark(self.device)
        x = start.to(self.device)
        products = float8.products(self.transformer) if dtype == "fp8" else nullcontext()
        with parallel.gathered(self.transformer), products:
            for s, s_next in pairwise(sigmas.tolist()):
                x = step(x, self.velocity(x, s, c, guidance), s, s_next)
        self.rollouts.append((began, parallel.mark(self.device)))
        return x


def positions(grid, axes, device):
    """The position of every image token: [N, axes] float32, (0, row, column), and 0 on a fourth axis."""
    rows, columns = grid
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    zero = torch.zeros_like(row)
    return torch.stack([zero, row, column, zero][:axes], -1).float()


def pack(z):
    """Latents [B, c, h, w] -> tokens [B, (h/2)(w/2), 4c]: each token 2 x 2 latents, channel-major inside."""
    b, c, h, w = z.shape
    z = z.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)  # [B, c, rows, 2, columns, 2]
    return z.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // PATCH**2, c * PATCH**2)


def unpack(x, grid):
    """Tokens [B, rows columns, 4c] -> latents [B, c, 2 rows, 2 columns]: the inverse of `pack`."""
    b, _, c = x.shape
    rows, columns = grid
    x = x.view(b, rows, columns, c // PATCH**2, PATCH, PATCH)  # [B, rows, columns, c, 2, 2]
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c // PATCH**2, rows * PATCH, columns * PATCH)


# ---------------------------------------------------------------------------------------------------- loading
def is_full_size(model):
    """Whether a `Model` is one of billions of parameters, counted from its config."""
    config = model.configs.transformer
    return tensor_files.is_full_size(kind_of(config), config)


def needs_gpu(model):
    """Raise UserError for a full-size model on a machine without a GPU."""
    if not torch.cuda.is_available() and is_full_size(model):
        raise UserError(f"--model {model.name} needs a GPU and there is none; what works here: --model miniature")


def family_of(model):
    """The `Flow` class of a `Model`: `flux.Flux` or `klein.Klein`."""
    file, _, name = model.family.network.rpartition(".")
    return getattr(importlib.import_module(file), name)


def load(model, weights=None, device="cpu", dtype=torch.float32, world=None, layout=None, strength=1.0):
    """The `Flow` of a `Model` whose files are on this machine.

    weights: a folder or a file that replaces the transformer's own weights, or a LoRA. A LoRA is read into the adapters
    of the `layouts.Layout`, if it has any, and is merged otherwise; `strength` is its factor. world: a
    `parallel.World`, over whose mesh the transformer is sharded for training. The VAE is frozen. Raises UserError if a
    tensor is missing in the files, or is not the network's.
    """
    quiet()
    trained.check(weights, model, None if layout is None else layout.lora)
    try:
        source = trained.source(weights, model)
        transformer = parallel.load_sharded(kind_of(source.config), source, device, dtype, world, layout)
        vae = configs.strict(kind_of(model.configs.vae), model.part("vae"), dtype, use_safetensors=True, checked=True)
    except Exception as error:
        raise model.cannot_load(error) from error
    if weights is not None and not trained.is_full(weights):
        if lora.adapters(transformer):
            lora.load_into(transformer, trained.place_of(weights), strength)
        else:
            lora.merge_into(transformer, trained.place_of(weights), strength)
    if not weights_are_finite(transformer.parameters(), world):
        whose = f"--model {model.name}" if weights is None else f"--weights {weights}"
        raise UserError(f"{whose}: its weights hold numbers that are not finite")
    if not are_finite(vae.parameters()):
        raise UserError(f"--model {model.name}: its VAE holds numbers that are not finite")
    return family_of(model)(transformer, vae.to(device), model.configs.scheduler, torch.device(device), dtype)


class Embeddings(NamedTuple):
    """P prompts as the network reads them: txt [P, L, D], pooled [P, D'], on the CPU. truncated: how many prompts are
    longer than the L tokens of the text encoder (512 for FLUX.1-dev); which: their numbers. empty: (txt [L, D],
    pooled [D']) of the empty prompt, if the model takes classifier-free guidance."""
    txt: torch.Tensor
    pooled: torch.Tensor
    truncated: int
    which: tuple = ()
    empty: tuple = None

    def part(self, first, last):
        """The embeddings of prompts first .. last - 1."""
        which = tuple(n - first for n in self.which if first <= n < last)
        return Embeddings(self.txt[first:last], self.pooled[first:last], len(which), which, self.empty)

    def say_truncated(self, say, what="prompts"):
        """Say how many of them are truncated, if any. say: prints a line."""
        if self.truncated:
            say(f"{self.truncated} of {len(self.txt)} {what} are longer than the text encoder takes, and are truncated")

    def condition(self, rows, grid, device):
        """The `Condition` of some rows, moved to the device."""
        return Condition(parallel.moved(self.txt[rows], device), parallel.moved(self.pooled[rows], device), grid)


def encode_prompts(model, prompts, device="cpu", dtype=torch.float32, cache=OFF):
    """The `Embeddings` of all prompts, through the text encoders of a `Model` or out of a `Cache`.

    Raises UserError if an encoder or its tokenizer cannot be loaded whole, or makes what is not finite.
    """
    return stacked(model, prompts, encoded(model, prompts, device, dtype, cache))


def encode_here(model, prompts, world, cache=OFF):
    """The `Embeddings` of this process's prompts; None if it has none. All processes must call it.

    The first process of a machine encodes the prompts of all its processes, and hands them out. Otherwise each would
    load the text encoders, 9 GiB for FLUX.1-dev. Raises UserError as `encode_prompts`.
    """
    everyones = world.gather(prompts)
    here = everyones[world.rank - world.local:][:world.neighbours]

    def encode():
        """{prompt: its embedding} for each of these processes."""
        found = encoded(model, [prompt for theirs in here for prompt in theirs], world.device, world.dtype, cache)
        return [{prompt: found[prompt] for prompt in [*theirs, ""] if prompt in found} for theirs in here]

    mine = world.from_the_first_here(encode)
    return stacked(model, prompts, mine) if prompts else None


def encoded(model, prompts, device, dtype, cache):
    """{prompt: its `text.embedding`} of the prompts, and of the empty one if the model takes classifier-free guidance.
    Arguments and errors as in `encode_prompts`."""
    quiet()
    asked = [*prompts, ""] if model.configs.takes_cfg else prompts
    try:
        return text.embeddings(family_of(model), model, asked, device, dtype, cache)
    except Exception as error:
        raise model.cannot_load(error) from error


def stacked(model, prompts, found):
    """The `Embeddings` of prompts out of what `encoded` found."""
    each = [found[prompt] for prompt in prompts]
    which = tuple(n for n, one in enumerate(each) if one["truncated"])
    empty = (found[""]["txt"], found[""]["pooled"]) if model.configs.takes_cfg else None
    return Embeddings(torch.stack([one["txt"] for one in each]), torch.stack([one["pooled"] for one in each]),
                      len(which), which, empty)


# --------------------------------------------------------------------------------------------------- sampling
def noise(net, grid, seeds):
    """Initial noise of the samples, one per seed: [B, N, C] float32. It does not depend on the batch."""
    shape = (grid[0] * grid[1], net.transformer.config.in_channels)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def sample(net, txt, pooled, start, grid, steps, guidance, batch=64, progress=list):
    """Pictures of P prompts, as the family's pipeline makes them (the model's own time shift): images [P, 3, H, W]
    in [0, 1], on the CPU. Raises NotFinite.

    txt [P, L, D], pooled [P, D'], start [P, N, C]; `progress` may wrap the list of batches in a progress bar.
    """
    sigmas = sigma_steps(steps, net.shift(start.shape[1], steps))
    images = []
    for rows in progress(torch.arange(len(start)).split(batch)):
        c = Condition(txt[rows].to(net.device), pooled[rows].to(net.device), grid)
        x0 = net.rollout(start[rows], c, sigmas, guidance)
        image = net.decode(x0, grid).cpu()
        if not image.isfinite().all():
            raise NotFinite("a sampled picture is not finite: the weights are broken")
        images.append(image)
    return torch.cat(images)
