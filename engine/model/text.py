"""The two text encoders of FLUX.1, CLIP and T5. They are loaded only if the cache lacks a prompt."""

import diffusers
import torch
import transformers

from engine.data.digests import known_digest
from engine.errors import UserError
from engine.model import configs
from engine.model.folder import MOST_TOKENS, TEXTS
from engine.model.tensors import are_finite

PADDING = 0.01  # the largest share of an encoder's embedding rows that may be padding, without a token


def load(model, dtype):
    """A FluxPipeline with only the text encoders of a `Model` and their tokenizers. Raises UserError."""
    clip = configs.strict(transformers.CLIPTextModel, model.part("text_encoder"), dtype, use_safetensors=True,
                          unread=("text_model.embeddings.position_ids",), checked=True)
    t5 = configs.strict(transformers.T5EncoderModel, model.part("text_encoder_2"), dtype, use_safetensors=True,
                        unread=("encoder.embed_tokens.weight",), checked=True)
    return diffusers.FluxPipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=clip, text_encoder_2=t5,
        tokenizer=tokenizer_of(transformers.CLIPTokenizerFast, model.part("tokenizer"), clip),
        tokenizer_2=tokenizer_of(transformers.T5TokenizerFast, model.part("tokenizer_2"), t5))


def tokenizer_of(kind, folder, encoder):
    """The tokenizer of an encoder, limited to the number of tokens that the encoder accepts. Raises UserError if its
    vocabulary does not match the encoder's, which may have PADDING more rows."""
    tokenizer = kind.from_pretrained(folder)
    most = getattr(encoder.config, "max_position_embeddings", MOST_TOKENS)  # T5 has no limit
    tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    words = encoder.config.vocab_size
    known = len(tokenizer)
    if not (1 - PADDING) * words <= known <= words or max(tokenizer.get_vocab().values()) >= words:
        raise UserError(f"{folder}: {known} words, but its encoder knows {words}")
    return tokenizer


@torch.no_grad()
def encode(pipe, text, most):
    """The embedding of one prompt, by both text encoders of a FluxPipeline, on the CPU.

    Returns {"txt" [L, D] of T5, "pooled" [D'] of CLIP, "truncated", a bool}; L is the limit of T5's tokenizer, at most
    `most`. Prompts are encoded one at a time: in a batch the last bits depend on the other prompts, and these differ
    from run to run. Raises UserError if the embedding is not finite.
    """
    length = min(pipe.tokenizer_2.model_max_length, most)
    txt, pooled, _ = pipe.encode_prompt([text], max_sequence_length=length)
    if not are_finite([txt, pooled]):
        raise UserError("its text encoders make numbers that are not finite: their weights are broken")
    truncated = len(pipe.tokenizer_2(text).input_ids) > length
    return {"txt": txt[0].cpu(), "pooled": pooled[0].cpu(), "truncated": torch.tensor(truncated)}


def embeddings(model, prompts, device, dtype, cache):
    """{prompt: its embedding, as `encode` returns it} of a list of prompts, by a `Model`. If a `Cache` lacks some, the
    encoders are loaded for these, and freed on return. Raises UserError."""
    most = model.configs.text_tokens
    keys = {}
    found = dict.fromkeys(prompts)
    if cache.folder is not None:
        # An embedding depends on its text, the files of the encoders, the limit, the dtype and the kind of device.
        encoders = known_digest([model.part(part) for part in TEXTS], cache)
        computed = [encoders, most, str(dtype), torch.device(device).type]
        keys = {text: cache.key("embedding", text, *computed) for text in found}
        found = {text: cache.get(key) for text, key in keys.items()}
    missing = [text for text, embedding in found.items() if embedding is None]
    if missing:
        pipe = load(model, dtype).to(device)
        for text in missing:
            found[text] = encode(pipe, text, most)
            if cache.folder is not None:
                cache.put(keys[text], found[text])
    return found
