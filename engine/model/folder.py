"""`Model`: a FLUX.1 model, given by its folder or hub id, opened and checked once. It then knows its configs, its
parts, and the default flags that suit it. No weights are read here, and nothing needs torch."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download, snapshot_download

from engine.errors import UserError, one_line
from engine.files import read_json
from engine.hub import quiet
from engine.model import configs as con
from engine.model import own_flags
from engine.paths import not_a_path

PATCH = 2  # a token is 2 x 2 latents: the FLUX pipeline fixes this, no config stores it
MOST_PIXELS = 2**14  # a side; a larger picture fits no machine, so it is a typing mistake
INDEX = "model_index.json"
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
MOST_TOKENS = 512  # of a prompt: FluxPipeline's own limit
FEWEST_TOKENS = 8  # of a tokenizer's limit; below that no prompt fits
NO_LIMIT = int(1e30)  # what transformers writes for a tokenizer without a limit
SCHNELL_TOKENS = 256  # of a prompt: FluxPipeline's limit for FLUX.1-schnell, which no config states
SCRIPTS_OWN = 1024  # FLUX.1's sample_size, pixels a side; for such a VAE each script has its own default of --size
TEXTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # the parts that encode prompts

# The keys of the configs that this code computes with, and what they must be. The libraries check the others.
TRANSFORMER = {"_class_name": con.one_of("FluxTransformer2DModel"), "in_channels": con.WHOLE,
               "num_layers": con.WHOLE, "num_single_layers": con.WHOLE, "attention_head_dim": con.WHOLE,
               "num_attention_heads": con.WHOLE, "joint_attention_dim": con.WHOLE,
               "pooled_projection_dim": con.WHOLE, "guidance_embeds": con.FLAG}
OF_TRANSFORMER = {"axes_dims_rope": con.WHOLES, "patch_size": con.one_of(1)}  # may be left out
VAE = {"_class_name": con.one_of("AutoencoderKL"), "block_out_channels": con.WHOLES,
       "layers_per_block": con.WHOLE, "norm_num_groups": con.WHOLE, "act_fn": con.TEXT,
       "latent_channels": con.WHOLE, "in_channels": con.one_of(3), "out_channels": con.one_of(3),
       "scaling_factor": con.POSITIVE}
OF_VAE = {"shift_factor": con.NUMBER_OR_NULL}
CLIP = {"model_type": con.one_of("clip_text_model"), "hidden_size": con.WHOLE, "vocab_size": con.WHOLE,
        "max_position_embeddings": con.WHOLE, "num_attention_heads": con.WHOLE,
        "num_hidden_layers": con.WHOLE, "intermediate_size": con.WHOLE, "hidden_act": con.TEXT}
T5 = {"model_type": con.one_of("t5"), "d_model": con.WHOLE, "vocab_size": con.WHOLE, "num_heads": con.WHOLE,
      "d_kv": con.WHOLE, "d_ff": con.WHOLE, "num_layers": con.WHOLE, "feed_forward_proj": con.TEXT,
      "relative_attention_num_buckets": con.WHOLE}
SCHEDULER = {"_class_name": con.one_of("FlowMatchEulerDiscreteScheduler")}
DYNAMIC = {"base_shift": con.NUMBER, "max_shift": con.NUMBER, "base_image_seq_len": con.WHOLE,
           "max_image_seq_len": con.WHOLE}
# Only FLUX.1's own schedule of steps is implemented here, so options that would change it otherwise are refused.
OF_SCHEDULER = {"use_dynamic_shifting": con.FLAG, "shift": con.POSITIVE, "shift_terminal": con.one_of(None),
                "time_shift_type": con.one_of("exponential"), "invert_sigmas": con.one_of(False),
                "use_karras_sigmas": con.one_of(False), "use_exponential_sigmas": con.one_of(False),
                "use_beta_sigmas": con.one_of(False), "stochastic_sampling": con.one_of(False)}

class Configs(NamedTuple):
    """A model's configs, read before any weights. text_tokens: the most tokens of a prompt. text_parameters: of both
    text encoders, but for norms and biases."""
    transformer: dict
    vae: dict
    scheduler: dict
    text_tokens: int
    text_parameters: int

    @property
    def few_steps(self):
        """Whether the model was distilled to few steps, as FLUX.1-schnell was. It is if it has no guidance embedding,
        and its time shift does not depend on the picture's size."""
        static = not self.scheduler.get("use_dynamic_shifting", False)
        return not self.transformer["guidance_embeds"] and static


# -------------------------------------------------------------------------------------------- models by name
# The configs of known hub ids, so that nothing is downloaded for a plan, or to refuse --weights.
FLUX_VAE = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
            "latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
            "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024,
            "scaling_factor": 0.3611, "shift_factor": 0.1159}
FLUX_TRANSFORMER = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": 19,
                    "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
                    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True}
DYNAMIC_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
                 "max_image_seq_len": 4096, "shift": 3.0}
FLUX_TEXTS = 4_885_000_000  # T5 v1.1 XXL's encoder and CLIP ViT-L/14's text tower
FLUX_DEV = Configs(FLUX_TRANSFORMER, FLUX_VAE, DYNAMIC_SHIFT, MOST_TOKENS, FLUX_TEXTS)
FLUX_SCHNELL = Configs(FLUX_TRANSFORMER | {"guidance_embeds": False}, FLUX_VAE,
                       {"use_dynamic_shifting": False, "shift": 1.0}, SCHNELL_TOKENS, FLUX_TEXTS)
KNOWN = {"black-forest-labs/FLUX.1-dev": FLUX_DEV,
         "black-forest-labs/FLUX.1-Krea-dev": FLUX_DEV,
         "black-forest-labs/FLUX.1-schnell": FLUX_SCHNELL}


# --------------------------------------------------------------------------------------------------- the model
class Model:
    """A FLUX.1 model, opened and checked once. Functions take this object, not the model's name."""

    def __init__(self, name):
        """name: a folder or a hub id. A hub id must be in KNOWN, or its model_index.json must say FluxPipeline. For a
        hub id only configs are downloaded before `fetch`. Raises UserError."""
        self.name = str(name)
        why = not_a_path(name)
        if why:
            raise UserError(f'--model "{self.name[:80]}": must be a path or a hub id, and it {why}')
        self.folder = Path(name) if Path(name).exists() else None  # None: a hub id that is not fetched yet
        if self.folder is not None:
            self.configs = read_configs(self.folder, f"--model {name}")
        elif self.name in KNOWN:
            self.configs = KNOWN[self.name]
        else:
            self.folder = configs_of_unknown(self.name)
            self.configs = read_configs(self.folder, f"--model {name}")
        self.is_remote = not Path(name).exists()
        self.says = Path(name) / "srpo.json"  # the file of its default flags
        self.written = {} if self.is_remote else own_flags.read(self.says)

    @property
    def unit(self):
        """Pixels a side of one token: VAE factor x patch, 16 for FLUX.1."""
        return pixels_per_token(self.configs.vae)

    def grid(self, height, width):
        """(rows, columns) of tokens of a picture of so many pixels. Raises UserError if the model cannot make it."""
        return token_grid(self.configs.vae, height, width)

    def part(self, name):
        """The local folder of one of PARTS. For a hub id, call `fetch` first."""
        return self.folder / name

    def fetch(self, parts=PARTS):
        """Download some parts of a hub id, before any of them is loaded. Raises UserError."""
        if not self.is_remote:
            return
        quiet()
        try:
            self.folder = Path(snapshot_download(self.name, allow_patterns=[INDEX, *(f"{part}/*" for part in parts)]))
        except Exception as error:
            raise self.cannot_load(error) from error
        if set(parts) == set(PARTS):
            self.configs = read_configs(self.folder, f"--model {self.name}")
            return
        for part in parts:
            con.check_folder(self.part(part))

    def cannot_load(self, error):
        """The UserError for a model whose files cannot be read or fetched."""
        hub = " (on the hub: is its licence accepted, and `hf auth login` done?)" if self.is_remote else ""
        return UserError(f"--model {self.name}: cannot be loaded as FLUX.1: {one_line(error)}{hub}")

    def suited(self):
        """{flag: value} that its configs ask for; {} for FLUX.1-dev. A VAE for smaller pictures sets size; a model of
        few steps sets 4 steps and its own time shift."""
        found = {}
        side = self.configs.vae.get("sample_size")
        if type(side) is int and self.unit <= side < SCRIPTS_OWN:
            found["size"] = side // self.unit * self.unit
        if self.configs.few_steps:
            found |= {"rollout_steps": 4, "eval_steps": 4, "shift": None}
        return found

    def flags(self, kinds):
        """{flag: value} that suit the model: from its srpo.json, otherwise from its configs. kinds: {flag: `Kind`} of
        the flags that srpo.json may set. Raises UserError."""
        return self.suited() | own_flags.checked(self.says, self.written, kinds)

    def notes(self, flags):
        """A line for each of the flags (a dict) whose value its configs decided: a list."""
        lines = []
        for name, value in self.suited().items():
            if name not in self.written and name in flags and flags[name] == value:
                shown = "off" if value is None else value
                lines.append(f"--{name.replace('_', '-')} {shown}: what the configs of {self.name} say")
        return lines


def pixels_per_token(vae_config):
    """Pixels a side of one token: VAE factor x patch, 16 for FLUX.1."""
    return PATCH * 2 ** (len(vae_config["block_out_channels"]) - 1)


def token_grid(vae_config, height, width):
    """(rows, columns) of tokens of a picture of so many pixels. Raises UserError if the model cannot make it."""
    unit = pixels_per_token(vae_config)
    if height % unit or width % unit or height < unit or width < unit:
        raise UserError(f"--size {width} x {height}: both sides must be multiples of {unit} pixels for "
                        f"this model")
    if max(height, width) > MOST_PIXELS:
        raise UserError(f"--size {width} x {height}: at most {MOST_PIXELS} pixels a side")
    return height // unit, width // unit


def configs_of_unknown(name):
    """The folder with the configs of a hub id that is not in KNOWN. They are downloaded if its model_index.json says
    FluxPipeline. Raises UserError, which lists the known ids, if it says something else or cannot be downloaded."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"--model {name}: no such folder (give a folder in FLUX.1-dev's layout, or a hub id such as "
                        f"{next(iter(KNOWN))})")
    quiet()
    known = f"known are {', '.join(KNOWN)}, and folders in their layout"
    try:
        kind = read_json(hf_hub_download(name, INDEX)).get("_class_name")
    except Exception as error:
        raise UserError(f"--model {name}: not known here, and the hub gives no {INDEX} that says what it is "
                        f"({type(error).__name__}); {known}") from error
    if kind != "FluxPipeline":
        raise UserError(f"--model {name}: its {INDEX} says {kind}, but only FLUX.1 (FluxPipeline) is trained; {known}")
    try:
        return Path(snapshot_download(name, allow_patterns=[INDEX, "*/*.json", "*/spiece.model"]))
    except Exception as error:
        raise UserError(f"--model {name}: its configs cannot be fetched: {one_line(error)}; {known}") from error


# -------------------------------------------------------------------------------------------------- the parts
def read_configs(folder, whose):
    """The `Configs` of a folder. Each config is read once and checked, alone and against the others. whose: the model,
    for messages. Raises UserError if a part of a FLUX.1 model is missing, or belongs to another model."""
    missing = [part for part in (INDEX, *PARTS) if not (folder / part).exists()]
    if missing:
        raise UserError(f"{whose}: not a FLUX.1 folder, it has no {', '.join(missing)}")
    kind = con.check_config(folder / INDEX).get("_class_name")
    if kind != "FluxPipeline":
        raise UserError(f"{whose}: {INDEX} says {kind}, not FluxPipeline")
    read = {}  # {file: its config}
    for part in PARTS:
        read |= con.check_folder(folder / part)

    def checked(part, file, needed, optional=None):
        return con.fitting(folder / part / file, read, needed, optional)

    transformer = check_transformer(folder / "transformer", read)
    vae = checked("vae", "config.json", VAE, OF_VAE)
    clip = checked("text_encoder", "config.json", CLIP)
    t5 = checked("text_encoder_2", "config.json", T5)
    scheduler = check_scheduler(folder / "scheduler" / "scheduler_config.json", read)

    file = folder / "transformer" / "config.json"
    latents = PATCH**2 * vae["latent_channels"]
    must_fit(file, transformer, "in_channels", latents, "what the VAE's latents need")
    must_fit(file, transformer, "joint_attention_dim", t5["d_model"], "T5's d_model")
    must_fit(file, transformer, "pooled_projection_dim", clip["hidden_size"], "CLIP's hidden_size")
    if transformer.get("out_channels") is not None:
        must_fit(file, transformer, "out_channels", latents, "what the VAE's latents need")
    check_vocabulary(folder / "tokenizer", clip["max_position_embeddings"], read)
    found = Configs(transformer, vae, scheduler, check_vocabulary(folder / "tokenizer_2", MOST_TOKENS, read),
                    text_parameters(clip, t5))
    if found.few_steps:
        found = found._replace(text_tokens=min(found.text_tokens, SCHNELL_TOKENS))
    return found


def text_parameters(clip, t5):
    """The parameters of CLIP's and T5's text encoders, from their configs, but for norms and biases."""
    width = clip["hidden_size"]
    layer = 4 * width**2 + 2 * width * clip["intermediate_size"]
    of_clip = (clip["vocab_size"] + clip["max_position_embeddings"]) * width + clip["num_hidden_layers"] * layer
    width = t5["d_model"]
    gated = t5["feed_forward_proj"].startswith("gated")
    layer = 4 * width * t5["d_kv"] * t5["num_heads"] + (2 + gated) * width * t5["d_ff"]
    return of_clip + t5["vocab_size"] * width + t5["num_layers"] * layer


def check_transformer(folder, read=None):
    """The config of a FLUX.1 transformer's folder. read: what `configs.check_folder` returned for it; None: it is
    read now. Raises UserError."""
    if read is None:
        read = con.check_folder(folder)
    file = folder / "config.json"
    config = con.fitting(file, read, TRANSFORMER, OF_TRANSFORMER)
    axes = config.get("axes_dims_rope", [16, 56, 56])
    if len(axes) != 3 or any(axis % 2 for axis in axes):
        raise UserError(f"{file}: axes_dims_rope {axes} must be three even numbers")
    must_fit(file, config, "attention_head_dim", sum(axes), "the sum of axes_dims_rope")
    return config


def must_fit(file, config, key, wanted, why):
    """Raise UserError unless the value of a key is `wanted`; why: which other config needs that, for the message."""
    if config[key] != wanted:
        raise UserError(f"{file}: {key} {config[key]} must be {wanted}, {why}")


def check_scheduler(file, read):
    """A scheduler's config. Raises UserError if it is not FLUX.1's schedule."""
    steps = con.fitting(file, read, SCHEDULER, OF_SCHEDULER | DYNAMIC)
    if steps.get("use_dynamic_shifting"):
        con.fitting(file, read, DYNAMIC)
        if not steps["base_image_seq_len"] < steps["max_image_seq_len"]:
            raise UserError(f"{file}: base_image_seq_len must be below max_image_seq_len")
        if not 0 <= steps["base_shift"] <= steps["max_shift"] <= 10:
            raise UserError(f"{file}: base_shift and max_shift must be from 0 to 10, and base_shift the smaller one")
    return steps


def check_vocabulary(folder, most, read):
    """The most tokens that a tokenizer makes of a text. If it has no limit, this is `most`, the limit of its encoder.
    Raises UserError if its own limit is larger, or if it has no vocabulary."""
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise UserError(f"{folder}: has no vocabulary ({' or '.join(VOCABULARIES)})")
    file = folder / "tokenizer_config.json"
    config = con.fitting(file, read, {}, {"model_max_length": con.WHOLE})
    tokens = config.get("model_max_length", NO_LIMIT)
    if tokens == NO_LIMIT:
        return most
    if not FEWEST_TOKENS <= tokens <= most:
        raise UserError(f"{file}: model_max_length {tokens} must be from {FEWEST_TOKENS} to {most}")
    return tokens
