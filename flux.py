"""FLUX.1 as this project uses it: load, encode prompts, velocity, roll out, decode.

A model is a folder in FLUX.1-dev's layout, or a hub id: the miniature and FLUX.1-dev take the same path
through this file. Every constant (patch, channels, VAE factor, scaling, shift, token length) comes from the
model's own config.

Shapes: B images, N image tokens, L text tokens; C = 64 channels a token (2 x 2 latents of 16 channels).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline,
                       FluxTransformer2DModel)
from huggingface_hub import hf_hub_download, snapshot_download

from engine import parallel
from direct_align import sigma_steps
from engine.files import one_line, quiet

PATCH = 2  # a token is 2 x 2 latents: fixed by the FLUX pipeline, stored in no config
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def check_folder(model):
    """Raise ValueError with one line if `model` is a local path without a FLUX.1 in it; a hub id passes."""
    path = Path(model)
    if not path.exists():
        if str(model).count("/") == 1 and not str(model).startswith((".", "/")):
            return
        raise ValueError(f"--model {model}: no such folder (give a folder in FLUX.1-dev's layout, or a "
                         f"hub id such as black-forest-labs/FLUX.1-dev)")
    missing = [p for p in ("model_index.json", *PARTS) if not (path / p).exists()]
    if missing:
        raise ValueError(f"--model {model}: not a FLUX.1 folder, it has no {', '.join(missing)}")
    index = json.loads((path / "model_index.json").read_text())
    if index.get("_class_name") != "FluxPipeline":
        raise ValueError(f"--model {model}: model_index.json says {index.get('_class_name')}, "
                         f"not FluxPipeline")


def pixels_per_token(vae_config):
    """Side of the square of pixels behind one token: VAE factor x patch, 16."""
    return PATCH * 2 ** (len(vae_config["block_out_channels"]) - 1)


def token_grid(vae_config, height, width):
    """(rows, columns) of tokens of a picture; ValueError, one line, for a size that the model cannot make."""
    unit = pixels_per_token(vae_config)
    if height % unit or width % unit or height < unit or width < unit:
        raise ValueError(f"size {width} x {height}: both sides must be multiples of {unit} pixels for "
                         f"this model")
    return height // unit, width // unit


def check_size(model, side):
    """ValueError, one line, if a model (a folder or a hub id) cannot make pictures of side x side pixels:
    read from its VAE's config, before anything is loaded."""
    quiet()
    check_folder(model)
    try:
        config = AutoencoderKL.load_config(model, subfolder="vae")
    except Exception as error:
        raise cannot_load(model, error) from error
    token_grid(config, side, side)


@dataclass
class Flux:
    """The two networks of FLUX.1 that training and sampling touch, and what their configs say."""
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    scheduler: dict
    device: torch.device
    dtype: torch.dtype  # of the computation; the transformer's parameters may be float32 masters

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


def transformer_folder(model, weights=None):
    """Where the transformer's files are: `weights`, the model folder's, or the hub's, fetched now."""
    if weights and not (Path(weights) / "config.json").exists():
        raise ValueError(f"--weights {weights}: no transformer there (a folder with config.json and "
                         f"safetensors, such as runs/miniature/weights)")
    if weights or Path(model).exists():
        return Path(weights or Path(model) / "transformer")
    return Path(snapshot_download(model, allow_patterns="transformer/*")) / "transformer"


def cannot_load(model, error):
    """The ValueError, one line, for a model whose files cannot be read or fetched."""
    hub = "" if Path(model).exists() else " (on the hub: is its licence accepted, and `hf auth login` done?)"
    return ValueError(f"--model {model}: cannot be loaded as FLUX.1: {one_line(error)}{hub}")


def load(model, weights=None, device="cpu", dtype=torch.float32, world=None):
    """A `Flux` from a folder or hub id; `weights` is a folder of trained transformer weights to use instead
    of the model's own; a `parallel.World` shards the transformer over its mesh, for training. The VAE is
    frozen.

    Raises ValueError with one line if the folder is not a FLUX.1.
    """
    quiet()
    check_folder(model)
    try:
        transformer = parallel.load_transformer(transformer_folder(model, weights), device, dtype, world)
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae", dtype=dtype)
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(model, subfolder="scheduler")
    except ValueError:
        raise
    except Exception as error:
        raise cannot_load(model, error) from error
    return Flux(transformer, vae.to(device).eval().requires_grad_(False), dict(scheduler),
                device, dtype)


@torch.no_grad()
def encode_prompts(model, prompts, device="cpu", dtype=torch.float32, batch=64):
    """All prompts through both text encoders, once; the encoders are freed on return.

    Returns (txt [P, L, D] from T5, pooled [P, D'] from CLIP, cut): `cut` counts the prompts longer than the
    T5 encoder's L tokens (512 for FLUX.1-dev, from its tokenizer), whose end is not seen. The embeddings stay
    on the CPU.
    """
    quiet()
    check_folder(model)
    try:
        pipe = FluxPipeline.from_pretrained(model, transformer=None, vae=None, dtype=dtype).to(device)
    except Exception as error:
        raise cannot_load(model, error) from error
    length = pipe.tokenizer_2.model_max_length
    cut = sum(len(ids) > length for ids in pipe.tokenizer_2(prompts).input_ids)
    parts = [[t.cpu() for t in pipe.encode_prompt(prompts[i:i + batch], max_sequence_length=length)[:2]]
             for i in range(0, len(prompts), batch)]
    txt, pooled = (torch.cat([p[j] for p in parts]) for j in (0, 1))
    return txt, pooled, cut


def pack(z):
    """Latents [B, c, h, w] -> tokens [B, (h/2)(w/2), 4c]: each token 2 x 2 latents, channel-major inside."""
    b, c, h, w = z.shape
    z = z.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return z.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // PATCH**2, c * PATCH**2)


def unpack(x, grid):
    """Tokens [B, rows columns, 4c] -> latents [B, c, 2 rows, 2 columns]: the inverse of `pack`."""
    (b, _, c), (rows, columns) = x.shape, grid
    x = x.view(b, rows, columns, c // PATCH**2, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c // PATCH**2, rows * PATCH, columns * PATCH)


def velocity(transformer, x_t, sigma, txt, pooled, guidance, grid):
    """v_theta(x_t, sigma, c) = eps - x0, as FLUX predicts it.

    x_t [B, N, C]; sigma [B] or a number, in [0, 1]; txt [B, L, D]; pooled [B, D']; guidance a number (3.5 is
    FLUX.1-dev's own; ignored by models without a guidance embedding); grid (rows, columns). Returns
    [B, N, C]. The time embedding gets 1000 sigma in float32: in bf16, diffusers would round it to a multiple
    of 4.
    """
    b, (rows, columns) = len(x_t), grid
    row, column = torch.arange(rows, device=x_t.device), torch.arange(columns, device=x_t.device)
    img_ids = torch.stack([torch.zeros(rows * columns, device=x_t.device),
                           row.repeat_interleave(columns).float(),
                           column.repeat(rows).float()], -1)  # [N, 3]: (0, row, column)
    full = lambda value: torch.as_tensor(value, dtype=torch.float32, device=x_t.device).expand(b)
    scales = [full(sigma), full(guidance)] if transformer.config.guidance_embeds else [full(sigma)]
    exact = lambda module, args: (*(1000 * s for s in scales), args[-1])
    hook = transformer.time_text_embed.register_forward_pre_hook(exact)
    try:
        return transformer(
            hidden_states=x_t, timestep=scales[0], guidance=scales[1] if len(scales) > 1 else None,
            encoder_hidden_states=txt, pooled_projections=pooled, img_ids=img_ids,
            txt_ids=torch.zeros(txt.shape[1], 3, device=x_t.device), return_dict=False)[0]
    finally:
        hook.remove()


def rollout(v, eps, sigmas):
    """Noise to clean latent, by Euler steps:  x <- x + (s_next - s) v(x, s).

    v(x, s) the velocity [B, N, C] of x at noise level s (a float); eps [B, N, C]; sigmas [S + 1] from 1 to 0.
    """
    x, levels = eps, sigmas.tolist()
    for s, s_next in zip(levels, levels[1:]):
        x = x + (s_next - s) * v(x, s)
    return x


def decode(vae, x, grid):
    """Packed latents [B, N, C] -> images [B, 3, H, W] in [0, 1], with gradient."""
    z = unpack(x, grid) / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


def noise(flux, grid, seeds):
    """Initial noise of the samples, one per seed: [B, N, C] float32, the same whatever the batch it is made
    in."""
    shape = (grid[0] * grid[1], flux.transformer.config.in_channels)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def sample(flux, txt, pooled, eps, grid, steps, guidance, batch=64, progress=lambda parts: parts):
    """Pictures of P prompts, as FluxPipeline makes them (the model's own time shift): images [P, 3, H, W]
    in [0, 1].

    txt [P, L, D], pooled [P, D'], eps [P, N, C]; `progress` may wrap the list of batches in a progress bar.
    """
    sigmas = sigma_steps(steps, flux.shift(eps.shape[1]))
    images = []
    for rows in progress(list(torch.arange(len(eps)).split(batch))):
        t, p = (a[rows].to(flux.device, flux.dtype) for a in (txt, pooled))
        v = lambda x, s: velocity(flux.transformer, x.to(flux.dtype), s, t, p, guidance, grid).float()
        x = rollout(v, eps[rows].to(flux.device), sigmas)
        images.append(decode(flux.vae, x, grid).cpu())
    return torch.cat(images)


# --------------------------------------------------------------------- what the scripts of this project share
# name: (dataset on the hub, files); the paper trains on the one and evaluates on the other (4.1, 4.2)
PROMPTS = {
    "hpdv2": ("ymhao/HPDv2", ["train.json"]),
    "hpdv2-benchmark": ("zhwang/HPDv2", [f"benchmark/{s}.json"
                                         for s in ("anime", "concept-art", "paintings", "photo")])}


def prompt_files(source, flag):
    """The local JSON files of a named set of PROMPTS, fetched from the hub, or of a folder, by name."""
    if source not in PROMPTS:
        return sorted(Path(source).glob("*.json"))
    dataset, files = PROMPTS[source]
    quiet()
    try:
        return [Path(hf_hub_download(dataset, f, repo_type="dataset")) for f in files]
    except Exception as error:
        raise ValueError(f"{flag} {source}: {dataset} cannot be fetched ({type(error).__name__}); give a "
                         f"text file, one prompt a line, or a folder of its .json files") from error


def read_prompts_by_category(source, flag="--prompts"):
    """[(prompt, category)] of a UTF-8 text file, one prompt a line, blank lines left out, all of category "";
    of a folder of .json files, lists of prompts or of objects with a "prompt", a category each; or of a named
    set of PROMPTS, fetched from the hub. Raises ValueError with one line."""
    path = Path(source)
    if source in PROMPTS or path.is_dir():
        found = []
        for file in prompt_files(source, flag):
            try:
                texts = [entry if isinstance(entry, str) else entry["prompt"]
                         for entry in json.loads(file.read_text("utf-8"))]
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError
                found += [(text, file.stem) for text in texts]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{flag} {file}: not a JSON list of prompts") from error
        if not found:
            raise ValueError(f"{flag} {source}: no prompt in it (a folder of .json files, lists of prompts)")
        return found
    if not path.is_file():
        raise ValueError(f"{flag} {path}: no such file (a text file, one prompt a line), and not one of "
                         f"{', '.join(PROMPTS)}")
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not prompts:
        raise ValueError(f"{flag} {path}: no prompt in it, every line is blank")
    return [(prompt, "") for prompt in prompts]


def read_prompts(source, flag="--prompts"):
    """The prompts of `read_prompts_by_category`; of a named set, each once."""
    prompts = [prompt for prompt, _ in read_prompts_by_category(source, flag)]
    return list(dict.fromkeys(prompts)) if source in PROMPTS else prompts


def parse_flags(parser, recipes={}):
    """The command line, with ValueError for a mistake in it. A model folder may carry srpo.json: the flags'
    defaults that suit that model, paths relative to the folder. `recipes` are named sets of defaults, chosen
    by --recipe.

    Precedence: command line, recipe, srpo.json, the parser's own defaults.
    """
    def one_line(message):
        """What argparse prints with its usage, as the one line that the scripts print."""
        raise ValueError(message)
    parser.error = one_line
    first = parser.parse_known_args()[0]
    check_folder(first.model)
    own = Path(first.model) / "srpo.json"
    if own.exists():
        defaults = {k: v for k, v in json.loads(own.read_text()).items() if hasattr(first, k)}
        inside = {k: str(own.parent / v) for k, v in defaults.items()
                  if isinstance(v, str) and (own.parent / v).exists()}
        parser.set_defaults(**defaults | inside)
    parser.set_defaults(**recipes.get(getattr(first, "recipe", None), {}))
    return parser.parse_args()


def needs_gpu(model):
    """Raises ValueError for a full-size model on a machine without a GPU."""
    size = sum(f.stat().st_size for f in Path(model).glob("transformer/*.safetensors"))
    if not torch.cuda.is_available() and (not Path(model).exists() or size > 4e9):
        raise ValueError(f"--model {model} needs a GPU and there is none; what works here: --model miniature")


def pick_device(model):
    """(device, dtype) of one process: bf16 on a GPU, float32 on the CPU."""
    needs_gpu(model)
    return parallel.device_and_dtype()
