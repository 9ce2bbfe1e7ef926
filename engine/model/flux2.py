"""FLUX.2-klein's configs: what they must hold, and those of the known hub ids. FLUX.2-dev is not trained here: it has
another text encoder, and embedded guidance."""

from engine.errors import UserError
from engine.model import configs as con
from engine.model.family import (
    MOST_TOKENS,
    TRANSFORMER,
    VAE,
    Configs,
    Family,
    check_scheduler,
    check_vocabulary,
    must_fit,
)

READ = 3   # layers of the text encoder whose hidden states the transformer reads, side by side
PARTED = 4  # they stand after a quarter, a half and three quarters of its layers: 9, 18 and 27 of Qwen3's 36
OF_KLEIN = {"guidance_embeds": con.one_of(False)}
OPTIONAL = {"axes_dims_rope": con.WHOLES, "patch_size": con.one_of(1), "mlp_ratio": con.POSITIVE,
            "rope_theta": con.WHOLE, "timestep_guidance_channels": con.WHOLE}
OF_VAE = {"_class_name": con.one_of("AutoencoderKLFlux2"), "batch_norm_eps": con.POSITIVE}
QWEN = {"model_type": con.one_of("qwen3"), "hidden_size": con.WHOLE, "vocab_size": con.WHOLE,
        "num_hidden_layers": con.WHOLE, "num_attention_heads": con.WHOLE, "num_key_value_heads": con.WHOLE,
        "head_dim": con.WHOLE, "intermediate_size": con.WHOLE}

# ------------------------------------------------------------------------------------------------- known hub ids
KNOWN_VAE = {"_class_name": "AutoencoderKLFlux2", "down_block_types": ["DownEncoderBlock2D"] * 4,
             "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 32,
             "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 1024,
             "batch_norm_eps": 1e-4}
OF_4B = {"_class_name": "Flux2Transformer2DModel", "in_channels": 128, "num_layers": 5, "num_single_layers": 20,
         "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
OF_9B = OF_4B | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
SHIFT = {"use_dynamic_shifting": True}
QWEN_4B = 4_022_000_000  # parameters of the text encoders
QWEN_8B = 8_191_000_000


def layers_read(layers):
    """The numbers of the hidden states that the transformer reads, of a text encoder with so many layers."""
    return tuple(layers * part // PARTED for part in range(1, PARTED))


def known(transformer, texts):
    """{what the hub id ends with: `Configs`} of a size, undistilled and distilled to four steps."""
    base = Configs(transformer, KNOWN_VAE, SHIFT, MOST_TOKENS, texts, text_layers=layers_read(36))
    return {"base-": base, "": base._replace(few_steps=True)}


def read_configs(folder, index, read, transformer):
    """The `Configs` of a folder. Arguments as in `flux1.read_configs`. Raises UserError."""
    vae = con.fitting(folder / "vae" / "config.json", read, OF_VAE | VAE)
    file = folder / "text_encoder" / "config.json"
    qwen = con.fitting(file, read, QWEN)
    if qwen["num_hidden_layers"] % PARTED:
        raise UserError(f"{file}: num_hidden_layers {qwen['num_hidden_layers']} must be a multiple of {PARTED}")
    scheduler = check_scheduler(folder / "scheduler" / "scheduler_config.json", read)
    must_fit(folder / "transformer" / "config.json", transformer, "joint_attention_dim", READ * qwen["hidden_size"],
             f"{READ} times the text encoder's hidden_size")
    tokens = min(MOST_TOKENS, check_vocabulary(folder / "tokenizer", con.LARGEST, read))
    return Configs(transformer, vae, scheduler, tokens, text_parameters(qwen), index.get("is_distilled") is True,
                   layers_read(qwen["num_hidden_layers"]))


def text_parameters(qwen):
    """The parameters of a Qwen3, from its config, but for norms."""
    width = qwen["hidden_size"]
    heads = 2 * qwen["num_attention_heads"] + 2 * qwen["num_key_value_heads"]
    layer = width * (heads * qwen["head_dim"] + 3 * qwen["intermediate_size"])
    words = qwen["vocab_size"] * width * (1 if qwen.get("tie_word_embeddings") else 2)
    return words + qwen["num_hidden_layers"] * layer


KLEIN = Family(
    name="FLUX.2-klein", pipeline="Flux2KleinPipeline", network="klein.Klein", transformer="Flux2Transformer2DModel",
    parts=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"), texts=("text_encoder", "tokenizer"),
    keys=TRANSFORMER | OF_KLEIN, optional=OPTIONAL, axes=4, usual_axes=[32, 32, 32, 32],
    has_released_names=False, read=read_configs,
    known={f"black-forest-labs/FLUX.2-klein-{kind}{size}": configs
           for size, of_size in (("4B", known(OF_4B, QWEN_4B)), ("9B", known(OF_9B, QWEN_8B)))
           for kind, configs in of_size.items()})
