"""One update timed, phase by phase: `python -m experiments.bench --model miniature`, or on GPUs at full size with random
weights:

    torchrun --nproc_per_node=8 -m experiments.bench --random-init

--released times the same work, on the miniature, the way the released loop does it, adding one habit after
another.
"""

import sys
from contextlib import nullcontext
from statistics import median

import open_clip
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

import direct_align as da
from engine import old_flags as flags
import flux
from engine import parallel
from engine import plan
import srpo_reward as sr
import train


def random_models(world):
    """FLUX.1-dev and HPSv2.1's architecture with random weights: (Flux, Rewards, text tokens). Nothing is
    downloaded."""
    (config, vae_config, text_tokens), clip_config = plan.FLUX_DEV, open_clip.get_model_config("ViT-H-14")
    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    if world.mesh is not None:
        parallel.shard(transformer, world)
    transformer.to_empty(device=world.device)
    for name, p in transformer.named_parameters():
        torch.nn.init.ones_(p) if "norm_" in name and p.ndim == 1 else torch.nn.init.normal_(p, std=0.02)
    with world.device:
        vae = plan.new(AutoencoderKL, vae_config, world.dtype).eval().requires_grad_(False)
        vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
        clip = open_clip.model.CLIP(**clip_config)
    clip.visual.image_mean, clip.visual.image_std = (open_clip.OPENAI_DATASET_MEAN,
                                                     open_clip.OPENAI_DATASET_STD)
    scheduler = dict(use_dynamic_shifting=False, shift=3.0)
    reward = sr.ClipReward(clip, open_clip.get_tokenizer("ViT-H-14"))
    return (flux.Flux(transformer, vae, scheduler, world.device, world.dtype),
            sr.Rewards({"hpsv2.1": (reward, 1.0)}), text_tokens)


def one_update(a, model, reward, optimizer, txt, pooled, texts, habits=()):
    """Rollout, branches, optimizer; returns {phase: seconds}. `habits` are the released loop's, for
    --released."""
    grid, device = model.grid(a.size, a.size), model.device
    shape, seconds = ((grid[0] * grid[1], model.transformer.config.in_channels),
                      {"rollout": 0.0, "branches": 0.0, "optimizer": 0.0})
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(len(texts), *shape, generator=g).to(device)
    middles = da.draw_middle(len(texts), a.cells, g)

    def tick(phase, since):
        now = parallel.clock(device)
        seconds[phase] += now - since
        return now

    size = 1 if "one image at a time" in habits else len(texts)
    for rows in torch.arange(len(texts)).split(size):
        since = parallel.clock(device)
        c, p = txt[rows].to(device, model.dtype), pooled[rows].to(device, model.dtype)
        v = lambda w: lambda x, s: flux.velocity(model.transformer, x.to(model.dtype), s, c, p,
                                                 w, grid).float()
        with torch.no_grad(), parallel.gathered(model.transformer):
            x0 = flux.rollout(v(a.rollout_guidance), eps[rows], da.sigma_steps(a.rollout_steps, 3.0))
        since = tick("rollout", since)
        names = [texts[r] for r in rows]
        for _ in range(2 if "text features four times" in habits else 1):
            if "text features four times" in habits:
                for part, _ in reward.parts.values():
                    part.cache.clear()
            C0, C1, C2 = reward.conditions(names, a.control[0], a.neg[0])
        with (torch.autograd.set_detect_anomaly(True, check_nan=True) if "anomaly detection" in habits
              else nullcontext()):
            train.update(a, v(a.guidance), lambda z: flux.decode(model.vae, z, grid), reward.image_features,
                         x0, eps[rows], C0, C1, C2, [middles[rows]])
        tick("branches", since)
    since = parallel.clock(device)
    torch.nn.utils.clip_grad_norm_(model.transformer.parameters(), a.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tick("optimizer", since)
    return seconds


def main():
    parser = flags.parser(__doc__)
    parser.add_argument("--random-init", action="store_true",
                        help="FLUX.1-dev's and ViT-H's size, random weights")
    parser.add_argument("--released", action="store_true", help="compare with the released loop's habits")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates, after one that is not")
    try:
        a = flux.parse_flags(parser)
        flags.check(a)
        if not a.random_init or not torch.cuda.is_available():
            flux.needs_gpu(a.model)
        world = parallel.World(a.replicas)
        if a.random_init:
            model, reward, text_tokens = random_models(world)
            c = model.transformer.config
            txt, pooled = (torch.randn(a.batch, text_tokens, c.joint_attention_dim),
                           torch.randn(a.batch, c.pooled_projection_dim))
            texts = [f"prompt {i}" for i in range(a.batch)]
        else:
            texts = flux.read_prompts(a.prompts)[:a.batch]
            txt, pooled, _ = flux.encode_prompts(a.model, texts, world.device, world.dtype)
            model, reward = (flux.load(a.model, None, world.device, world.dtype, world),
                             sr.load_rewards(a.reward, world.device))
    except ValueError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
    if a.checkpointing and world.device.type == "cuda":
        model.transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.transformer.parameters(), a.lr, fused=world.device.type == "cuda")
    grid = model.grid(a.size, a.size)
    flop = a.batch * sum(plan.update_flop(model.transformer.config, grid[0] * grid[1], txt.shape[1], a))
    ladder = [(), ("one image at a time",)]
    ladder += [(*ladder[-1], "text features four times")]
    ladder += [(*ladder[-1], "VAE not frozen")]
    ladder += [(*ladder[-1], "anomaly detection")]
    runs = {habits: [] for habits in (ladder if a.released else ladder[:1])}
    for repeat in range(a.repeats + 1):
        for habits in runs:  # in turn, so that a machine that drifts drifts for all
            model.vae.requires_grad_("VAE not frozen" in habits)
            seconds = one_update(a, model, reward, optimizer, txt, pooled, texts, habits)
            if repeat:
                runs[habits].append(seconds)
    if not world.main:
        return world.close()
    print(f"{torch.cuda.get_device_name() if world.device.type == 'cuda' else 'CPU, one thread'}, "
          f"{world.size} process(es), batch {a.batch} each, {a.size} x {a.size}, "
          f"{a.rollout_steps} rollout steps, median of {a.repeats}\n")
    print(f"{'':46}{'rollout':>9}{'branches':>10}{'optimizer':>10}{'total':>9}{'ratio':>7}")
    first = None
    for habits, measured in runs.items():
        middle = {k: median(s[k] for s in measured) for k in ("rollout", "branches", "optimizer")}
        total = median(sum(s.values()) for s in measured)
        first = first or total
        name = f"+ {habits[-1]}" if habits else "this project"
        print(f"{name:46}" + "".join(f"{middle[k]:>9.3f} " for k in middle)
              + f"{total:>8.3f} {total / first:>6.2f}")
    rate = plan.achieved(flop, first, world.device)
    print("\n" + ", ".join(f"{k} {x}" for k, x in rate.items()))
    world.close()


if __name__ == "__main__":
    main()
