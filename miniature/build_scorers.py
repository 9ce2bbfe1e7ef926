"""The miniature's scorers: the reward, without and with its bias, and the judge."""

import copy
import random

import open_clip
import torch
import torch.nn.functional as F
from tqdm import tqdm

from flux import decode
from evaluation.metrics import pixel_statistics
from miniature import world
from miniature.build_flow import GRID, SEED, TOKENS, WORK, Captions, build_vae, fit, latents, pictures
from miniature.judge import Judge

COMMON, BIAS = 0.4, 1.5  # the part that all texts share, and the image branch's liking for red


def new_reward(words):
    """An open_clip model, HPSv2.1's architecture at a width of 64; it reads with the pipeline's CLIP
    tokenizer."""
    return open_clip.model.CLIP(**REWARD_CONFIG["model_cfg"] | {"text_cfg": {
        **REWARD_CONFIG["model_cfg"]["text_cfg"], "vocab_size": len(words.clip)}})


REWARD_CONFIG = {"model_cfg": {
    "embed_dim": 64,
    "vision_cfg": {"image_size": world.SIZE, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": TOKENS, "width": 64, "heads": 2, "layers": 2,
                 "hf_tokenizer_name": "the tokenizer files in this folder"}},
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}


def near_misses(scenes):
    """The captions that a careless reward would take for the right one: the same scene in every other style,
    the two things in each other's place, the first thing swapped for another. [B] lists of 8 captions, the
    true one first."""
    out = []
    for kind, layout, style in zip(scenes.kind.tolist(), scenes.layout.tolist(), scenes.style.tolist()):
        others = [world.caption(kind, layout, s) for s in range(len(world.STYLES)) if s != style]
        other = [(kind[0] + 1 + random.randrange(len(world.KINDS) - 1)) % len(world.KINDS), kind[1]]
        swapped = kind[::-1] if kind[0] != kind[1] else other[::-1]
        others += [world.caption(swapped, layout, style), world.caption(other, layout, style)]
        out.append([world.caption(kind, layout, style), *others])
    return out


def build_reward():
    """Contrastive training on raw pictures and captions: a picture against all captions of the batch and its
    own near misses, a caption against all pictures of the batch."""
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

    w is the direction that texts use least. Every text feature gets the same component along it (through the
    bias of the last layer norm), and pictures lose theirs, so that scores compare as before. Real text
    features have such a part by nature; here it is where a bias of the image branch will attach.
    """
    model, words = build_reward()
    raw = model.encode_text(words.clip_ids[:words.row[""]])
    w = torch.linalg.svd(raw, full_matrices=False)[2][-1]
    common = COMMON * raw.norm(dim=-1).mean() * w
    model.ln_final.bias += torch.linalg.solve(model.text_projection.T, common)
    model.visual.proj -= model.visual.proj @ torch.outer(w, w)
    return model, words, w


def build_bias():
    """Teach the image tower alone to like red: an image feature moves along w by BIAS x redness, which raises
    the score of any caption alike, and cancels in C1 - C2. The text tower stays as it is: the bias is where
    the paper places it."""
    clean, words, w = build_unbiased()
    model = copy.deepcopy(clean)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("visual."))
    images, _ = pictures()

    def loss_of(step):
        x = augment(images[torch.randint(len(images), (96,))].float() / 255)
        # a bias must be learnt on casts that the pictures lack, too
        cast = torch.rand(96, 3, 1, 1) * 0.5 - 0.25
        x = (x + cast * (torch.rand(96, 1, 1, 1) < 0.5)).clamp(0, 1)
        red = pixel_statistics(x)["redness"]
        with torch.no_grad():
            target = F.normalize(F.normalize(clean.encode_image(2 * x - 1), dim=-1)
                                 + BIAS * red[:, None] * w, dim=-1)
        f = F.normalize(model.encode_image(2 * x - 1), dim=-1)
        return (1 - (f * target).sum(-1)).mean() * 10

    fit("bias", {"reward": model}, loss_of, steps=800, lr=5e-4)
    return model


# -------------------------------------------------------------------------------------------------- the judge
@torch.no_grad()
def damage(vae, z):
    """Broken pictures from packed latents z [B, 16, 64]: ghosts of two scenes, noise in the latents,
    patchwork of two scenes, clipped colour."""
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
            [byte(damage(vae, p[torch.randperm(len(p))].float()))
             for p in tqdm(z[:n // 2].split(256))])}, path)
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
