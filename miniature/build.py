"""Build the miniature from nothing: `python miniature/build.py` (resumable, seeded, about two hours on 2 cores).

Stages, each finished once and kept in miniature/.build/ (delete a stage's file to build it again):

    tokenizers  CLIP byte-pair and T5 unigram vocabularies of the world's own words
    vae         AutoencoderKL, 64 x 64 pixels -> 16 x 8 x 8 latents (FLUX's factor of 8, and its 16 channels)
    flow        CLIP text, T5 encoder and FluxTransformer2DModel, trained together by flow matching
    distill     guidance distillation, so that the guidance embedding means what FLUX.1-dev's means
    reward      an open_clip model trained on pictures and captions, in every style: the unbiased reward
    bias        the same, its image tower taught a liking for red that no caption asks for: the biased reward
    judge       a network that no training ever sees, which tells realism, content and damage
    export      everything above, as FLUX.1-dev's folder layout in fp16
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

import world

HERE = Path(__file__).resolve().parent
WORK = HERE / ".build"
SEED = 0


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


STAGES = {"vae": build_vae}

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
