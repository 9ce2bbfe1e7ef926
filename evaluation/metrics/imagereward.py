"""ImageReward (arXiv 2304.05977): how well people would like a picture for its prompt, about -2 to 2.

The network is a BLIP whose text encoder attends to the picture. The weights are the authors' (hub THUDM/ImageReward,
ImageReward.pt); they are renamed for transformers' BLIP. Every size is read from the tensors, so a smaller file of the
same layout works too.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN as MEAN
from transformers.image_utils import OPENAI_CLIP_STD as STD

from engine.errors import UserError, one_line
from engine.hub import fetched
from engine.model.configs import check_folder, must_be_floats
from rewards.base import Column
from rewards.pictures import exact

COLUMNS = {"imagereward": Column("ImageReward", ".3f")}
HUB, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
VOCABULARIES = ["vocab.txt", "tokenizer.json"]
TOKENIZER_FILES = [*VOCABULARIES, "tokenizer_config.json"]

REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # of raw rewards (released code)
TOKENS = 35                                                        # every prompt is padded or truncated to this length
HEAD = 64                                                          # channels of an attention head, in ViT-L and BERT

NAMES = {  # {name in the file: name in transformers}
    "blip.text_encoder.": "text.",
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    ".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.", ".attn.proj.": ".self_attn.projection.",
    "mlp.layers.": "mlp.",
}
# The file holds these too. They belong to BLIP's pre-training or are no weights, and the reward does not use them.
UNREAD = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class Files(NamedTuple):
    """The paths of everything that ImageReward needs."""
    weights: Path    # ImageReward.pt
    tokenizer: Path  # a folder


def fetch(where=None):
    """The `Files`. where: ImageReward.pt, or a folder that holds it, or a hub repository (None: the authors').

    The tokenizer is the one beside the file, if there is one; otherwise bert-base-uncased from the hub. Raises
    UserError if a file is neither here nor on the hub.
    """
    found = fetched(where or HUB, [FILE])
    path = found / FILE if found.is_dir() else found
    if not path.is_file():
        raise UserError(f"{found}: holds no {FILE}")
    if any((path.parent / name).is_file() for name in VOCABULARIES):
        return Files(path, path.parent)
    return Files(path, fetched(TOKENIZER, TOKENIZER_FILES))


def load(files, args, device):
    """The `ImageReward` scorer of `Files`. Raises UserError if they do not fit."""
    return ImageReward(files, device)


# ------------------------------------------------------------------------------------------------ the network
def renamed(state):
    """A state dict with ImageReward.pt's names -> the same with transformers' names, in float32, without UNREAD."""
    out = {}
    for key, tensor in state.items():
        if not key.startswith(UNREAD):
            for theirs, ours in NAMES.items():
                key = key.replace(theirs, ours)
            out[key] = tensor.float()
    return out


def layers(state, start):
    """How many layers a state dict has under the names that begin with `start`."""
    numbers = [int(key[len(start):].split(".")[0]) for key in state if key.startswith(start)]
    return 1 + max(numbers)


def network(state):
    """The three parts (vision, text, mlp) with the sizes of a `renamed` state dict and random weights."""
    width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
    side = round((state["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)  # in patches
    words, text_width = state["text.embeddings.word_embeddings.weight"].shape
    vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=width, intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=layers(state, "vision.encoder.layers."), num_attention_heads=width // HEAD,
        image_size=side * patch, patch_size=patch, layer_norm_eps=1e-6))  # transformers' default is 1e-5
    text = transformers.BlipTextModel(transformers.BlipTextConfig(
        vocab_size=words, hidden_size=text_width, encoder_hidden_size=width,
        intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=layers(state, "text.encoder.layer."), num_attention_heads=text_width // HEAD,
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
        is_decoder=True), add_pooling_layer=False)  # "decoder" only means that the layers have cross-attention
    mlp = nn.Sequential()
    for n in "02467":  # the linear layers; the other numbers are dropouts, which do nothing in evaluation
        outputs, inputs = state[f"mlp.{n}.weight"].shape
        mlp.add_module(n, nn.Linear(inputs, outputs))
    return nn.ModuleDict({"vision": vision, "text": text, "mlp": mlp})


class ImageReward:
    """`Files` as a scorer, in float32. Raises UserError if a tensor is missing or unknown, or if the tokenizer does not
    fit the network."""

    def __init__(self, files, device="cpu"):
        try:
            state = renamed(must_be_floats(torch.load(files.weights, map_location="cpu", weights_only=True)))
            self.net = network(state)
            self.net.load_state_dict(state)
        except Exception as error:
            what = one_line(" ".join(str(error).split()))
            raise UserError(f"{files.weights}: not an ImageReward: {what}") from error
        check_folder(files.tokenizer)
        try:
            self.tokenizer = transformers.BertTokenizer.from_pretrained(files.tokenizer)
        except Exception as error:
            raise UserError(f"{files.tokenizer}: holds no BERT tokenizer: {one_line(error)}") from error
        words = self.net["text"].config.vocab_size  # BERT's words, and two words of BLIP's pre-training
        if not 0 <= words - len(self.tokenizer) <= 2:
            raise UserError(f"{files.tokenizer}: a tokenizer of {len(self.tokenizer)} words; "
                            f"{files.weights} knows {words}")
        self.net.to(device).eval().requires_grad_(False)
        self.device = device
        self.size = self.net["vision"].config.image_size

    def rewards(self, images, ids, mask):
        """images [B, 3, size, size], normalised; ids and mask [B, L] of the tokens -> rewards [B]."""
        seen = self.net["vision"](images).last_hidden_state
        # Called without is_decoder, so attention is not causal: every word sees every other.
        read = self.net["text"](ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.net["mlp"](read[:, 0]).squeeze(-1) - REWARD_MEAN) / REWARD_STD

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        """B PIL pictures (RGB, any size) and B prompts -> {"imagereward": [B] float32, CPU}."""
        images = torch.stack([exact(p, self.size, MEAN, STD, fit="crop") for p in pictures])
        text = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TOKENS,
                              return_tensors="pt")
        text = text.to(self.device)
        rewards = self.rewards(images.to(self.device), text.input_ids, text.attention_mask)
        return {"imagereward": rewards.cpu()}
