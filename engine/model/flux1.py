"""FLUX.1's configs: what they must hold, and those of the known hub ids."""

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

SCHNELL_TOKENS = 256  # of a prompt: FluxPipeline's limit for FLUX.1-schnell, which no config states
OF_FLUX = {"pooled_projection_dim": con.WHOLE, "guidance_embeds": con.FLAG}
OPTIONAL = {"axes_dims_rope": con.WHOLES, "patch_size": con.one_of(1)}
OF_VAE = {"_class_name": con.one_of("AutoencoderKL"), "scaling_factor": con.POSITIVE}
CLIP = {"model_type": con.one_of("clip_text_model"), "hidden_size": con.WHOLE, "vocab_size": con.WHOLE,
        "max_position_embeddings": con.WHOLE, "num_attention_heads": con.WHOLE,
        "num_hidden_layers": con.WHOLE, "intermediate_size": con.WHOLE, "hidden_act": con.TEXT}
T5 = {"model_type": con.one_of("t5"), "d_model": con.WHOLE, "vocab_size": con.WHOLE, "num_heads": con.WHOLE,
      "d_kv": con.WHOLE, "d_ff": con.WHOLE, "num_layers": con.WHOLE, "feed_forward_proj": con.TEXT,
      "relative_attention_num_buckets": con.WHOLE}

# ------------------------------------------------------------------------------------------------- known hub ids
KNOWN_VAE = {"_class_name": "AutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * 4,
             "up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 16,
             "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "use_quant_conv": False,
             "use_post_quant_conv": False, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159}
KNOWN_TRANSFORMER = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": 19,
                     "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
                     "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True}
DYNAMIC_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
                 "max_image_seq_len": 4096, "shift": 3.0}
KNOWN_TEXTS = 4_885_000_000  # parameters of T5 v1.1 XXL's encoder and CLIP ViT-L/14's text tower
DEV = Configs(KNOWN_TRANSFORMER, KNOWN_VAE, DYNAMIC_SHIFT, MOST_TOKENS, KNOWN_TEXTS)
SCHNELL = Configs(KNOWN_TRANSFORMER | {"guidance_embeds": False}, KNOWN_VAE,
                  {"use_dynamic_shifting": False, "shift": 1.0}, SCHNELL_TOKENS, KNOWN_TEXTS, few_steps=True)


def read_configs(folder, index, read, transformer):
    """The `Configs` of a folder. index: its model_index.json; read: {file: config} of all parts; transformer: its
    config, checked. Raises UserError."""
    vae = con.fitting(folder / "vae" / "config.json", read, OF_VAE | VAE, {"shift_factor": con.NUMBER_OR_NULL})
    clip = con.fitting(folder / "text_encoder" / "config.json", read, CLIP)
    t5 = con.fitting(folder / "text_encoder_2" / "config.json", read, T5)
    scheduler = check_scheduler(folder / "scheduler" / "scheduler_config.json", read)
    file = folder / "transformer" / "config.json"
    must_fit(file, transformer, "joint_attention_dim", t5["d_model"], "T5's d_model")
    must_fit(file, transformer, "pooled_projection_dim", clip["hidden_size"], "CLIP's hidden_size")
    check_vocabulary(folder / "tokenizer", clip["max_position_embeddings"], read)
    tokens = check_vocabulary(folder / "tokenizer_2", MOST_TOKENS, read)
    # FLUX.1-schnell has no guidance embedding, and its time shift does not depend on the picture's size.
    few_steps = not transformer["guidance_embeds"] and not scheduler.get("use_dynamic_shifting", False)
    if few_steps:
        tokens = min(tokens, SCHNELL_TOKENS)
    return Configs(transformer, vae, scheduler, tokens, text_parameters(clip, t5), few_steps)


def text_parameters(clip, t5):
    """The parameters of CLIP's and T5's text encoders, from their configs, but for norms and biases."""
    width = clip["hidden_size"]
    layer = 4 * width**2 + 2 * width * clip["intermediate_size"]
    of_clip = (clip["vocab_size"] + clip["max_position_embeddings"]) * width + clip["num_hidden_layers"] * layer
    width = t5["d_model"]
    gated = t5["feed_forward_proj"].startswith("gated")
    layer = 4 * width * t5["d_kv"] * t5["num_heads"] + (2 + gated) * width * t5["d_ff"]
    return of_clip + t5["vocab_size"] * width + t5["num_layers"] * layer


FLUX_1 = Family(
    name="FLUX.1", pipeline="FluxPipeline", network="flux.Flux", transformer="FluxTransformer2DModel",
    parts=("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    texts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), keys=TRANSFORMER | OF_FLUX, optional=OPTIONAL,
    axes=3, usual_axes=[16, 56, 56], has_released_names=True, read=read_configs,
    known={"black-forest-labs/FLUX.1-dev": DEV, "black-forest-labs/FLUX.1-Krea-dev": DEV,
           "black-forest-labs/FLUX.1-schnell": SCHNELL})
