"""ImageReward (arXiv 2304.05977): how well people would like a picture for its prompt, about -2 to 2.

The network is a BLIP whose text encoder attends to the picture, so it is no dot product. The weights are the authors'
(hub THUDM/ImageReward, ImageReward.pt); they are renamed for transformers' BLIP. Every size is read from the tensors,
so a smaller file of the same layout works too: miniature/reward_cross is one.
"""


import torch
import transformers
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN as MEAN
from transformers.image_utils import OPENAI_CLIP_STD as STD
from transformers.initialization import no_init_weights

from engine.errors import UserError, one_line
from engine.memory.parallel import moved
from engine.model.configs import check_folder, must_be_floats
from rewards import base

COLUMNS = {"imagereward": base.Column("ImageReward", ".3f")}
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
LINEAR = "02467"  # the mlp's linear layers; the other numbers are dropouts, which do nothing in evaluation
# The file holds these too. They belong to BLIP's pre-training or are no weights, and the reward does not use them.
UNREAD = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


PUBLISHED = {  # sizes of the published file, for --plan
    "vision": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=224, patch_size=16),
    "text": dict(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072,
                 num_hidden_layers=12, max_position_embeddings=512),
    "mlp": [768, 1024, 128, 64, 16, 1]}


def fetch(where=None):
    """The `base.Files`. where: ImageReward.pt, or a folder that holds it, or a hub repository (None: the authors').

    The tokenizer is the one beside the file, if there is one; otherwise bert-base-uncased from the hub. Raises
    UserError if a file is neither here nor on the hub.
    """
    return base.fetch(where or HUB, FILE, VOCABULARIES, TOKENIZER, TOKENIZER_FILES)


# ------------------------------------------------------------------------------------------------ the network
def renamed(key):
    """A name of ImageReward.pt -> transformers' name."""
    for theirs, ours in NAMES.items():
        key = key.replace(theirs, ours)
    return key


def renamed_all(state):
    """A state dict with ImageReward.pt's names -> the same with transformers' names, in float32, without UNREAD."""
    return {renamed(key): tensor.float() for key, tensor in state.items() if not key.startswith(UNREAD)}


def layers(state, start):
    """How many layers a state dict has under the names that begin with `start`."""
    numbers = [int(key[len(start):].split(".")[0]) for key in state if key.startswith(start)]
    return 1 + max(numbers)


def network(state):
    """The three `parts` with the sizes of a `renamed_all` state dict and random weights."""
    width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
    side = round((state["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)  # in patches
    words, text_width = state["text.embeddings.word_embeddings.weight"].shape
    vision = dict(hidden_size=width, intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
                  num_hidden_layers=layers(state, "vision.encoder.layers."), image_size=side * patch, patch_size=patch)
    text = dict(vocab_size=words, hidden_size=text_width, encoder_hidden_size=width,
                intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
                num_hidden_layers=layers(state, "text.encoder.layer."),
                max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]))
    return parts(vision, text, [text_width, *(len(state[f"mlp.{n}.weight"]) for n in LINEAR)])


def parts(vision, text, mlp):
    """The three parts (vision, text, mlp) with sizes like PUBLISHED and random weights."""
    eye = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        num_attention_heads=vision["hidden_size"] // HEAD, layer_norm_eps=1e-6, **vision))  # their default is 1e-5
    reader = transformers.BlipTextModel(transformers.BlipTextConfig(
        num_attention_heads=text["hidden_size"] // HEAD,
        bos_token_id=None, sep_token_id=None,    # not read; their defaults are beyond a small vocabulary
        is_decoder=True, **text), add_pooling_layer=False)  # "decoder" only means that the layers have cross-attention
    head = nn.Sequential()
    for n, inputs, outputs in zip(LINEAR, mlp, mlp[1:], strict=False):
        head.add_module(n, nn.Linear(inputs, outputs))
    return nn.ModuleDict({"vision": eye, "text": reader, "mlp": head})


class ImageReward(base.Reward):
    """The network, and its tokenizer. The picture is read once; the text encoder attends to it for every text."""

    def __init__(self, net, tokenizer):
        super().__init__(net, net["vision"].config.image_size, MEAN, STD)
        self.tokenizer = tokenizer

    def features(self, pixels):
        """Prepared pixels [B, 3, size, size] -> what the vision tower says of every patch, [B, patches + 1, D]."""
        return self.model["vision"](pixels).last_hidden_state

    def score(self, f, texts):
        """features [B, patches + 1, D] and B texts, truncated to 35 tokens -> r [B] float32."""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=TOKENS,
                                return_tensors="pt")
        # Called without is_decoder, so attention is not causal: every word sees every other.
        read = self.model["text"](moved(tokens.input_ids, self.device), encoder_hidden_states=f,
                                  attention_mask=moved(tokens.attention_mask, self.device)).last_hidden_state
        return (self.model["mlp"](read[:, 0]).squeeze(-1).float() - REWARD_MEAN) / REWARD_STD

    def does_not_know(self, text):
        """Whether its tokenizer reads a word as unknown."""
        return self.tokenizer.unk_token in self.tokenizer.tokenize(text)

    def reads_alike(self, one, other):
        """Whether two texts have the same tokens."""
        ids, others = self.tokenizer([one, other], truncation=True, max_length=TOKENS).input_ids
        return ids == others


# ---------------------------------------------------------------------------------------------------- loading
def load(files, device):
    """The `ImageReward` of `Files`, in float32. Raises UserError if a tensor is missing or unknown, or if the tokenizer
    does not fit."""
    state = renamed_all(must_be_floats(torch.load(files.weights, map_location="cpu", weights_only=True)))
    net = network(state)
    base.fill(net, state)
    check_folder(files.tokenizer)
    try:
        tokenizer = transformers.BertTokenizer.from_pretrained(files.tokenizer)
    except Exception as error:
        raise UserError(f"{files.tokenizer}: holds no BERT tokenizer: {one_line(error)}") from error
    words = net["text"].config.vocab_size  # BERT's words, and two words of BLIP's pre-training
    if not 0 <= words - len(tokenizer) <= 2:
        raise UserError(f"{files.tokenizer}: a tokenizer of {len(tokenizer)} words; {files.weights} knows {words}")
    return ImageReward(net.to(device), tokenizer)


# --------------------------------------------------------------------------------------------------- the plan
def image_network(where=None):
    """The `ImageNetwork` of the published sizes: a call reads one picture with one text."""
    with no_init_weights():
        net = parts(PUBLISHED["vision"], PUBLISHED["text"], PUBLISHED["mlp"])

    def look(pixels):
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        seen = net["vision"](pixels).last_hidden_state
        return net["mlp"](net["text"](ids, encoder_hidden_states=seen).last_hidden_state[:, 0])

    call = base.on_zeros(look, PUBLISHED["vision"]["image_size"])
    return base.ImageNetwork(net.requires_grad_(False), call, times=1, texts=True)
