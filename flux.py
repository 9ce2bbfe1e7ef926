"""FLUX.1 as this project uses it: load, encode prompts, velocity, roll out, decode.

A model is a folder in FLUX.1-dev's layout, or a hub id: the miniature and FLUX.1-dev take the same path
through this file. Every constant (patch, channels, VAE factor, scaling, shift, token length) comes from the
model's own config.

Shapes: B images, N image tokens, L text tokens; C = 64 channels a token (2 x 2 latents of 16 channels).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from huggingface_hub import snapshot_download

from direct_align import sigma_steps
from engine import configs as con
from engine import lora, model_folder, parallel, text, trained
from engine.cache import OFF
from engine.contents import known_digest
from engine.errors import NotFinite, UserError, one_line
from engine.files import not_a_path, quiet
from engine.finite import are_finite, weights_are_finite

PATCH = 2  # a token is 2 x 2 latents: fixed by the FLUX pipeline, stored in no config
MOST_PIXELS = 2**14  # a side: what a slip of the hand could ask for beyond that fits no machine


# ------------------------------------------------------------------------------------------- a model's folder
def check_folder(model):
    """Raise UserError if `model` is a local path without a FLUX.1 in it; a hub id passes."""
    why = not_a_path(model)
    if why:
        raise UserError(f'--model "{str(model)[:80]}": must be a path or a hub id, and it {why}')
    path = Path(model)
    if not path.exists():
        if str(model).count("/") == 1 and not str(model).startswith((".", "/")):
            return
        raise UserError(f"--model {model}: no such folder (give a folder in FLUX.1-dev's layout, or a "
                        f"hub id such as black-forest-labs/FLUX.1-dev)")
    model_folder.check_parts(path)


def configs(model):
    """The `Configs` of a model's folder, all of which are checked; of a hub id, what is known of it, or else
    FLUX.1-dev's, so that nothing need be downloaded. Raises UserError."""
    folder = Path(model)
    if folder.exists():
        return model_folder.read_configs(folder, PATCH)
    return model_folder.KNOWN.get(model, model_folder.FLUX_DEV)


def defaults_of(flags):
    """The flags' defaults that suit flags.model: what its configs say, under srpo.json, which its folder may
    carry: (the path of that, {flag: value}). Raises UserError for what it may not say."""
    check_folder(flags.model)
    path, own = model_folder.own_flags(flags.model)
    return path, suited(flags.model) | own


def suited(model):
    """The flags that a model's configs say, where they are not FLUX.1-dev's: {flag: value}."""
    try:
        found = configs(model)
    except UserError:
        return {}  # said where the model is checked
    return model_folder.suited(found, pixels_per_token(found.vae))


def notes(model, flags):
    """What a model's configs decided of the flags (a dict), or what had to be guessed: a list of lines."""
    return model_folder.notes(model, suited(model), flags)


def pixels_per_token(vae_config):
    """Side of the square of pixels behind one token: VAE factor x patch, 16."""
    return PATCH * 2 ** (len(vae_config["block_out_channels"]) - 1)


def token_grid(vae_config, height, width):
    """(rows, columns) of tokens of a picture. Raises UserError for a size that the model cannot make."""
    unit = pixels_per_token(vae_config)
    if height % unit or width % unit or height < unit or width < unit:
        raise UserError(f"--size {width} x {height}: both sides must be multiples of {unit} pixels for "
                        f"this model")
    if max(height, width) > MOST_PIXELS:
        raise UserError(f"--size {width} x {height}: {MOST_PIXELS} pixels a side are the most")
    return height // unit, width // unit


def check_size(model, side):
    """Raise UserError if a model cannot make pictures of side x side pixels; read from its VAE's config."""
    check_folder(model)
    token_grid(configs(model).vae, side, side)


def is_full_size(model):
    """Whether a model is one of billions of parameters, as all are that are not on this machine yet."""
    size = sum(f.stat().st_size for f in Path(model).glob("transformer/*.safetensors"))
    return not Path(model).exists() or size > 4e9


def needs_gpu(model):
    """Raise UserError for a full-size model on a machine without a GPU."""
    if is_full_size(model) and not torch.cuda.is_available():
        raise UserError(f"--model {model} needs a GPU and there is none; what works here: --model miniature")


def here(model, *parts):
    """The model's folder on this machine: itself, or what the hub gives of these parts, fetched now."""
    if Path(model).exists():
        return Path(model)
    return Path(snapshot_download(model, allow_patterns=[f"{part}/*" for part in parts]))


def files_of(model, weights=None):
    """The folders of all parts of a model that are read: trained weights, unless they are a LoRA, take the
    place of its transformer."""
    parts = list(model_folder.PARTS)
    if trained.is_full(weights):
        parts.remove("transformer")
    folder = here(model, *parts)
    return [folder / part for part in parts]


def cannot_load(model, error):
    """The UserError for a model whose files cannot be read or fetched."""
    hub = "" if Path(model).exists() else " (on the hub: is its licence accepted, and `hf auth login` done?)"
    return UserError(f"--model {model}: cannot be loaded as FLUX.1: {one_line(error)}{hub}")


def config_folder(model):
    """The folder of a model's transformer, of a hub id with nothing but its config. Raises UserError."""
    if Path(model).exists():
        return Path(model) / "transformer"
    try:
        return Path(snapshot_download(model, allow_patterns=["transformer/config.json"])) / "transformer"
    except Exception as error:
        raise cannot_load(model, error) from error


def check_weights(model, weights, rank=None):
    """Raise UserError if --weights are none for this model; or a LoRA that adapters of a rank, if one is
    given, cannot go on with."""
    if weights is not None:
        trained.check(weights, config_folder(model), rank)


# ------------------------------------------------------------------------------------------------ the network
class Condition(NamedTuple):
    """What the network is told beside x_t and sigma: txt [B, L, D] from T5, pooled [B, D'] from CLIP, and the
    picture's shape, grid (rows, columns) of tokens."""
    txt: torch.Tensor
    pooled: torch.Tensor
    grid: tuple

    def rows(self, rows):
        """The same for some of the prompts."""
        return Condition(self.txt[rows], self.pooled[rows], self.grid)


def euler(x, v, s, s_next):
    """An Euler step of x [B, N, C] along its velocity v, from the noise level s to s_next."""
    return x + (s_next - s) * v


class ExactTimes:
    """Hands the time embedding 1000 sigma and 1000 guidance in float32.

    FluxTransformer2DModel casts both to the type that it computes in, and bf16 would round them to multiples
    of 4. This hook sits on `time_text_embed` from the day the network is loaded, and passes on, once, the two
    numbers that a call left here.
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
    """The two networks of FLUX.1 that training and sampling touch, and what their configs say."""
    transformer: torch.nn.Module  # FluxTransformer2DModel, sharded or not
    vae: torch.nn.Module          # AutoencoderKL, frozen
    scheduler: dict
    device: torch.device
    dtype: torch.dtype            # of the computation; the parameters may be float32 masters
    seconds_in_rollout: float = 0.0  # counted by `rollout`, for the log

    def __post_init__(self):
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

    def velocity(self, x_t, sigma, c, guidance):
        """v_theta(x_t, sigma, c) = eps - x0, as FLUX predicts it.

        x_t [B, N, C]; sigma [B] or a number, in [0, 1]; c a `Condition` of B prompts; guidance a number (3.5
        is FLUX.1-dev's own; ignored by models without a guidance embedding). Returns [B, N, C] float32.
        """
        b = len(x_t)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(b)
        guidance = torch.as_tensor(guidance, dtype=torch.float32, device=self.device).expand(b)
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
    def rollout(self, start, c, sigmas, guidance, step=euler):
        """Noise to clean latents by Euler steps, x <- x + (s_next - s) v(x, s), without gradient; or by
        another `step`(x, v, s, s_next).

        start [B, N, C] standard normal; sigmas [S + 1] from 1 to 0, or to where it is to stop. Returns x
        [B, N, C] float32. On many GPUs the parameters are gathered once, not at every step.
        """
        began = parallel.clock(self.device)
        x = start.to(self.device)
        with parallel.gathered(self.transformer):
            for s, s_next in pairwise(sigmas.tolist()):
                x = step(x, self.velocity(x, s, c, guidance), s, s_next)
        self.seconds_in_rollout += parallel.clock(self.device) - began
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
def load(model, weights=None, device="cpu", dtype=torch.float32, world=None, layout=None):
    """A `Flux` from a folder or hub id; `weights`, a folder or a single file, are used instead of the
    transformer's own, and a LoRA beside them: read into adapters of its rank, if the layout has any, or else
    merged. A `parallel.World` shards the transformer over its mesh, for training. The VAE is frozen. Every
    tensor of both networks must be in the files, and the files hold no other.

    Raises UserError if the folder is not a FLUX.1.
    """
    quiet()
    check_folder(model)
    check_weights(model, weights, None if layout is None else layout.lora)
    try:
        folder = here(model, "vae", "scheduler")
        if trained.is_full(weights):
            place, file = trained.places(weights, config_folder(model))
        else:
            place, file = here(model, "transformer") / "transformer", None
        transformer = parallel.load_sharded(diffusers.FluxTransformer2DModel, place, device, dtype, world,
                                            layout, file)
        vae = con.strict(diffusers.AutoencoderKL, folder / "vae", dtype, use_safetensors=True)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler")
    except Exception as error:
        raise cannot_load(model, error) from error
    if vae.config.shift_factor is None:
        vae.register_to_config(shift_factor=0.0)
    if weights is not None and lora.is_lora(weights):
        take = lora.load_into if lora.adapters(transformer) else lora.merge_into
        take(transformer, weights)
    if not weights_are_finite(transformer.parameters(), world):
        whose = f"--model {model}" if weights is None else f"--weights {weights}"
        raise UserError(f"{whose}: its weights hold numbers that are not finite")
    if not are_finite(vae.parameters()):
        raise UserError(f"--model {model}: its VAE holds numbers that are not finite")
    return Flux(transformer, vae.to(device), dict(scheduler), torch.device(device), dtype)


class Embeddings(NamedTuple):
    """P prompts as the network reads them: txt [P, L, D], pooled [P, D'], on the CPU; `truncated` counts the
    prompts that are longer than the L tokens of the T5 encoder (512 for FLUX.1-dev)."""
    txt: torch.Tensor
    pooled: torch.Tensor
    truncated: int

    def part(self, first, last):
        """The embeddings of prompts first .. last - 1."""
        return Embeddings(self.txt[first:last], self.pooled[first:last], self.truncated)

    def condition(self, rows, grid, device):
        """The `Condition` of some rows, moved to the device."""
        return Condition(self.txt[rows].to(device), self.pooled[rows].to(device), grid)


def of_vae(model, device, dtype, cache):
    """What latents depend on beside their picture: a list."""
    digest = known_digest([here(model, "vae") / "vae"], cache)
    return [digest, str(dtype), torch.device(device).type]


def encode_prompts(model, prompts, device="cpu", dtype=torch.float32, cache=OFF):
    """The `Embeddings` of all prompts, through both text encoders or out of a `Cache`.

    Raises UserError if an encoder or its tokenizer cannot be loaded whole, or makes what is not finite.
    """
    quiet()
    check_folder(model)
    try:
        folder = here(model, *text.PARTS)
        found = text.embeddings(folder, prompts, configs(model).text_tokens, device, dtype, cache)
    except Exception as error:
        raise cannot_load(model, error) from error
    each = [found[prompt] for prompt in prompts]
    return Embeddings(torch.stack([one["txt"] for one in each]), torch.stack([one["pooled"] for one in each]),
                      sum(bool(one["truncated"]) for one in each))


# --------------------------------------------------------------------------------------------------- sampling
def noise(flux, grid, seeds):
    """Initial noise of the samples, one per seed: [B, N, C] float32, the same whatever the batch it is made
    in."""
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
