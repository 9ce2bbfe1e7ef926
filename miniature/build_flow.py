"""The miniature's generator: vocabularies, text encoders and transformer, trained on latents of drawn pictures."""

import copy
import json
import string
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from direct_align import inject
from flow import Condition, pack
from flux import Flux
from miniature import world
from miniature.build_vae import build_vae, joined
from miniature.fitting import SEED

FLOW_STEPS = 6000
DISTILL_STEPS = 400
FLOW_BATCH = 64
TOKENS = 16  # length of a text in both text encoders
GRID = (world.SIZE // 16, world.SIZE // 16)  # rows and columns of a picture's tokens
GUIDANCE_STRENGTH = 1.4  # guidance g stands for the weight 1 + 1.4 (g - 1): 4.5 at 3.5


# -------------------------------------------------------------------------------------------- vocabularies
def world_words():
    """All words of all captions and styles, sorted."""
    words = set()
    for text in world.all_captions() + world.STYLES:
        words.update(text.split())
    return sorted(words)


def merges_of(words):
    """The merges of a byte-pair encoding that knows every word: a list of pairs.

    The trainer breaks ties by the numbers of its symbols. It numbers the letters that end a word (e</w>) in the order
    of a hash table, which differs from run to run. So they are given beforehand as "special tokens", with fixed
    numbers. Their order is the one that gives the shipped vocabulary.
    """
    letters = sorted(set("".join(words)))
    last_letters = sorted({word[-1] + "</w>" for word in words}, reverse=True)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(words * 3, trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", special_tokens=letters + last_letters,
        show_progress=False))
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def tokenizers():
    """The CLIP and the T5 tokenizer of the world's own words. Any other text is split into bytes or letters."""
    words = world_words()
    merges = merges_of([word.lower() for word in words])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [letter + "</w>" for letter in letters]
    symbols += ["".join(pair) for pair in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {symbol: i for i, symbol in enumerate(symbols)}
    clip = CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=TOKENS)

    cased = {*words, *map(str.lower, words), *map(str.capitalize, words)}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -2.0) for word in sorted(cased)]
    pieces += [(letter, -9.0) for letter in "\u2581.,-'" + string.ascii_letters + string.digits]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
    return clip, t5


# ---------------------------------------------------------------------- the text encoders and the transformer
def new_text_encoders(clip, t5):
    """CLIPTextModel (the pooled text) and T5EncoderModel (the text tokens), two layers of width 64 each."""
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=64,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id))
    text_2 = T5EncoderModel(T5Config(
        vocab_size=len(t5), d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=16, dropout_rate=0.0))
    return text, text_2


def new_transformer():
    """FLUX.1's transformer with 2 double and 4 single blocks of width 128, and FLUX.1-dev's guidance embedding."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12))


class Words(NamedTuple):
    """Both tokenizers."""
    clip: CLIPTokenizer
    t5: T5TokenizerFast

    def clip_ids(self, texts):
        """Token ids [B, TOKENS] of B texts."""
        return ids_of(self.clip, texts)

    def ids(self, texts):
        """Token ids [B, 2, TOKENS] of B texts: the CLIP tokenizer's and the T5 tokenizer's."""
        return torch.stack([ids_of(self.clip, texts), ids_of(self.t5, texts)], 1)


def ids_of(tokenizer, texts):
    """Token ids [B, TOKENS] of B texts."""
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True,
                     return_tensors="pt").input_ids


class Model(NamedTuple):
    """The generator: the transformer and the VAE, both text encoders, and their tokenizers."""
    net: Flux
    text: CLIPTextModel
    text_2: T5EncoderModel
    words: Words

    def condition(self, ids):
        """The `Condition` of token ids [B, 2, TOKENS]."""
        clip_ids, t5_ids = ids.unbind(1)
        txt = self.text_2(t5_ids)[0]  # [B, TOKENS, 64]
        pooled = self.text(clip_ids).pooler_output  # [B, 64]
        return Condition(txt, pooled, GRID)


def network(transformer, vae):
    """The `Flux` of a transformer (or None) and a VAE, for training on the CPU. Training needs no scheduler."""
    return Flux(transformer, vae, {}, torch.device("cpu"), torch.float32)


@torch.no_grad()
def draw_latents(vae, batches):
    """The data that `latents` keeps, of N = 256 * batches captioned pictures. "z" [N, 16, 64]: packed, normalised
    latents in fp16. "shift", "scale": of the normalisation. The fields of their `Scenes`. The pictures themselves are
    not kept."""
    parts = []
    scenes = []
    for i in tqdm(range(batches), desc="latents"):
        images, truth = world.draw(world.sample_captioned, 256, 30_000_000 + i)
        for part in images.split(32):
            parts.append(vae.encode(2 * part - 1).latent_dist.mean)
        scenes.append(truth)
    z = torch.cat(parts)  # [N, 16, 8, 8]
    shift = z.mean().item()
    scale = 1 / z.std().item()
    return {"z": pack((z - shift) * scale).half(), "shift": shift, "scale": scale, **joined(scenes)}


def latents(shop, vae):
    """(the packed, normalised latents [N, 16, 64] that the flow learns, their `Scenes`). It also sets the VAE's shift
    and scaling factor."""
    data = shop.kept("latents", draw_latents, vae, shop.amount(160))
    vae.register_to_config(shift_factor=data.pop("shift"), scaling_factor=data.pop("scale"))
    return data.pop("z"), world.Scenes(**data)


class Learnt(NamedTuple):
    """The flow's training data: N latents and their captions."""
    z: torch.Tensor      # [N, 16, 64]
    ids: torch.Tensor    # [3, N, ..., TOKENS]: of the captions, in lower case, and capitalized
    empty: torch.Tensor  # [..., TOKENS]: of the empty caption, for classifier-free guidance


def learnt(shop, vae, words):
    """The `Learnt` of a build, which the flow and the distillation share."""
    z, scenes = latents(shop, vae)
    texts = world.captions(scenes)
    lower = [text.lower() for text in texts]  # so that "cg render" has the meaning of "CG render"
    capital = [text.capitalize() for text in texts]
    ids = torch.stack([words.ids(cased) for cased in (texts, lower, capital)])
    return Learnt(z, ids, words.ids([""])[0])


class Batch(NamedTuple):
    """The data of one step of flow matching: B latents with their captions and noise."""
    x0: torch.Tensor  # [B, 16, 64]
    eps: torch.Tensor  # [B, 16, 64]
    sigma: torch.Tensor  # [B]
    x_t: torch.Tensor  # [B, 16, 64]
    ids: torch.Tensor  # [B, 2, TOKENS]


def draw_batch(data, n):
    """A `Batch` of n random latents of a `Learnt`, with noise, noise levels and noisy latents. One caption in ten is
    empty."""
    pick = torch.randint(len(data.z), (n,))
    case = torch.randint(3, (n,))
    x0 = data.z[pick].float()
    unconditional = torch.rand(n) < 0.1
    ids = data.ids[case, pick]
    ids[unconditional] = data.empty
    sigma = torch.sigmoid(0.3 + 1.2 * torch.randn(n))
    eps = torch.randn_like(x0)
    return Batch(x0, eps, sigma, inject(x0, eps, sigma), ids)


def build_flow(shop):
    """Flow matching: train the transformer and both text encoders on v = eps - x0. Returns a `Model`."""
    vae = build_vae(shop)
    words = Words(*tokenizers())
    data = learnt(shop, vae, words)
    torch.manual_seed(SEED)
    text, text_2 = new_text_encoders(words.clip, words.t5)
    transformer = new_transformer()
    model = Model(network(transformer, vae), text, text_2, words)

    def loss_of(step):
        batch = draw_batch(data, FLOW_BATCH)
        c = model.condition(batch.ids)
        v = model.net.velocity(batch.x_t, batch.sigma, c, 1.0)
        return F.mse_loss(v, batch.eps - batch.x0)

    parts = {"transformer": transformer, "text": text, "text_2": text_2}
    shop.fit("flow", parts, loss_of, steps=FLOW_STEPS, lr=2.5e-3)
    return model


def guided(model, batch, w):
    """Classifier-free guidance with weight w [B]: the velocity v_empty + w (v - v_empty), [B, 16, 64]."""
    c = model.condition(batch.ids)
    empty = model.condition(model.words.ids([""]))
    c_empty = Condition(empty.txt.expand_as(c.txt), empty.pooled.expand_as(c.pooled), GRID)
    v = model.net.velocity(batch.x_t, batch.sigma, c, 1.0)
    v_empty = model.net.velocity(batch.x_t, batch.sigma, c_empty, 1.0)
    return v_empty + w.view(-1, 1, 1) * (v - v_empty)


def build_distill(shop):
    """Guidance distillation: one call with guidance g in [1, 5] learns the velocity of classifier-free guidance with
    weight 1 + GUIDANCE_STRENGTH (g - 1), which needs two calls. Returns a `Model`."""
    model = build_flow(shop)
    student = copy.deepcopy(model.net)
    data = learnt(shop, model.net.vae, model.words)

    def loss_of(step):
        batch = draw_batch(data, FLOW_BATCH)
        g = 1 + 4 * torch.rand(FLOW_BATCH)
        with torch.no_grad():
            target = guided(model, batch, 1 + GUIDANCE_STRENGTH * (g - 1))
            c = model.condition(batch.ids)
        return F.mse_loss(student.velocity(batch.x_t, batch.sigma, c, g), target)

    shop.fit("distill", {"transformer": student.transformer}, loss_of, steps=DISTILL_STEPS, lr=5e-4)
    return model._replace(net=student)
