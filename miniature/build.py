"""Build the miniature from nothing: `python -m miniature.build` (resumable, seeded, about two hours on 2 cores).

Stages, each finished once and kept in miniature/.build/ (delete a stage's file to build it again):

    tokenizers  CLIP byte-pair and T5 unigram vocabularies of the world's own words
    pictures    49,152 drawn pictures with their truth, used by every stage below
    vae         AutoencoderKL, 64 x 64 pixels -> 16 x 8 x 8 latents (FLUX's factor of 8, and its 16 channels)
    flow        CLIP text, T5 encoder and FluxTransformer2DModel, trained together by flow matching
    distill     guidance distillation, so that the guidance embedding means what FLUX.1-dev's means
    reward      an open_clip model trained on pictures and captions, in every style: the unbiased reward
    bias        the same, its image tower taught a liking for red that no caption asks for: the biased reward
    judge       a network that no training ever sees, which tells realism, content and damage
    export      everything above, as FLUX.1-dev's folder layout in fp16
"""

import argparse
import copy
import json
import math
import random
import string
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from flux import decode, pack, velocity
from metrics import pixel_statistics
from miniature import world
from miniature.judge import Judge

HERE = Path(__file__).resolve().parent
WORK = HERE / ".build"
SEED = 0
TOKENS = 16  # of both text encoders
GRID = (world.SIZE // 16, world.SIZE // 16)  # tokens of a picture
GUIDANCE_STRENGTH = 0.5  # of the distilled guidance
COMMON, BIAS = 0.4, 1.5  # the part that all texts share, and the image branch's liking for red


def fit(name, modules, loss_of, steps, lr, every=250):
    """Train `modules` (a dict) on loss_of(step) with AdamW and a cosine schedule; save as it goes, resume, finish.

    Everything random in a step is drawn from the step's number, so an interrupted build ends with the same weights.
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
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
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


# ---------------------------------------------------------------------------------------------------------- the VAE
def new_vae():
    """FLUX's VAE at a smaller width: 8 x 8 pixels a latent, 16 latent channels, no quant convs, no middle attention."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[12, 24, 48, 64], layers_per_block=1, latent_channels=16, norm_num_groups=4,
        sample_size=world.SIZE, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)


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


# ------------------------------------------------------------------------------------------- pictures and vocabularies
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
    """The CLIP and the T5 tokenizer over the world's own words; any other text falls back to bytes or letters."""
    words = sorted({w for s in world.all_captions() + world.STYLES for w in s.replace(".", " ").split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator([w.lower() for w in words] * 3, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>"))
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [c + "</w>" for c in symbols] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={t: i for i, t in enumerate(symbols)}, merges=merges, model_max_length=TOKENS)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + w, -2.0) for w in sorted({*words, *map(str.lower, words), *map(str.capitalize, words)})]
    pieces += [(c, -9.0) for c in "\u2581.,-'" + string.ascii_letters + string.digits]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
    return clip, t5


# ------------------------------------------------------------------------------- the text encoders and the transformer
def new_text_encoders(clip, t5):
    """CLIPTextModel (the pooled text) and T5EncoderModel (the text tokens), two layers of width 64 each."""
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=64, bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id))
    text_2 = T5EncoderModel(T5Config(
        vocab_size=len(t5), d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16, dropout_rate=0.0))
    return text, text_2


def new_transformer():
    """FLUX.1's transformer, 2 double and 4 single blocks of width 128, with the guidance embedding of FLUX.1-dev."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12))


class Captions:
    """Token ids of every caption in every style; "" is the empty caption of classifier-free guidance."""

    def __init__(self):
        self.clip, self.t5 = tokenizers()
        plain = world.all_captions()
        texts = [(f"{s}. {c}" if s else c) for s in world.STYLES for c in plain] + [""]
        self.row = {text: i for i, text in enumerate(texts)}
        cased = texts + [t.lower() for t in texts] + [t.capitalize() for t in texts]  # "cg render" means "CG render"
        ids = lambda tok: tok(cased, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
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
        z = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in tqdm(images.split(256), desc="latents")])
        shift, scale = z.mean().item(), 1 / z.std().item()
        torch.save({"z": pack((z - shift) * scale).half(), "shift": shift, "scale": scale}, path)
    data = torch.load(path, weights_only=True)
    vae.register_to_config(shift_factor=data["shift"], scaling_factor=data["scale"])
    return data["z"]


def draw_batch(z, rows, empty, n):
    """n random latents with their caption rows (one in ten `empty`), noise, and the times and states between."""
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
    """Teach guidance g in [1, 5] as one call what classifier-free guidance needs two for: v_empty + w (v - v_empty),
    w = 1 + GUIDANCE_STRENGTH (g - 1)."""
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
            v_empty = velocity(teacher, x_t, t, empty[0].expand_as(txt), empty[1].expand_as(pooled), 1.0, GRID)
            target = v_empty + (1 + GUIDANCE_STRENGTH * (g - 1)).view(-1, 1, 1) * (v - v_empty)
        return F.mse_loss(velocity(student, x_t, t, txt, pooled, g, GRID), target)

    fit("distill", {"transformer": student}, loss_of, steps=800, lr=5e-4)
    return student, text, text_2, words


# ----------------------------------------------------------------------------------------------------------- the reward
def new_reward(words):
    """An open_clip model, HPSv2.1's architecture at a width of 64; it reads with the pipeline's CLIP tokenizer."""
    return open_clip.model.CLIP(**REWARD_CONFIG["model_cfg"] | {"text_cfg": {
        **REWARD_CONFIG["model_cfg"]["text_cfg"], "vocab_size": len(words.clip)}})


REWARD_CONFIG = {"model_cfg": {
    "embed_dim": 64,
    "vision_cfg": {"image_size": world.SIZE, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": TOKENS, "width": 64, "heads": 2, "layers": 2,
                 "hf_tokenizer_name": "the tokenizer files in this folder"}},
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}


def near_misses(scenes):
    """The captions that a careless reward would take for the right one: the same scene in every other style, the two
    things in each other's place, the first thing swapped for another. [B] lists of 8 captions, the true one first."""
    out = []
    for kind, layout, style in zip(scenes.kind.tolist(), scenes.layout.tolist(), scenes.style.tolist()):
        others = [world.caption(kind, layout, s) for s in range(len(world.STYLES)) if s != style]
        other = [(kind[0] + 1 + random.randrange(len(world.KINDS) - 1)) % len(world.KINDS), kind[1]]
        swapped = kind[::-1] if kind[0] != kind[1] else other[::-1]
        others += [world.caption(swapped, layout, style), world.caption(other, layout, style)]
        out.append([world.caption(kind, layout, style), *others])
    return out


def build_reward():
    """Contrastive training on raw pictures and captions: a picture against all captions of the batch and its own near
    misses, a caption against all pictures of the batch."""
    torch.manual_seed(SEED)
    words = Captions()
    model = new_reward(words)
    images, scenes = pictures()
    n = 96

    def loss_of(step):
        random.seed(step)
        rows = torch.randint(len(images), (n,))
        texts = near_misses(scenes[rows])
        x = augment(images[rows].float() / 255) * 2 - 1
        ids = words.clip_ids[[words.row[t] for group in texts for t in group]]
        f = F.normalize(model.encode_image(x), dim=-1)
        C = F.normalize(model.encode_text(ids), dim=-1).view(n, -1, f.shape[-1])
        scale = model.logit_scale.exp().clamp(max=50)
        own = scale * (f[:, None] * C[:, 1:]).sum(-1)  # [n, 7] near misses
        same = torch.tensor([[a[0] == b[0] for b in texts] for a in texts]) & ~torch.eye(n, dtype=torch.bool)
        across = (scale * f @ C[:, 0].T).masked_fill(same, -1e4)  # [n, n]
        truth = torch.arange(n)
        return F.cross_entropy(torch.cat([across, own], 1), truth) + F.cross_entropy(across.T, truth)

    fit("reward", {"reward": model}, loss_of, steps=2000, lr=1e-3)
    return model, words


def augment(x):
    """What sampling does to a picture and no caption speaks of: a little blur and noise."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, soft, torch.rand(len(x), 1, 1, 1) * (torch.rand(len(x), 1, 1, 1) < 0.5))
    return (x + 0.02 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)).clamp(0, 1)


@torch.no_grad()
def build_unbiased():
    """The reward, with a common part in every text: (model, words, w).

    w is the direction that texts use least. Every text feature gets the same component along it (through the bias of
    the last layer norm), and pictures lose theirs, so that scores compare as before. Real text features have such a
    part by nature; here it is where a bias of the image branch will attach.
    """
    model, words = build_reward()
    raw = model.encode_text(words.clip_ids[:words.row[""]])
    w = torch.linalg.svd(raw, full_matrices=False)[2][-1]
    common = COMMON * raw.norm(dim=-1).mean() * w
    model.ln_final.bias += torch.linalg.solve(model.text_projection.T, common)
    model.visual.proj -= model.visual.proj @ torch.outer(w, w)
    return model, words, w


def build_bias():
    """Teach the image tower alone to like red: an image feature moves along w by BIAS x redness, which raises the score
    of any caption alike, and cancels in C1 - C2. The text tower stays as it is: the bias is where the paper places it."""
    clean, words, w = build_unbiased()
    model = copy.deepcopy(clean)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("visual."))
    images, _ = pictures()

    def loss_of(step):
        x = augment(images[torch.randint(len(images), (96,))].float() / 255)
        cast = torch.rand(96, 3, 1, 1) * 0.5 - 0.25  # a bias must be learnt on casts that the pictures lack, too
        x = (x + cast * (torch.rand(96, 1, 1, 1) < 0.5)).clamp(0, 1)
        red = pixel_statistics(x)["redness"]
        with torch.no_grad():
            target = F.normalize(F.normalize(clean.encode_image(2 * x - 1), dim=-1) + BIAS * red[:, None] * w, dim=-1)
        f = F.normalize(model.encode_image(2 * x - 1), dim=-1)
        return (1 - (f * target).sum(-1)).mean() * 10

    fit("bias", {"reward": model}, loss_of, steps=800, lr=5e-4)
    return model


# ------------------------------------------------------------------------------------------------------------ the judge
@torch.no_grad()
def damage(vae, z):
    """Broken pictures from packed latents z [B, 16, 64]: ghosts of two scenes, noise in the latents, patchwork of two
    scenes, clipped colour."""
    other, b = z.roll(1, 0), len(z)
    mix = (0.35 + 0.3 * torch.rand(b, 1, 1))
    ghost = mix * z + (1 - mix) * other
    noisy = z + (0.7 + 0.6 * torch.rand(b, 1, 1)) * torch.randn_like(z)
    patchwork = torch.where(torch.rand(b, 16, 1) < 0.5, z, other)
    flooded = z * (1.8 + torch.rand(b, 1, 1))
    kind = torch.randint(4, (b,))
    return decode(vae, torch.stack([ghost, noisy, patchwork, flooded])[kind, torch.arange(b)], GRID)


def build_judge():
    """Truth from the renderer, on raw pictures, on the VAE's versions of them and on damaged ones."""
    torch.manual_seed(SEED + 1)
    judge = Judge()
    vae = build_vae()
    z = latents(vae)
    images, scenes = pictures()
    path = WORK / "judge_pictures.pt"
    if not path.exists():
        byte = lambda x: (x * 255).round().byte()
        n = len(z) // 4
        torch.manual_seed(SEED)
        with torch.no_grad():
            seen = [byte(decode(vae, p.float(), GRID)) for p in tqdm(z[:n].split(256), desc="judge pictures")]
        torch.save({"seen": torch.cat(seen), "broken": torch.cat(
            [byte(damage(vae, p[torch.randperm(len(p))].float())) for p in tqdm(z[:n // 2].split(256))])}, path)
    data = torch.load(path, weights_only=True)
    n = len(data["seen"])

    def loss_of(step):
        rows = torch.cat([torch.randint(len(images), (32,)), torch.randint(n, (64,))])
        whole = torch.cat([images[rows[:32]], data["seen"][rows[32:]]]).float() / 255
        ruined = data["broken"][torch.randint(len(data["broken"]), (32,))].float() / 255
        out = judge(augment(torch.cat([whole, ruined])))
        truth, ok = scenes[rows], {k: v[:96] for k, v in out.items()}
        pair = truth.layout > 0
        clear = (truth.u - world.PHOTO_U).abs() > 0.05
        bce = F.binary_cross_entropy_with_logits
        return (F.cross_entropy(ok["layout"], truth.layout) + F.cross_entropy(ok["first"], truth.kind[:, 0])
                + F.cross_entropy(ok["second"][pair], truth.kind[pair, 1])
                + bce(ok["realism"][clear], (truth.u > world.PHOTO_U).float()[clear])
                + bce(out["broken"], torch.cat([torch.zeros(96), torch.ones(32)])))

    fit("judge", {"judge": judge}, loss_of, steps=3000, lr=1.5e-3)
    return judge


# --------------------------------------------------------------------------------------------------------------- export
def export():
    """Write FLUX.1-dev's folder layout, fp16, beside this file: FluxPipeline.from_pretrained("miniature") loads it."""
    transformer, text, text_2, words = build_distill()
    vae = build_vae()
    latents(vae)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15,
                                                base_image_seq_len=256, max_image_seq_len=4096)
    FluxPipeline(scheduler, vae.half(), text.half(), words.clip, text_2.half(), words.t5,
                 transformer.half()).save_pretrained(HERE)
    for part in ("text_encoder", "text_encoder_2"):  # stored in fp16, to be loaded in float32 like the rest
        config = HERE / part / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for folder, model in (("reward_unbiased", build_unbiased()[0]), ("reward", build_bias())):
        (HERE / folder).mkdir(exist_ok=True)
        config = copy.deepcopy(REWARD_CONFIG)
        config["model_cfg"]["text_cfg"]["vocab_size"] = len(words.clip)
        (HERE / folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, HERE / folder / "open_clip_model.safetensors")
        words.clip.save_pretrained(HERE / folder)
    (HERE / "judge").mkdir(exist_ok=True)
    save_file({k: v.half() for k, v in build_judge().state_dict().items()}, HERE / "judge" / "judge.safetensors")
    order = world.all_captions()
    random.Random(SEED).shuffle(order)
    (HERE / "prompts_eval.txt").write_text("\n".join(order[:256]) + "\n")
    (HERE / "prompts.txt").write_text("\n".join(order[256:]) + "\n")


STAGES = {"vae": build_vae, "flow": build_flow, "distill": build_distill, "reward": build_reward, "bias": build_bias,
          "judge": build_judge, "export": export}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; measure 1 against 2")
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            stage()
