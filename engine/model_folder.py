"""What a folder in FLUX.1's layout says of its model, read and checked before anything is loaded: the configs
of its parts, and srpo.json, the flags that suit it."""

from pathlib import Path
from typing import NamedTuple

from engine import configs as con
from engine.errors import UserError
from engine.files import named_path, not_a_path, read_json

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
MOST_TOKENS = 512  # of a prompt: FluxPipeline's own limit
FEWEST_TOKENS = 8  # fewer hold no prompt
NO_LIMIT = int(1e30)  # what transformers writes for a tokenizer that knows none
SCHNELL_TOKENS = 256  # of a prompt: FluxPipeline's limit for FLUX.1-schnell, which no config says
SCRIPTS_OWN = 1024  # pixels a side that FLUX.1's VAE was made for: there --size has each script's own default

# What the configs must say of what is computed with here; the rest is the libraries' affair.
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
# FLUX.1's steps: what would bend them in another way is refused, for nothing here would do it.
OF_SCHEDULER = {"use_dynamic_shifting": con.FLAG, "shift": con.POSITIVE, "shift_terminal": con.one_of(None),
                "time_shift_type": con.one_of("exponential"), "invert_sigmas": con.one_of(False),
                "use_karras_sigmas": con.one_of(False), "use_exponential_sigmas": con.one_of(False),
                "use_beta_sigmas": con.one_of(False), "stochastic_sampling": con.one_of(False)}

# What a model's srpo.json may set: a recipe that suits it. Never where a run is written, or what is deleted.
TEXTS = "prompts watch_prompts eval_prompts reward control neg form branches meet recover noise metrics"
NUMBERS = ("size cfg_k cells groundtruth_ratio injections rollout_steps rollout_guidance guidance steps "
           "batch accumulate group refl_steps lr lora_lr weight_decay clip eval_steps watch watch_every eval")
SEVERAL = "sigma_range lam discount_denoise discount_invert drift_band"
OR_OFF = "threshold shift"  # null is off
MAY_SET = {**dict.fromkeys(TEXTS.split(), con.TEXT), **dict.fromkeys(NUMBERS.split(), con.NUMBER),
           **dict.fromkeys(SEVERAL.split(), con.NUMBERS),
           **dict.fromkeys(OR_OFF.split(), con.NUMBER_OR_NULL)}


class Configs(NamedTuple):
    """What a model's files say of it, before anything is loaded."""
    transformer: dict
    vae: dict
    scheduler: dict
    text_tokens: int

    @property
    def few_steps(self):
        """Whether it was distilled to few steps, as FLUX.1-schnell: it has no guidance to embed, and a time
        shift that does not depend on the picture's size."""
        static = not self.scheduler.get("use_dynamic_shifting", False)
        return not self.transformer["guidance_embeds"] and static


# -------------------------------------------------------------------------------------------- models by name
# What the configs of hub ids say, so that nothing need be downloaded to plan. FluxTransformer2DModel's own
# defaults are FLUX.1-dev's, but for the guidance embedding.
FLUX_VAE = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
            "latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
            "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024,
            "scaling_factor": 0.3611, "shift_factor": 0.1159}
FLUX_DEV = Configs({"guidance_embeds": True}, FLUX_VAE, {"use_dynamic_shifting": True}, MOST_TOKENS)
FLUX_SCHNELL = Configs({"guidance_embeds": False}, FLUX_VAE, {"shift": 1.0}, SCHNELL_TOKENS)
KNOWN = {"black-forest-labs/FLUX.1-dev": FLUX_DEV,
         "black-forest-labs/FLUX.1-Krea-dev": FLUX_DEV,
         "black-forest-labs/FLUX.1-schnell": FLUX_SCHNELL}


def suited(configs, unit):
    """{flag: value} that suit a model by its configs, where they are not FLUX.1-dev's: the picture's side, a
    multiple of `unit` pixels, that a VAE was made for; and few steps, with the model's own time shift."""
    found = {}
    side = configs.vae.get("sample_size")
    if type(side) is int and unit <= side < SCRIPTS_OWN:
        found["size"] = side // unit * unit
    if configs.few_steps:
        found |= {"rollout_steps": 4, "eval_steps": 4, "shift": None}
    return found


def notes(model, values, flags):
    """What a model's configs decided of the flags (a dict), `values` being what suits it, or what had to be
    guessed: a list of lines."""
    lines = []
    if not Path(model).exists() and model not in KNOWN:
        lines.append(f"--model {model}: not a model known here; its defaults and its plan are FLUX.1-dev's")
    _, own = own_flags(model)
    for name, value in values.items():
        if name not in own and name in flags and flags[name] == value:
            shown = "off" if value is None else value
            lines.append(f"--{name.replace('_', '-')} {shown}: what the configs of {model} say")
    return lines


# -------------------------------------------------------------------------------------------------- the parts
def check_parts(folder):
    """Raise UserError if a folder lacks a part of a FLUX.1."""
    missing = [part for part in ("model_index.json", *PARTS) if not (folder / part).exists()]
    if missing:
        raise UserError(f"--model {folder}: not a FLUX.1 folder, it has no {', '.join(missing)}")
    kind = con.check_config(folder / "model_index.json").get("_class_name")
    if kind != "FluxPipeline":
        raise UserError(f"--model {folder}: model_index.json says {kind}, not FluxPipeline")


def read_configs(folder, patch):
    """The `Configs` of a folder, each checked, and whether they fit each other; a token is patch x patch
    latents. Raises UserError."""
    for part in PARTS:
        con.check_folder(folder / part)
    transformer = check_transformer(folder / "transformer")
    vae = con.read_config(folder / "vae" / "config.json", VAE, OF_VAE)
    clip = con.read_config(folder / "text_encoder" / "config.json", CLIP)
    t5 = con.read_config(folder / "text_encoder_2" / "config.json", T5)
    scheduler = check_scheduler(folder / "scheduler" / "scheduler_config.json")

    file = folder / "transformer" / "config.json"
    latents = patch**2 * vae["latent_channels"]
    must_fit(file, transformer, "in_channels", latents, "what the VAE's latents need")
    must_fit(file, transformer, "joint_attention_dim", t5["d_model"], "T5's d_model")
    must_fit(file, transformer, "pooled_projection_dim", clip["hidden_size"], "CLIP's hidden_size")
    if transformer.get("out_channels") is not None:
        must_fit(file, transformer, "out_channels", latents, "what the VAE's latents need")
    check_vocabulary(folder / "tokenizer", clip["max_position_embeddings"])
    found = Configs(transformer, vae, scheduler, check_vocabulary(folder / "tokenizer_2", MOST_TOKENS))
    if found.few_steps:
        found = found._replace(text_tokens=min(found.text_tokens, SCHNELL_TOKENS))
    return found


def check_transformer(folder):
    """The config of a FLUX.1 transformer's folder. Raises UserError."""
    con.check_folder(folder)
    file = folder / "config.json"
    config = con.read_config(file, TRANSFORMER, OF_TRANSFORMER)
    axes = config.get("axes_dims_rope", [16, 56, 56])
    if len(axes) != 3 or any(axis % 2 for axis in axes):
        raise UserError(f"{file}: axes_dims_rope {axes} must be three even numbers")
    must_fit(file, config, "attention_head_dim", sum(axes), "the sum of axes_dims_rope")
    return config


def must_fit(file, config, key, wanted, why):
    """Raise UserError if a key of a config is not as large as another config wants it."""
    if config[key] != wanted:
        raise UserError(f"{file}: {key} {config[key]} must be {wanted}, {why}")


def check_scheduler(file):
    """A scheduler's config. Raises UserError if it is not of FLUX.1's steps."""
    steps = con.read_config(file, SCHEDULER, OF_SCHEDULER | DYNAMIC)
    if steps.get("use_dynamic_shifting"):
        con.read_config(file, DYNAMIC)
        if not steps["base_image_seq_len"] < steps["max_image_seq_len"]:
            raise UserError(f"{file}: base_image_seq_len must be below max_image_seq_len")
        if not 0 <= steps["base_shift"] <= steps["max_shift"] <= 10:
            raise UserError(f"{file}: base_shift and max_shift must be from 0 to 10, the larger one last")
    return steps


def check_vocabulary(folder, most):
    """How many tokens a tokenizer gives a text, at most; where it knows no limit, as many as its encoder
    takes, `most`. Raises UserError if it says more than that, or if it has no vocabulary."""
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise UserError(f"{folder}: has no vocabulary ({' or '.join(VOCABULARIES)})")
    file = folder / "tokenizer_config.json"
    tokens = con.read_config(file, {}, {"model_max_length": con.WHOLE}).get("model_max_length", NO_LIMIT)
    if tokens == NO_LIMIT:
        return most
    if not FEWEST_TOKENS <= tokens <= most:
        raise UserError(f"{file}: model_max_length {tokens} must be from {FEWEST_TOKENS} to {most}")
    return tokens


# -------------------------------------------------------------------------------------------------- srpo.json
def own_flags(folder):
    """(the path of a folder's srpo.json, {flag: value}): none if there is no such file.

    Paths in it are relative to the folder, and stay inside it. Raises UserError for a key that it may not
    set, and for a path that leads elsewhere.
    """
    path = Path(folder) / "srpo.json"
    if not path.exists():
        return path, {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be an object of flags, such as {{\"size\": 64}}")
    for name, value in values.items():
        if name not in MAY_SET:
            raise UserError(f"{path}: {name!r} is not a flag that a model may set; "
                            f"there are {', '.join(sorted(MAY_SET))}")
        if not MAY_SET[name].fits(value):
            raise UserError(f"{path}: {name} {str(value)[:40]!r} must be {MAY_SET[name].words}")
        if name in ("prompts", "watch_prompts", "eval_prompts"):
            values[name] = inside(path, name, value)
        if name in ("reward", "metrics"):
            items = [item_inside(path, name, item) for item in value.split(",")]
            values[name] = ",".join(items)
    return path, values


def item_inside(path, flag, item):
    """NAME, NAME=PATH or, of a reward, PATH, perhaps with :WEIGHT, as srpo.json at `path` means it."""
    if flag == "metrics" and "=" not in item:
        return item
    text, colon, weight = item.strip().partition(":")
    try:
        name, where = named_path(text)
    except UserError as error:
        raise UserError(f"{path}: {flag} {error}") from error
    where = inside(path, flag, where, must_exist=name is not None)
    start = "" if name is None else f"{name}="
    return start + where + colon + weight


def inside(path, flag, where, must_exist=False):
    """A path as srpo.json at `path` means it: in its folder. What is no path there is left as it is, for it
    may be a name, such as hpdv2. Raises UserError for a path that leads out, or out of nowhere."""
    why = not_a_path(where)
    if why:
        raise UserError(f"{path}: {flag} {where[:80]!r} must be a path, and it {why}")
    folder = path.parent
    place = folder / where
    if not place.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: {flag} {where!r} leads out of the model's folder")
    if place.exists():
        return str(place)
    if must_exist or "/" in where or Path(where).exists():
        raise UserError(f"{path}: {flag} {where!r} is not in the model's folder")
    return where
