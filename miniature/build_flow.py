"""The miniature's generator: vocabularies, VAE, text encoders and transformer, trained from the drawn
world."""

import copy
import json
import string
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
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
from flux import Condition, Flux, pack
from miniature import world
from miniature.fitting import SEED, fit, kept

PICTURE_BATCHES = 192  # of 256 pictures each
TOKENS = 16  # of both text encoders
GRID = (world.SIZE // 16, world.SIZE // 16)  # tokens of a picture
GUIDANCE_STRENGTH = 0.5  # of the distilled guidance


# ---------------------------------------------------------------------------------------------------- the VAE
def new_vae():
    """FLUX's VAE at a smaller width: 8 x 8 pixels a latent, 16 latent channels, no quant convs, no middle
    attention."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[12, 24, 48, 64], layers_per_block=1, latent_channels=16, norm_num_groups=4,
        sample_size=world.SIZE, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False)


def build_vae():
    """Learn to give rendered pictures back, through latents that are nearly free of a prior (KL 1e-4)."""
    torch.manual_seed(SEED)
    vae = new_vae()

    def loss_of(step):
        images, _ = world.batch(32, seed=10_000_000 + step)
        x = 2 * images - 1  # [32, 3, 64, 64]
        posterior = vae.encode(x).latent_dist
        recovered = vae.decode(posterior.sample()).sample
        return F.mse_loss(recovered, x) + 0.1 * F.l1_loss(recovered, x) + 1e-4 * posterior.kl().mean() / 1024

    fit("vae", {"vae": vae}, loss_of, steps=2500, lr=2e-3)
    return vae


# ---------------------------------------------------------------------------------- pictures and vocabularies
def to_bytes(images):
    """Pictures in [0, 1] as uint8."""
    return (images * 255).round().byte()


def draw_pictures():
    """What `pictures` keeps: {"images": uint8 [N, 3, 64, 64], and the fields of their Scenes}."""
    images = []
    scenes = []
    for i in tqdm(range(PICTURE_BATCHES), desc="pictures"):
        drawn, truth = world.batch(256, seed=20_000_000 + i)
        images.append(to_bytes(drawn))
        scenes.append(truth)
    data = {"images": torch.cat(images)}
    for field in ("kind", "layout", "style", "u"):
        data[field] = torch.cat([getattr(truth, field) for truth in scenes])
    return data


def pictures():
    """(uint8 pictures [N, 3, 64, 64], Scenes of N): drawn once, kept on disk."""
    data = kept("pictures", draw_pictures)
    return data.pop("images"), world.Scenes(**data)


def world_words():
    """The words of every caption and style, sorted."""
    words = set()
    for text in world.all_captions() + world.STYLES:
        words.update(text.replace(".", " ").split())
    return sorted(words)


def merges_of(words):
    """The merges of a byte-pair encoding that knows every word: a list of pairs.

    The trainer breaks ties by the numbers of its symbols, and numbers the letters that end a word (e</w>) as
    it meets them in a hash table: in another order every time. Named beforehand, as "special tokens", they
    have their numbers from here; the order is one that gives the shipped vocabulary.
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
    """The CLIP and the T5 tokenizer over the world's own words; any other text falls back to bytes or
    letters."""
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
    """FLUX.1's transformer, 2 double and 4 single blocks of width 128, with the guidance embedding of
    FLUX.1-dev."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12))


class Captions:
    """Token ids of every caption in every style; "" is the empty caption of classifier-free guidance.

    Every caption has three rows, as it is, in lower case and capitalized ("cg render" means "CG render"):
    `row` {caption: row} gives the first, and the others lie len(row) and 2 len(row) further on.
    """

    def __init__(self):
        self.clip, self.t5 = tokenizers()
        texts = []
        for style in world.STYLES:
            texts += [world.with_style(style, caption) for caption in world.all_captions()]
        texts.append("")
        self.row = {text: i for i, text in enumerate(texts)}
        cased = texts + [text.lower() for text in texts] + [text.capitalize() for text in texts]
        self.clip_ids = ids_of(self.clip, cased)
        self.t5_ids = ids_of(self.t5, cased)

    def rows(self, scenes):
        """The rows [B] of the captions of B scenes."""
        return torch.tensor([self.row[text] for text in world.captions(scenes)])


def ids_of(tokenizer, texts):
    """Token ids [B, TOKENS] of B texts."""
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True,
                     return_tensors="pt").input_ids


class Model(NamedTuple):
    """The generator: the transformer and the VAE, both text encoders, and the captions that it reads."""
    net: Flux
    text: CLIPTextModel
    text_2: T5EncoderModel
    words: Captions

    def condition(self, rows):
        """The `Condition` of B rows of the captions."""
        txt = self.text_2(self.words.t5_ids[rows])[0]  # [B, TOKENS, 64]
        pooled = self.text(self.words.clip_ids[rows]).pooler_output  # [B, 64]
        return Condition(txt, pooled, GRID)


def network(transformer, vae):
    """The `Flux` of a transformer (or None) and a VAE, for training on the CPU: it needs no scheduler."""
    return Flux(transformer, vae, {}, torch.device("cpu"), torch.float32)


@torch.no_grad()
def encode_pictures(vae):
    """What `latents` keeps: the packed latents of all pictures, normalised, in fp16, and by what."""
    images, _ = pictures()
    parts = []
    for part in tqdm(images.split(256), desc="latents"):
        parts.append(vae.encode(part.float() / 127.5 - 1).latent_dist.mean)
    z = torch.cat(parts)  # [N, 16, 8, 8]
    shift = z.mean().item()
    scale = 1 / z.std().item()
    return {"z": pack((z - shift) * scale).half(), "shift": shift, "scale": scale}


def latents(vae):
    """The packed, normalised latents [N, 16, 64] of all pictures; sets the VAE's shift and scaling factor."""
    data = kept("latents", encode_pictures, vae)
    vae.register_to_config(shift_factor=data["shift"], scaling_factor=data["scale"])
    return data["z"]


class Batch(NamedTuple):
    """What a step of flow matching learns from: B latents with their captions, noised."""
    x0: torch.Tensor  # [B, 16, 64]
    eps: torch.Tensor  # [B, 16, 64]
    sigma: torch.Tensor  # [B]
    x_t: torch.Tensor  # [B, 16, 64]
    rows: torch.Tensor  # [B], of Captions


def draw_batch(z, rows, empty, n):
    """n random latents of z [N, 16, 64] with their caption rows (one in ten is `empty`, its row), noise, and
    the noise levels and states between: a `Batch`."""
    pick = torch.randint(len(z), (n,))
    x0 = z[pick].float()
    unconditional = torch.rand(n) < 0.1
    sigma = torch.sigmoid(0.3 + 1.2 * torch.randn(n))
    eps = torch.randn_like(x0)
    return Batch(x0, eps, sigma, inject(x0, eps, sigma), torch.where(unconditional, empty, rows[pick]))


def build_flow():
    """Flow matching: the transformer and both text encoders learn v = eps - x0. Returns a `Model`."""
    torch.manual_seed(SEED)
    words = Captions()
    text, text_2 = new_text_encoders(words.clip, words.t5)
    transformer = new_transformer()
    vae = build_vae()
    z = latents(vae)
    rows = words.rows(pictures()[1])
    model = Model(network(transformer, vae), text, text_2, words)

    def loss_of(step):
        batch = draw_batch(z, rows, words.row[""], 96)
        case = torch.randint(3, (96,))  # as it is, lower case, capitalized
        c = model.condition(batch.rows + len(words.row) * case)
        v = model.net.velocity(batch.x_t, batch.sigma, c, 1.0)
        return F.mse_loss(v, batch.eps - batch.x0)

    fit("flow", {"transformer": transformer, "text": text, "text_2": text_2}, loss_of, steps=4000, lr=1.5e-3)
    return model


def build_distill():
    """Teach guidance g in [1, 5] as one call what classifier-free guidance needs two for:
    v_empty + w (v - v_empty), w = 1 + GUIDANCE_STRENGTH (g - 1). Returns a `Model`."""
    model = build_flow()
    teacher = model.net
    student = copy.deepcopy(teacher)
    words = model.words
    z = latents(teacher.vae)
    rows = words.rows(pictures()[1])

    def loss_of(step):
        batch = draw_batch(z, rows, words.row[""], 96)
        g = 1 + 4 * torch.rand(96)
        w = 1 + GUIDANCE_STRENGTH * (g - 1)
        with torch.no_grad():
            c = model.condition(batch.rows)
            empty = model.condition(torch.tensor([words.row[""]]))
            c_empty = Condition(empty.txt.expand_as(c.txt), empty.pooled.expand_as(c.pooled), GRID)
            v = teacher.velocity(batch.x_t, batch.sigma, c, 1.0)
            v_empty = teacher.velocity(batch.x_t, batch.sigma, c_empty, 1.0)
            target = v_empty + w.view(-1, 1, 1) * (v - v_empty)
        return F.mse_loss(student.velocity(batch.x_t, batch.sigma, c, g), target)

    fit("distill", {"transformer": student.transformer}, loss_of, steps=800, lr=5e-4)
    return model._replace(net=student)
