"""A model's text encoders. They are loaded only if the cache lacks a prompt; how, the family's `flow.Flow` knows."""

import torch

from engine.data.digests import known_digest
from engine.errors import UserError
from engine.model.family import MOST_TOKENS
from engine.model.tensors import are_finite

PADDING = 0.01  # the largest share of an encoder's embedding rows that may be padding, without a token


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


def embedding(txt, pooled, truncated):
    """An embedding as the cache keeps it, on the CPU: {"txt" [L, D], "pooled" [D'], "truncated", a bool}. Raises
    UserError if it is not finite."""
    if not are_finite([txt, pooled]):
        raise UserError("its text encoders make numbers that are not finite: their weights are broken")
    return {"txt": txt.cpu(), "pooled": pooled.cpu(), "truncated": torch.tensor(truncated)}


def embeddings(family, model, prompts, device, dtype, cache):
    """{prompt: its `embedding`} of a list of prompts, by a `Model`. If a `Cache` lacks some, the encoders are loaded
    for these, and freed on return. family: the model's `flow.Flow`, which has text_encoders and encode_text. Raises
    UserError.

    Prompts are encoded one at a time: in a batch the last bits depend on the other prompts, and these differ from run
    to run.
    """
    most = model.configs.text_tokens
    keys = {}
    found = dict.fromkeys(prompts)
    if cache.folder is not None:
        # An embedding depends on its text, the files of the encoders, the limit, the dtype and the kind of device.
        encoders = known_digest([model.part(part) for part in model.family.texts], cache)
        computed = [encoders, most, str(dtype), torch.device(device).type]
        keys = {text: cache.key("embedding", text, *computed) for text in found}
        found = {text: cache.get(key) for text, key in keys.items()}
    missing = [text for text, embedding in found.items() if embedding is None]
    if missing:
        pipe = family.text_encoders(model, dtype).to(device)
        for text in missing:
            with torch.no_grad():
                found[text] = family.encode_text(pipe, text, most)
            if cache.folder is not None:
                cache.put(keys[text], found[text])
    return found
