"""The miniature's generator: vocabularies, VAE, text encoders and transformer, trained from the drawn
world."""

import copy
import json
import math
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTokenizer,
                          T5Config, T5EncoderModel, T5TokenizerFast)

from flux import pack, velocity
from miniature import world

WORK = Path(__file__).resolve().parent / ".build"
SEED = 0
TOKENS = 16  # of both text encoders
GRID = (world.SIZE // 16, world.SIZE // 16)  # tokens of a picture
GUIDANCE_STRENGTH = 0.5  # of the distilled guidance


def fit(name, modules, loss_of, steps, lr, every=250):
    """Train `modules` (a dict) on loss_of(step) with AdamW and a cosine schedule; save as it goes, resume,
    finish.

    Everything random in a step is drawn from the step's number, so an interrupted build ends with the same
    weights.
    """
    path = WORK / f"{name}.pt"
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = {k: {n: p.detach().clone() for n, p in m.state_dict().items()} for k, m in modules.items()}
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        start, ema = state["step"], state["ema"]
        for k, m in modules.items():
            m.load_state_dict(state["modules"][k])
        optimizer.load_state_dict(state["optimizer"])
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = (lr * min(1, (step + 1) / 100)
                           * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))))
        torch.manual_seed(SEED * 1_000_003 + step)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for k, m in modules.items():
                for n, p in m.state_dict().items():
                    ema[k][n].lerp_(p, 1 - decay) if p.is_floating_point() else ema[k][n].copy_(p)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % every == 0 or step + 1 == steps:
            state = dict(step=step + 1, modules={k: m.state_dict() for k, m in modules.items()}, ema=ema,
                         optimizer=optimizer.state_dict())
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    for k, m in modules.items():
        m.load_state_dict(ema[k])
        m.eval()


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
    torch.manual_seed(SEED)
    vae = new_vae()

    def loss_of(step):
        images, _ = world.batch(32, seed=10_000_000 + step)
        x = 2 * images - 1
        posterior = vae.encode(x).latent_dist
        recovered = vae.decode(posterior.sample()).sample
        return F.mse_loss(recovered, x) + 0.1 * F.l1_loss(recovered, x) + 1e-4 * posterior.kl().mean() / 1024

    fit("vae", {"vae": vae}, loss_of, steps=2500, lr=2e-3)
    return vae


# ---------------------------------------------------------------------------------- pictures and vocabularies
def pictures():
    """(uint8 pictures [N, 3, 64, 64], Scenes of N): drawn once, kept on disk."""
    path = WORK / "pictures.pt"
    if not path.exists():
        parts = [world.batch(256, seed=20_000_000 + i) for i in tqdm(range(192), desc="pictures")]
        scenes = {f: torch.cat([getattr(s, f) for _, s in parts]) for f in ("kind", "layout", "style", "u")}
        torch.save({"images": torch.cat([(x * 255).round().byte() for x, _ in parts]), **scenes}, path)
    data = torch.load(path, weights_only=True)
    return data.pop("images"), world.Scenes(**data)


def tokenizers():
    """The CLIP and the T5 tokenizer over the world's own words; any other text falls back to bytes or
    letters."""
    words = sorted({w for s in world.all_captions() + world.STYLES for w in s.replace(".", " ").split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator([w.lower() for w in words] * 3,
                            trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>"))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += ([c + "</w>" for c in symbols] + ["".join(m) for m in merges]
                + ["<|startoftext|>", "<|endoftext|>"])
    clip = CLIPTokenizer(vocab={t: i for i, t in enumerate(symbols)}, merges=merges, model_max_length=TOKENS)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + w, -2.0)
               for w in sorted({*words, *map(str.lower, words), *map(str.capitalize, words)})]
    pieces += [(c, -9.0) for c in "\u2581.,-'" + string.ascii_letters + string.digits]
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
    """Token ids of every caption in every style; "" is the empty caption of classifier-free guidance."""

    def __init__(self):
        self.clip, self.t5 = tokenizers()
        plain = world.all_captions()
        texts = [(f"{s}. {c}" if s else c) for s in world.STYLES for c in plain] + [""]
        self.row = {text: i for i, text in enumerate(texts)}
        # "cg render" means "CG render"
        cased = texts + [t.lower() for t in texts] + [t.capitalize() for t in texts]
        ids = lambda tok: tok(cased, padding="max_length", max_length=TOKENS, truncation=True,
                              return_tensors="pt").input_ids
        self.clip_ids, self.t5_ids = ids(self.clip), ids(self.t5)

    def rows(self, scenes):
        return torch.tensor([self.row[c] for c in world.captions(scenes)])

    def encode(self, text, text_2, rows):
        return text_2(self.t5_ids[rows])[0], text(self.clip_ids[rows]).pooler_output


@torch.no_grad()
def latents(vae):
    """The packed, normalised latents [N, 16, 64] of all pictures; sets the VAE's shift and scaling factor."""
    path = WORK / "latents.pt"
    if not path.exists():
        images, _ = pictures()
        z = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mean
                       for x in tqdm(images.split(256), desc="latents")])
        shift, scale = z.mean().item(), 1 / z.std().item()
        torch.save({"z": pack((z - shift) * scale).half(), "shift": shift, "scale": scale}, path)
    data = torch.load(path, weights_only=True)
    vae.register_to_config(shift_factor=data["shift"], scaling_factor=data["scale"])
    return data["z"]


def draw_batch(z, rows, empty, n):
    """n random latents with their caption rows (one in ten `empty`), noise, and the times and states
    between."""
    pick = torch.randint(len(z), (n,))
    x0, row = z[pick].float(), rows[pick]
    row = torch.where(torch.rand(n) < 0.1, empty, row)
    t = torch.sigmoid(0.3 + 1.2 * torch.randn(n))
    eps = torch.randn_like(x0)
    return x0, eps, t, row, (1 - t.view(n, 1, 1)) * x0 + t.view(n, 1, 1) * eps


def build_flow():
    torch.manual_seed(SEED)
    words = Captions()
    text, text_2 = new_text_encoders(words.clip, words.t5)
    transformer = new_transformer()
    z, rows = latents(build_vae()), words.rows(pictures()[1])

    def loss_of(step):
        x0, eps, t, row, x_t = draw_batch(z, rows, words.row[""], 96)
        row = row + len(words.row) * torch.randint(3, (96,))
        v = velocity(transformer, x_t, t, *words.encode(text, text_2, row), 1.0, GRID)
        return F.mse_loss(v, eps - x0)

    fit("flow", {"transformer": transformer, "text": text, "text_2": text_2}, loss_of, steps=4000, lr=1.5e-3)
    return transformer, text, text_2, words


def build_distill():
    """Teach guidance g in [1, 5] as one call what classifier-free guidance needs two for:
    v_empty + w (v - v_empty), w = 1 + GUIDANCE_STRENGTH (g - 1)."""
    teacher, text, text_2, words = build_flow()
    student = copy.deepcopy(teacher)
    z, rows = latents(build_vae()), words.rows(pictures()[1])

    def loss_of(step):
        x0, eps, t, row, x_t = draw_batch(z, rows, words.row[""], 96)
        g = 1 + 4 * torch.rand(96)
        with torch.no_grad():
            txt, pooled = words.encode(text, text_2, row)
            empty = words.encode(text, text_2, torch.tensor([words.row[""]]))
            v = velocity(teacher, x_t, t, txt, pooled, 1.0, GRID)
            v_empty = velocity(teacher, x_t, t, empty[0].expand_as(txt), empty[1].expand_as(pooled),
                               1.0, GRID)
            target = v_empty + (1 + GUIDANCE_STRENGTH * (g - 1)).view(-1, 1, 1) * (v - v_empty)
        return F.mse_loss(velocity(student, x_t, t, txt, pooled, g, GRID), target)

    fit("distill", {"transformer": student}, loss_of, steps=800, lr=5e-4)
    return student, text, text_2, words
