"""The two text encoders of a FLUX.1, CLIP and T5: a folder's, loaded when a prompt is not in the cache."""

import diffusers
import torch
import transformers

from engine.data.digests import known_digest
from engine.errors import UserError
from engine.model import configs
from engine.model.folder import MOST_TOKENS, TEXTS
from engine.model.tensors import are_finite

PADDING = 0.01  # the share of an embedding's rows that may stand for no word


def load(model, dtype):
    """A FluxPipeline of nothing but the text encoders of a `Model` and their tokenizers. Raises UserError."""
    clip = configs.strict(transformers.CLIPTextModel, model.part("text_encoder"), dtype, use_safetensors=True,
                          unread=("text_model.embeddings.position_ids",), checked=True)
    t5 = configs.strict(transformers.T5EncoderModel, model.part("text_encoder_2"), dtype, use_safetensors=True,
                        unread=("encoder.embed_tokens.weight",), checked=True)
    return diffusers.FluxPipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=clip, text_encoder_2=t5,
        tokenizer=tokenizer_of(transformers.CLIPTokenizerFast, model.part("tokenizer"), clip),
        tokenizer_2=tokenizer_of(transformers.T5TokenizerFast, model.part("tokenizer_2"), t5))


def tokenizer_of(kind, folder, encoder):
    """The tokenizer of an encoder, which gives a text no more tokens than that takes. Raises UserError if its
    vocabulary is not the encoder's, which may be padded."""
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
    """One prompt through both text encoders of a FluxPipeline: {"txt" [L, D], "pooled" [D'], "truncated"},
    on the CPU; L is what T5's tokenizer says, and `most` at most. Alone, for what it is encoded with would
    change its last bits, and another run meets it with others. Raises UserError if it is not finite."""
    length = min(pipe.tokenizer_2.model_max_length, most)
    txt, pooled, _ = pipe.encode_prompt([text], max_sequence_length=length)
    if not are_finite([txt, pooled]):
        raise UserError("its text encoders make numbers that are not finite: their weights are broken")
    truncated = len(pipe.tokenizer_2(text).input_ids) > length
    return {"txt": txt[0].cpu(), "pooled": pooled[0].cpu(), "truncated": torch.tensor(truncated)}


def embeddings(model, prompts, device, dtype, cache):
    """{prompt: what `encode` gives} of a list of prompts, by a `Model`. Those that a `Cache` lacks go through the
    encoders, which are loaded if there is one, and freed on return. Raises UserError."""
    most = model.configs.text_tokens
    keys = {}
    found = dict.fromkeys(prompts)
    if cache.folder is not None:
        # An embedding depends on its text, and on what of the model and the machine makes it.
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
