"""FLUX.1 as this project uses it: the network. Velocity, rollout, decode, encode, sample; loading.

The miniature and FLUX.1-dev take the same path through this file. Every constant (channels, VAE factor, scaling,
shift, token length) comes from the model's own config, which engine/model/folder.py has read and checked.

Shapes: B images, N image tokens, L text tokens; C = 64 channels a token (2 x 2 latents of 16 channels).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import diffusers
import torch

from direct_align import sigma_steps
from engine.data.cache import OFF
from engine.errors import NotFinite, UserError
from engine.hub import quiet
from engine.memory import parallel
from engine.model import configs, float8, lora, tensor_files, text, trained
from engine.model.folder import PATCH, token_grid
from engine.model.tensors import are_finite
from engine.run.finite import weights_are_finite


# ------------------------------------------------------------------------------------------------ the network
class Condition(NamedTuple):
    """What the network gets beside x_t and sigma: txt [B, L, D] from T5, pooled [B, D'] from CLIP, and the picture's
    shape in tokens, grid (rows, columns)."""
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


class ExactTimes:
    """Hands the time embedding 1000 sigma and 1000 guidance in float32.

    FluxTransformer2DModel casts both to the dtype that it computes in. bf16 would round them to multiples of 4.
    So `Flux.velocity` leaves the exact numbers in `scales`, and a hook on `time_text_embed` passes them on once.
    """

    def __init__(self, transformer):
        self.scales = None
        transformer.time_text_embed.register_forward_pre_hook(self.replace)

    def replace(self, module, arguments):
        """The hook: what time_text_embed is called with, in place of what diffusers passes."""
        if self.scales is None:
            return arguments
        exact = [1000 * scale for scale in self.scales]
        self.scales = None
        return (*exact, arguments[-1])  # the last one is the pooled text


@dataclass
class Flux:
    """The two networks of FLUX.1 that training and sampling use, and the scheduler's config."""
    transformer: torch.nn.Module  # FluxTransformer2DModel, sharded or not
    vae: torch.nn.Module          # AutoencoderKL, frozen
    scheduler: dict
    device: torch.device
    dtype: torch.dtype            # of the computation; the parameters may be float32 masters

    def __post_init__(self):
        self.rollouts = []  # (beginning, end) of every rollout, `parallel.mark`s, for the log
        if self.transformer is not None:
            self.exact_times = ExactTimes(self.transformer)

    def grid(self, height, width):
        """(rows, columns) of tokens of a picture of height x width pixels; N = rows x columns."""
        return token_grid(self.vae.config, height, width)

    def shift(self, n_tokens):
        """The model's own time shift: exp(mu) with mu linear in the tokens, as FluxPipeline samples (4096
        tokens of FLUX.1-dev: 3.16). The released code trains with a fixed 3."""
        c = self.scheduler
        if not c.get("use_dynamic_shifting"):
            return c.get("shift", 1.0)
        slope = (c["max_shift"] - c["base_shift"]) / (c["max_image_seq_len"] - c["base_image_seq_len"])
        return math.exp(c["base_shift"] + slope * (n_tokens - c["base_image_seq_len"]))

    def numbers(self, value, b):
        """A number or a tensor, [b] or [], as float32 [b] on the device. A number is made there, and not copied."""
        if not torch.is_tensor(value):
            return torch.full((b,), float(value), device=self.device)
        return value.to(self.device, torch.float32).expand(b)

    def velocity(self, x_t, sigma, c, guidance):
        """v_theta(x_t, sigma, c) = eps - x0, as FLUX predicts it.

        x_t [B, N, C]; sigma [B] or a number, in [0, 1]; c a `Condition` of B prompts; guidance a number (3.5
        is FLUX.1-dev's own; ignored by models without a guidance embedding). Returns [B, N, C] float32.
        """
        b = len(x_t)
        sigma = self.numbers(sigma, b)
        guidance = self.numbers(guidance, b)
        if not self.transformer.config.guidance_embeds:
            guidance = None
        self.exact_times.scales = [sigma] if guidance is None else [sigma, guidance]
        return self.transformer(
            hidden_states=x_t.to(self.dtype), timestep=sigma, guidance=guidance,
            encoder_hidden_states=c.txt.to(self.dtype), pooled_projections=c.pooled.to(self.dtype),
            img_ids=image_ids(c.grid, self.device),
            txt_ids=torch.zeros(c.txt.shape[1], 3, device=self.device),
            return_dict=False)[0].float()

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

    def decode(self, x, grid):
        """Packed latents [B, N, C] -> images [B, 3, H, W] in [0, 1], with gradient."""
        config = self.vae.config
        z = unpack(x, grid) / config.scaling_factor + config.shift_factor
        return (self.vae.decode(z.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images):
        """Images [B, 3, H, W] in [0, 1] -> packed latents [B, N, C] float32, without gradient: the mean of
        what the VAE's encoder gives, scaled as the transformer knows it. The inverse of `decode`."""
        config = self.vae.config
        images = (2 * images - 1).to(self.device, self.vae.dtype)
        z = self.vae.encode(images).latent_dist.mode().float()  # [B, c, h, w]
        return pack((z - config.shift_factor) * config.scaling_factor)


def image_ids(grid, device):
    """FLUX's position of every image token: [N, 3] float32, (0, row, column)."""
    rows, columns = grid
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    return torch.stack([torch.zeros_like(row), row, column], -1).float()


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
    return tensor_files.is_full_size(trained.kind(), model.configs.transformer)


def needs_gpu(model):
    """Raise UserError for a full-size model on a machine without a GPU."""
    if not torch.cuda.is_available() and is_full_size(model):
        raise UserError(f"--model {model.name} needs a GPU and there is none; what works here: --model miniature")


def load(model, weights=None, device="cpu", dtype=torch.float32, world=None, layout=None, strength=1.0):
    """A `Flux` of a `Model` whose files are on this machine.

    weights: a folder or a file that replaces the transformer's own weights, or a LoRA. A LoRA is read into the adapters
    of the `layouts.Layout`, if it has any, and is merged otherwise; `strength` is its factor. world: a
    `parallel.World`, over whose mesh the transformer is sharded for training. The VAE is frozen. Raises UserError if a
    tensor is missing in the files, or is not the network's.
    """
    quiet()
    trained.check(weights, model, None if layout is None else layout.lora)
    try:
        source = trained.source(weights, model)
        transformer = parallel.load_sharded(trained.kind(), source, device, dtype, world, layout)
        vae = configs.strict(diffusers.AutoencoderKL, model.part("vae"), dtype, use_safetensors=True, checked=True)
    except Exception as error:
        raise model.cannot_load(error) from error
    if vae.config.shift_factor is None:
        vae.register_to_config(shift_factor=0.0)
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
    return Flux(transformer, vae.to(device), model.configs.scheduler, torch.device(device), dtype)


class Embeddings(NamedTuple):
    """P prompts as the network reads them: txt [P, L, D], pooled [P, D'], on the CPU; `truncated` counts the prompts
    that are longer than the L tokens of the T5 encoder (512 for FLUX.1-dev), and `which` has their numbers."""
    txt: torch.Tensor
    pooled: torch.Tensor
    truncated: int
    which: tuple = ()

    def part(self, first, last):
        """The embeddings of prompts first .. last - 1."""
        which = tuple(n - first for n in self.which if first <= n < last)
        return Embeddings(self.txt[first:last], self.pooled[first:last], len(which), which)

    def condition(self, rows, grid, device):
        """The `Condition` of some rows, moved to the device."""
        return Condition(parallel.moved(self.txt[rows], device), parallel.moved(self.pooled[rows], device), grid)


def encode_prompts(model, prompts, device="cpu", dtype=torch.float32, cache=OFF):
    """The `Embeddings` of all prompts, through both text encoders of a `Model` or out of a `Cache`.

    Raises UserError if an encoder or its tokenizer cannot be loaded whole, or makes what is not finite.
    """
    quiet()
    try:
        found = text.embeddings(model, prompts, device, dtype, cache)
    except Exception as error:
        raise model.cannot_load(error) from error
    each = [found[prompt] for prompt in prompts]
    which = tuple(n for n, one in enumerate(each) if one["truncated"])
    return Embeddings(torch.stack([one["txt"] for one in each]), torch.stack([one["pooled"] for one in each]),
                      len(which), which)


# --------------------------------------------------------------------------------------------------- sampling
def noise(flux, grid, seeds):
    """Initial noise of the samples, one per seed: [B, N, C] float32. It does not depend on the batch."""
    shape = (grid[0] * grid[1], flux.transformer.config.in_channels)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def sample(flux, txt, pooled, start, grid, steps, guidance, batch=64, progress=list):
    """Pictures of P prompts, as FluxPipeline makes them (the model's own time shift): images [P, 3, H, W]
    in [0, 1], on the CPU. Raises NotFinite.

    txt [P, L, D], pooled [P, D'], start [P, N, C]; `progress` may wrap the list of batches in a progress bar.
    """
    sigmas = sigma_steps(steps, flux.shift(start.shape[1]))
    images = []
    for rows in progress(torch.arange(len(start)).split(batch)):
        c = Condition(txt[rows].to(flux.device), pooled[rows].to(flux.device), grid)
        x0 = flux.rollout(start[rows], c, sigmas, guidance)
        image = flux.decode(x0, grid).cpu()
        if not image.isfinite().all():
            raise NotFinite("a sampled picture is not finite: the weights are broken")
        images.append(image)
    return torch.cat(images)
