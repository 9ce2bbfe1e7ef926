"""A family of models: what FLUX.1 and FLUX.2-klein differ in before any weights are read. Its classes, its parts, and
the checks of its configs; flux1.py and flux2.py beside this file each hold one. Nothing here needs torch."""

from collections.abc import Callable
from typing import NamedTuple

from engine.errors import UserError
from engine.model import configs as con

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
MOST_TOKENS = 512  # of a prompt: the pipelines' own limit
FEWEST_TOKENS = 8  # of a tokenizer's limit; below that no prompt fits
NO_LIMIT = int(1e30)  # what transformers writes for a tokenizer without a limit

# The keys of the configs that this code computes with, and what they must be. The libraries check the others.
TRANSFORMER = {"in_channels": con.WHOLE, "num_layers": con.WHOLE, "num_single_layers": con.WHOLE,
               "attention_head_dim": con.WHOLE, "num_attention_heads": con.WHOLE, "joint_attention_dim": con.WHOLE}
VAE = {"block_out_channels": con.WHOLES, "layers_per_block": con.WHOLE, "norm_num_groups": con.WHOLE,
       "act_fn": con.TEXT, "latent_channels": con.WHOLE, "in_channels": con.one_of(3), "out_channels": con.one_of(3)}
SCHEDULER = {"_class_name": con.one_of("FlowMatchEulerDiscreteScheduler")}
DYNAMIC = {"base_shift": con.NUMBER, "max_shift": con.NUMBER, "base_image_seq_len": con.WHOLE,
           "max_image_seq_len": con.WHOLE}
# Only FLUX's own schedule of steps is implemented here, so options that would change it otherwise are refused.
OF_SCHEDULER = {"use_dynamic_shifting": con.FLAG, "shift": con.POSITIVE, "shift_terminal": con.one_of(None),
                "time_shift_type": con.one_of("exponential"), "invert_sigmas": con.one_of(False),
                "use_karras_sigmas": con.one_of(False), "use_exponential_sigmas": con.one_of(False),
                "use_beta_sigmas": con.one_of(False), "stochastic_sampling": con.one_of(False)}


class Configs(NamedTuple):
    """A model's configs, read before any weights. text_tokens: the most tokens of a prompt. text_parameters: of the
    text encoders, but for norms and biases. few_steps: whether the model was distilled to few steps. text_layers: the
    numbers of the text encoder's hidden states that are read side by side; none: its output is."""
    transformer: dict
    vae: dict
    scheduler: dict
    text_tokens: int
    text_parameters: int
    few_steps: bool = False
    text_layers: tuple = ()

    @property
    def takes_cfg(self):
        """Whether a guided velocity needs two calls: guidance was not distilled into the model."""
        return not self.transformer["guidance_embeds"] and not self.few_steps


class Family(NamedTuple):
    """What models of one family have in common. To add a family, add a file like flux1.py, an entry to folder.FAMILIES,
    and the `flow.Flow` that `network` names."""
    name: str            # for messages
    pipeline: str        # what model_index.json says: diffusers' pipeline
    network: str         # "file.class": the `flow.Flow` that calls it
    transformer: str     # the _class_name of the transformer's config: a class of diffusers
    parts: tuple         # the folders of a model
    texts: tuple         # those that encode prompts
    keys: dict           # {key: `Kind`} of the transformer's config, which --weights must agree with
    optional: dict       # the same, of keys that may be left out
    axes: int            # of its positions
    usual_axes: list     # axes_dims_rope, if the config does not say
    has_released_names: bool  # whether black-forest-labs' names of its tensors are known here (released.py)
    read: Callable       # (folder, index, read, checked transformer) -> `Configs`, checked against each other
    known: dict          # {hub id: `Configs`}, so that nothing is downloaded for a plan, or to refuse --weights


def check_transformer(folder, family, read=None):
    """The config of a transformer's folder. read: what `configs.check_folder` returned for it; None: it is read now.
    Raises UserError if it is none of the family."""
    if read is None:
        read = con.check_folder(folder)
    file = folder / "config.json"
    config = con.fitting(file, read, {"_class_name": con.one_of(family.transformer)} | family.keys, family.optional)
    axes = config.get("axes_dims_rope", family.usual_axes)
    if len(axes) != family.axes or any(axis % 2 for axis in axes):
        count = {3: "three", 4: "four"}[family.axes]
        raise UserError(f"{file}: axes_dims_rope {axes} must be {count} even numbers")
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
