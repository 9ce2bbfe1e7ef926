"""DeQA-Score (arXiv 2501.11561): how good a picture looks, by the next word that a language model predicts.

The model is mPLUG-Owl2, 8.2 B parameters. It has a CLIP-like vision tower, an abstractor that reads the tower's
patches with 64 queries, and LLaMA-2-7B. The language model's keys, values and norms have one set of weights for text
and one for vision. DeQA-Score's released code needs transformers 4.36; this is the same network in plain torch.

Symbols, with the released model's sizes:  B pictures, P = 1025 tokens (patches and one class token), Q = 64 queries,
V = Q + 1 visual tokens, L = 92 tokens of text and picture, D the width of the part in question.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN as MEAN
from transformers.image_utils import OPENAI_CLIP_STD as STD

from engine.errors import UserError, one_line
from engine.files import read_json
from engine.hub import fetched
from engine.model.configs import must_be_floats
from rewards.base import Column
from rewards.pictures import exact

COLUMNS = {"deqa": Column("DeQA", ".3f")}
HUB = "zhiyuanyou/DeQA-Score-Mix3"
FILES = ("model*.safetensors", "pytorch_model*.bin")

# The question never changes, so no tokenizer is needed: these are its ids by the authors' tokenizer.model. It is the
# question of the released code's Scorer. Their iqa_eval.py has a space in place of the line break after the picture.
# "<s>USER: How would you rate the quality of this image?\n", before the picture
BEFORE = (1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13)
# "\nASSISTANT: The quality of the image is", after it
AFTER = (29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338)
# The words that may follow: (id, mark).
LEVELS = {"excellent": (15129, 5), "good": (1781, 4), "fair": (6534, 3), "poor": (6460, 2), "bad": (4319, 1)}


def fetch(where=None):
    """The local folder of the weights, from `where` (a folder or a hub repository; None: the authors'). If a repository
    has both kinds of weight files, only the safetensors are downloaded. Raises UserError if it has neither."""
    for files in FILES:
        folder = fetched(where or HUB, ["config.json", files])
        if list(folder.glob(files)):
            return folder
    raise UserError(f"{folder}: no {' or '.join(FILES)} there")


def load(folder, args, device):
    """The `DeQA` scorer of a folder. Raises UserError if the folder does not hold DeQA-Score."""
    return DeQA(folder, device)


# ------------------------------------------------------------------------------------------------ the network
def attend(q, k, v, causal=False):
    """Attention: q [B, N, heads, d], k and v [B, M, heads, d] -> [B, N, heads * d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def group(**members):
    """A module that holds modules and parameters under their names in the checkpoint."""
    module = nn.Module()
    for name, member in members.items():
        setattr(module, name, member)
    return module


def linear(i, o):
    return nn.Linear(i, o, bias=False)


def empty(*shape):
    return nn.Parameter(torch.empty(*shape))


def layers(kind, c, *more):
    """A list of as many layers of a kind as the config `c` says."""
    return nn.ModuleList(kind(c, *more) for _ in range(c["num_hidden_layers"]))


class VisionLayer(nn.Module):
    """[B, P, D] -> [B, P, D]."""

    def __init__(self, c):
        super().__init__()
        D = c["hidden_size"]
        self.heads = c["num_attention_heads"]
        self.input_layernorm = nn.LayerNorm(D, c["layer_norm_eps"])
        self.self_attn = group(query_key_value=nn.Linear(D, 3 * D), dense=nn.Linear(D, D))
        self.post_attention_layernorm = nn.LayerNorm(D, c["layer_norm_eps"])
        self.mlp = group(fc1=nn.Linear(D, c["intermediate_size"]), fc2=nn.Linear(c["intermediate_size"], D))

    def forward(self, x):
        qkv = self.self_attn.query_key_value(self.input_layernorm(x))
        x = x + self.self_attn.dense(attend(*qkv.unflatten(-1, (self.heads, 3, -1)).unbind(-2)))
        h = self.mlp.fc1(self.post_attention_layernorm(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))


class Vision(nn.Module):
    """Normalised pixels [B, 3, size, size] -> [B, P, D]."""

    def __init__(self, c):
        super().__init__()
        D = c["hidden_size"]
        patch = c["patch_size"]
        eps = c["layer_norm_eps"]
        self.patches = 1 + (c["image_size"] // patch) ** 2
        self.embeddings = group(
            patch_embed=nn.Conv2d(3, D, patch, patch, bias=False), cls_token=empty(1, 1, D),
            position_embedding=empty(1, self.patches, D), pre_layernorm=nn.LayerNorm(D, eps))
        self.encoder = group(layers=layers(VisionLayer, c))
        self.post_layernorm = nn.LayerNorm(D, eps)

    def forward(self, pixels):
        e = self.embeddings
        x = e.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([e.cls_token.expand(len(x), -1, -1), x], 1) + e.position_embedding
        x = e.pre_layernorm(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class AbstractorLayer(nn.Module):
    """Queries [B, Q, D] attend to themselves and to the picture [B, P, D] -> [B, Q, D]."""

    def __init__(self, c, patches):
        super().__init__()
        D = c["hidden_size"]
        wide = c["intermediate_size"]
        self.heads = c["num_attention_heads"]
        attention = group(query=nn.Linear(D, D), key=nn.Linear(c["encoder_hidden_size"], D),
                          value=nn.Linear(c["encoder_hidden_size"], D),
                          q_pos_embed=empty(c["num_learnable_queries"], D), k_pos_embed=empty(patches, D))
        mlp = group(w1=nn.Linear(D, wide), w2=nn.Linear(wide, D), w3=nn.Linear(D, wide),
                    ffn_ln=nn.LayerNorm(wide, c["layer_norm_eps"]))
        # The three norms below use torch's default epsilon, 1e-5, as the released code does.
        self.crossattention = group(
            norm1=nn.LayerNorm(D), normk=nn.LayerNorm(D), attention=attention,
            output=group(out_proj=nn.Linear(D, D), norm2=nn.LayerNorm(D), mlp=mlp))

    def forward(self, x, picture):
        c = self.crossattention
        a = c.attention
        out = c.output
        x = c.norm1(x)                                        # the residual below adds to this, not to the input
        seen = torch.cat([x, c.normk(picture)], 1)            # [B, Q + P, D]
        place = torch.cat([a.q_pos_embed, a.k_pos_embed])     # [Q + P, D]
        q = a.query(x + a.q_pos_embed)
        k = a.key(seen + place)
        v = a.value(seen)
        x = x + out.out_proj(attend(*(h.unflatten(-1, (self.heads, -1)) for h in (q, k, v))))
        h = out.norm2(x)
        return x + out.mlp.w2(out.mlp.ffn_ln(F.silu(out.mlp.w1(h)) * out.mlp.w3(h)))


class Abstractor(nn.Module):
    """The vision tower's output [B, P, D] -> V tokens for the language model, [B, V, its D]."""

    def __init__(self, c, patches, width):
        super().__init__()
        self.query_embeds = empty(1, c["num_learnable_queries"], c["hidden_size"])
        self.encoder = group(layers=layers(AbstractorLayer, c, patches))
        self.visual_fc = nn.Linear(c["hidden_size"], width)
        self.vit_eos = empty(1, 1, width)

    def forward(self, picture):
        x = self.query_embeds.expand(len(picture), -1, -1)
        for layer in self.encoder.layers:
            x = layer(x, picture)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(len(x), -1, -1)], 1)


class Multiway(nn.Module):
    """Two modules in one place: `text` for the tokens before and after the picture, `vision` for the picture's V
    tokens. x [B, L, D] -> [B, L, D']."""

    def __init__(self, text, vision):
        super().__init__()
        self.multiway = nn.ModuleList([text, vision])

    def forward(self, x):
        text, vision = self.multiway
        a = len(BEFORE)
        b = x.shape[1] - len(AFTER)
        return torch.cat([text(x[:, :a]), vision(x[:, a:b]), text(x[:, b:])], 1)


def rotated(x, cos, sin):
    """Rotary position embedding, which pairs the two halves of d: x [B, L, heads, d], cos and sin [L, 1, d]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class LanguageLayer(nn.Module):
    """[B, L, D] -> [B, L, D], causal."""

    def __init__(self, c):
        super().__init__()
        D = c["hidden_size"]
        wide = c["intermediate_size"]
        self.heads = c["num_attention_heads"]
        eps = c["rms_norm_eps"]
        self.input_layernorm = Multiway(nn.RMSNorm(D, eps), nn.RMSNorm(D, eps))
        self.post_attention_layernorm = Multiway(nn.RMSNorm(D, eps), nn.RMSNorm(D, eps))
        self.self_attn = group(q_proj=linear(D, D), k_proj=Multiway(linear(D, D), linear(D, D)),
                               v_proj=Multiway(linear(D, D), linear(D, D)), o_proj=linear(D, D))
        self.mlp = group(gate_proj=linear(D, wide), up_proj=linear(D, wide), down_proj=linear(wide, D))

    def forward(self, x, cos, sin):
        a = self.self_attn
        mlp = self.mlp
        h = self.input_layernorm(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)) for p in (a.q_proj, a.k_proj, a.v_proj))
        x = x + a.o_proj(attend(rotated(q, cos, sin), rotated(k, cos, sin), v, causal=True))
        h = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


class Network(nn.Module):
    """Normalised pixels [B, 3, size, size] -> logits of the five levels [B, 5] float32, excellent first.

    `c` is the checkpoint's config.json. Every parameter has its name in the checkpoint. Raises UserError for
    rope_scaling."""

    def __init__(self, c):
        super().__init__()
        if c.get("rope_scaling"):
            raise UserError("rope_scaling is not supported")
        D = c["hidden_size"]
        vision = Vision(c["visual_config"]["visual_model"])
        abstractor = Abstractor(c["visual_config"]["visual_abstractor"], vision.patches, D)
        self.model = group(
            embed_tokens=nn.Embedding(c["vocab_size"], D), vision_model=vision, visual_abstractor=abstractor,
            layers=layers(LanguageLayer, c), norm=nn.RMSNorm(D, c["rms_norm_eps"]))
        self.lm_head = nn.Linear(D, c["vocab_size"], bias=False)
        self.rope_theta = c.get("rope_theta", 10000.0)
        self.rope_dim = D // c["num_attention_heads"]

    def words(self, ids, batch, device):
        """N token ids -> their embeddings [batch, N, D]."""
        return self.model.embed_tokens(torch.tensor(ids, device=device)).expand(batch, -1, -1)

    def forward(self, pixels):
        m = self.model
        device = pixels.device
        picture = m.visual_abstractor(m.vision_model(pixels))   # [B, V, D]
        x = torch.cat([self.words(BEFORE, len(pixels), device), picture,
                       self.words(AFTER, len(pixels), device)], 1)  # [B, L, D]
        frequencies = self.rope_theta ** -(torch.arange(0, self.rope_dim, 2, device=device) / self.rope_dim)
        angles = torch.outer(torch.arange(x.shape[1], device=device), frequencies).repeat(1, 2)[:, None]
        cos = angles.cos().to(x.dtype)                          # [L, 1, d]
        sin = angles.sin().to(x.dtype)
        for layer in m.layers:
            x = layer(x, cos, sin)
        levels = self.lm_head.weight[[token for token, _ in LEVELS.values()]]
        return F.linear(m.norm(x[:, -1]), levels).float()       # only five of the 92 x 32000 logits are needed


def squared(picture):
    """A PIL RGB picture, padded with CLIP's mean colour to a square of its longer side (released code)."""
    side = max(picture.size)
    colour = tuple(int(255 * m) for m in MEAN)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def tensors(folder):
    """Yields (name, tensor) for every tensor in the folder's weight files, one at a time."""
    safe, pickled = (sorted(Path(folder).glob(files)) for files in FILES)
    for path in safe:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    if safe:
        return
    for path in pickled:
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()


class DeQA:
    """DeQA-Score as a scorer. dtype: None for float16 on a GPU, as the authors use, and float32 on a CPU.

    Raises UserError if the folder's weights are not exactly those that its config.json describes.
    """

    def __init__(self, folder, device="cpu", dtype=None):
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
        try:
            config = read_json(Path(folder) / "config.json")
            with torch.device("meta"):          # takes no memory; the tensors of the files become the parameters
                self.network = Network(config).eval().requires_grad_(False)
            self.size = config["visual_config"]["visual_model"]["image_size"]
            own = self.network.state_dict()
            found = {}
            for name, tensor in tensors(folder):
                if name.endswith("rotary_emb.inv_freq"):        # a computed table that older transformers saved
                    continue
                if name not in own or tensor.shape != own[name].shape:
                    raise UserError(f"{name} {list(tensor.shape)} is not its own")
                must_be_floats({name: tensor})
                found[name] = tensor.to(self.device, self.dtype)
            if missing := sorted(own.keys() - found.keys()):
                raise UserError(f"{missing[0]} is missing")
        except Exception as error:
            what = f"config.json lacks {error}" if isinstance(error, KeyError) else one_line(error)
            raise UserError(f"{folder}: cannot be loaded as DeQA-Score: {what}") from error
        self.network.load_state_dict(found, assign=True)

    @torch.no_grad()
    def __call__(self, pictures, prompts=None):
        """B PIL pictures (RGB, any size) -> {"deqa": [B] float32 on the CPU}, in [1, 5], higher is better. prompts are
        not read, because the question is about the picture alone."""
        pixels = [exact(squared(picture), self.size, MEAN, STD) for picture in pictures]
        logits = self.network(torch.stack(pixels).to(self.device, self.dtype))
        marks = torch.tensor([float(mark) for _, mark in LEVELS.values()], device=self.device)
        return {"deqa": (logits.softmax(-1) @ marks).cpu()}
