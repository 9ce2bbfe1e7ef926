"""HPSv3 (arXiv 2508.03789): how well people would like a picture for its prompt, about 10 for a good one.

The network is Qwen2-VL-7B, here transformers' own, and a small head that reads one token, <|Reward|>. The weights are
the authors' (hub MizzenAI/HPSv3, HPSv3.safetensors), 16.6 GB in bf16. Every size is read from the tensors, so a smaller
file of the same layout works too. hpsv3_prompt.txt is the text that the network was trained with, word for word.
"""

import re
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import functional as TF
from transformers.image_utils import OPENAI_CLIP_MEAN as MEAN
from transformers.image_utils import OPENAI_CLIP_STD as STD
from transformers.initialization import no_init_weights
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Vision
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel as Language

from engine.errors import UserError, one_line
from engine.memory.parallel import moved
from engine.model.configs import check_folder, must_be_floats
from rewards import base
from rewards.pictures import BICUBIC, normalised, pixels

COLUMNS = {"hpsv3": base.Column("HPSv3", ".3f")}
HUB, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
TOKENIZER = "Qwen/Qwen2-VL-7B-Instruct"
VOCABULARIES = ["vocab.json", "tokenizer.json"]
TOKENIZER_FILES = [*VOCABULARIES, "merges.txt", "tokenizer_config.json"]

PIXELS = 256 * 28 * 28   # every picture is resized to about so many
MERGED = 2               # patches of a side that become one token
REWARD = "<|Reward|>"    # the token that the head reads; the tokenizer gets it as its last one
HEAD, EYE_HEAD = 128, 80  # channels of an attention head: of the language model, of the vision tower
# Qwen2-VL's chat template for one picture and one text, up to the picture and between the two
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
PICTURE, AFTER = "<|image_pad|>", "<|vision_end|>"

PARTS = {"visual.": "vision.", "model.": "language.", "rm_head.": "head."}  # {prefix in the file: here}
UNREAD = ("lm_head.",)   # predicts words, which a reward does not need
PUBLISHED = {            # sizes of the published file, for --plan
    "vision": dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, patch_size=14),
    "language": dict(vocab_size=151658, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                     num_attention_heads=28, num_key_value_heads=4),
    "head": [3584, 1024, 16, 2]}


def fetch(where=None):
    """The `base.Files`. where: HPSv3.safetensors, or a folder that holds it, or a hub repository (None: the authors').
    The tokenizer is the one beside the file, if there is one; otherwise Qwen2-VL's from the hub. Raises UserError if a
    file is neither here nor on the hub."""
    return base.fetch(where or HUB, FILE, VOCABULARIES, TOKENIZER, TOKENIZER_FILES)


# ----------------------------------------------------------------------------------------------- its pictures
def fitted(image):
    """A PIL picture, or a tensor [..., H, W], resized bicubically to about PIXELS: both sides are multiples of 28, and
    the picture's shape nearly stays. A tensor keeps its gradient."""
    height, width = TF.get_size(image)
    return TF.resize(image, smart_resize(height, width, 28, PIXELS, PIXELS), BICUBIC, antialias=True)


def patches(images, side=14):
    """Prepared images [B, 3, h, w] -> [B, N, 3 * 2 * side * side]: N patches, four neighbours after each other. The
    network reads films of two frames; a picture is both."""
    b, _, h, w = images.shape
    rows, columns = h // (MERGED * side), w // (MERGED * side)
    x = images.reshape(b, 3, rows, MERGED, side, columns, MERGED, side)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)                       # [B, rows, columns, 2, 2, 3, side, side]
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(b, rows * columns * MERGED**2, 6 * side**2)


class OnePicture(NamedTuple):
    """The tower's `cu_seqlens` for one picture, in place of a tensor [0, patches], whose numbers a GPU would have to
    send, and tensors of --plan do not have. The tower takes the differences of its neighbours, as a list."""
    patches: int

    def __getitem__(self, rows):
        return self

    def __sub__(self, other):
        return self

    def tolist(self):
        return [self.patches]


def positions(rows, columns, device):
    """The row and the column of each patch, in the order of `patches`: [rows * columns, 2]."""
    row = torch.arange(rows, device=device).view(-1, MERGED, 1, 1)
    column = torch.arange(columns, device=device).view(1, 1, -1, MERGED)
    both = torch.stack(torch.broadcast_tensors(row, column), -1)    # [rows / 2, 2, columns / 2, 2, 2]
    return both.transpose(1, 2).reshape(-1, 2)


def look(net, image):
    """What the vision tower says of a prepared image [3, h, w]: [h w / 28 / 28, D]."""
    tower = net["vision"]
    side = tower.config.patch_size
    _, height, width = image.shape
    x = patches(image[None], side)[0].to(tower.get_dtype())    # [N, 3 * 2 * side * side]
    seen = tower(x, None, position_ids=positions(height // side, width // side, x.device),
                 cu_seqlens=OnePicture(len(x)))
    return seen.pooler_output


# ------------------------------------------------------------------------------------------------ the network
def network(vision, language, head):
    """The three parts with the sizes of dicts like PUBLISHED, and random weights, in torch's default dtype."""
    layers = OrderedDict()
    for n, inputs, outputs in zip("035", head, head[1:], strict=False):    # 2 is a dropout
        layers[n] = nn.Linear(inputs, outputs, dtype=torch.float32)    # as in the authors' code
        if n != "5":
            layers[f"relu{n}"] = nn.ReLU()
    sections = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return nn.ModuleDict({
        "vision": Vision(transformers.models.qwen2_vl.Qwen2VLVisionConfig(**vision)),
        "language": Language(transformers.models.qwen2_vl.Qwen2VLTextConfig(
            rms_norm_eps=1e-6, rope_parameters=sections, bos_token_id=None, eos_token_id=None, **language)),
        "head": nn.Sequential(layers)})


def sizes(state):
    """The dicts of `network` that fit a state dict with the names of here."""
    def layers(start):
        return 1 + max(int(key[len(start):].split(".")[0]) for key in state if key.startswith(start))

    width, _, _, patch, _ = state["vision.patch_embed.proj.weight"].shape
    words, hidden = state["language.embed_tokens.weight"].shape
    first = "language.layers.0."
    return {
        "vision": dict(depth=layers("vision.blocks."), embed_dim=width, hidden_size=hidden,
                       num_heads=width // EYE_HEAD, patch_size=patch,
                       mlp_ratio=len(state["vision.blocks.0.mlp.fc1.weight"]) // width),
        "language": dict(vocab_size=words, hidden_size=hidden, num_hidden_layers=layers("language.layers."),
                         intermediate_size=len(state[first + "mlp.gate_proj.weight"]),
                         num_attention_heads=len(state[first + "self_attn.q_proj.weight"]) // HEAD,
                         num_key_value_heads=len(state[first + "self_attn.k_proj.weight"]) // HEAD),
        "head": [hidden, *(len(state[f"head.{n}.weight"]) for n in "035")]}


def without_weights(of, dtype):
    """`network` of sizes, in dtype, whose weights are not initialised, so that it takes no time."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            net = network(**of)
    finally:
        torch.set_default_dtype(usual)
    # Only the inputs of its layers are kept; the backward computes each again. A layer does so in training mode alone.
    net["language"].activation_checkpointing_enable({"use_reentrant": False})
    return net


@cache
def template():
    """The authors' text for a prompt, up to the token that the head reads. What they write after it cannot change that
    token: a word sees the words before it alone."""
    return (Path(__file__).parent / "hpsv3_prompt.txt").read_text()


class HPSv3(base.Reward):
    """The network, and its tokenizer. r is mu / 10 [ours], about 1; the head's second number, the spread, is unread."""
    unit = 10.0

    def __init__(self, net, tokenizer):
        super().__init__(net, None, MEAN, STD)
        net["language"].train()    # it has no dropout; see `without_weights`
        self.tokenizer = tokenizer

    def image_features(self, images):
        """images [B, 3, H, W] in [0, 1], of any device -> a list of B times [tokens, D], with gradient."""
        return self.features(normalised(fitted(images.to(self.device)), self.mean, self.std))

    def picture_features(self, pictures):
        """B PIL pictures of any sizes, resized in 8 bits as the authors do -> a list of B times [tokens, D]."""
        found = []
        for picture in pictures:
            x = moved(pixels(fitted(picture))[None], self.device)
            found += self.features(normalised(x, self.mean, self.std))
        return found

    def features(self, pixels):
        """Prepared pixels [B, 3, h, w] -> what the vision tower says of every token: a list of B times [tokens, D]."""
        return [look(self.model, image) for image in pixels]

    def ids(self, text, tokens):
        """The token ids of a text and a picture of so many tokens, a list; the head reads the last one."""
        words = f"{BEFORE}{PICTURE * tokens}{AFTER}{template().format(text_prompt=text)}"
        return self.tokenizer(words, add_special_tokens=False).input_ids

    def score(self, f, texts):
        """`features` and B texts -> r [B] float32. Positions count words and pictures' tokens alike, as in the authors'
        training; padding on the right is seen by none."""
        read = [self.ids(text, len(seen)) for text, seen in zip(texts, f, strict=True)]
        last = torch.tensor([len(ids) - 1 for ids in read])
        ids = torch.full((len(read), int(last.max()) + 1), read[0][0])
        for row, mine in zip(ids, read, strict=True):
            row[:len(mine)] = torch.tensor(mine)
        picture = (ids == self.tokenizer.convert_tokens_to_ids(PICTURE))[..., None]
        words = self.model["language"].embed_tokens(moved(ids, self.device))
        words = words.masked_scatter(moved(picture, self.device), torch.cat(f).to(words.dtype))
        hidden = self.model["language"](inputs_embeds=words, use_cache=False).last_hidden_state    # [B, L, D]
        rows = torch.arange(len(read), device=self.device)
        return self.model["head"](hidden[rows, moved(last, self.device)].float())[:, 0] / self.unit

    def reads_alike(self, one, other):
        """Whether two texts have the same tokens."""
        return self.ids(one, 1) == self.ids(other, 1)

    def compact(self, dtype):
        """It is in 2 bytes a number already, and reads every text anew: all of it stays."""


# ---------------------------------------------------------------------------------------------------- loading
def load(files, device):
    """The `HPSv3` of `Files`: in bf16 on a GPU, in float32 on a CPU. Raises UserError if a tensor is missing or
    unknown, or if the tokenizer does not fit."""
    device = torch.device(device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    state = {}
    for key, tensor in must_be_floats(load_file(files.weights, device=str(device))).items():
        if not key.startswith(UNREAD):
            name = re.sub(r"^[a-z_]+\.", lambda found: PARTS.get(found[0], found[0]), key)
            state[name] = tensor.to(torch.float32 if name.startswith("head.") else dtype)
    with torch.device(device):
        net = without_weights(sizes(state), dtype)
    base.fill(net, state)
    return HPSv3(net, tokenizer_of(files, len(state["language.embed_tokens.weight"])))


def tokenizer_of(files, words):
    """Qwen2-VL's tokenizer with the token REWARD as its last. Raises UserError if it has not so many words."""
    check_folder(files.tokenizer)
    try:
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(files.tokenizer)
    except Exception as error:
        raise UserError(f"{files.tokenizer}: holds no tokenizer of Qwen2-VL: {one_line(error)}") from error
    tokenizer.add_tokens([REWARD], special_tokens=True)
    if len(tokenizer) != words:
        raise UserError(f"{files.tokenizer}: a tokenizer of {len(tokenizer)} words; {files.weights} knows {words}")
    return tokenizer


# --------------------------------------------------------------------------------------------------- the plan
TEXT_TOKENS = 700    # of the template and a prompt of about 100 tokens, for --plan


def image_network(where=None):
    """The `ImageNetwork` of the published sizes, in bf16: a call reads one picture of 256 tokens with one text."""
    net = without_weights(PUBLISHED, torch.bfloat16).requires_grad_(False)
    net["language"].train()

    def call(grad=False):
        side = int(PIXELS**0.5)
        seen = look(net, torch.zeros(3, side, side, dtype=torch.bfloat16, requires_grad=grad))
        words = net["language"].embed_tokens(torch.zeros(1, TEXT_TOKENS, dtype=torch.long))
        read = torch.cat([seen[None], words], 1)
        return net["head"](net["language"](inputs_embeds=read, use_cache=False).last_hidden_state[:, -1].float())

    return base.ImageNetwork(net, call, times=1, texts=True)
