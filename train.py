"""SRPO: align FLUX.1 with the difference between two prompts (arXiv 2509.06942), from flags to weights in one file.

    python train.py --model miniature                                        on a laptop, in under three minutes
    python train.py --control "realistic photo" --neg "CG render"            FLUX.1-dev

The mathematics is in direct_align.py (Eqs. 3-6) and srpo_reward.py (Eqs. 7-13); `update` below is one step of it, and
the loop in `main` is everything else. Defaults are the released recipe; `--recipe paper` takes the printed forms.
"""

import argparse
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torchvision.io import read_image, write_png
from tqdm import tqdm

import direct_align as da
import evaluate
import explain
import flux
import srpo_reward as sr
from metrics import STATISTICS

PAPER = dict(form="branches", recover="epsilon", meet="call", lam=[1.0, 0.4], injections=2, threshold=None,
             noise="independent", rollout_guidance=3.5, shift=None)


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words, off = lambda s: [w.strip() for w in s.split(",")], lambda s: None if s == "off" else float(s)
    g = p.add_argument_group("the run").add_argument
    g("--model", default="black-forest-labs/FLUX.1-dev", help="folder in FLUX.1-dev's layout, or hub id; its srpo.json, "
      "if there is one, holds defaults that suit it")
    g("--prompts", default="prompts.txt", help="text file, one training prompt a line")
    g("--out", help="folder of the run (default: runs/<model>)")
    g("--steps", type=int, default=19, help="updates; users see collapse by 20 to 50 [released code: 19]")
    g("--batch", type=int, default=1, help="images an update [released code: 1 a GPU]")
    g("--lr", type=float, default=5e-6, help="AdamW's learning rate, constant [released code]")
    g("--weight-decay", type=float, default=1e-4, help="AdamW's, betas are 0.9 and 0.999 [released code]")
    g("--clip", type=float, default=0.1, help="largest gradient norm [released code]")
    g("--seed", type=int, default=0, help="of noise, noise levels and prompt order [ours]")
    g("--save-every", type=int, default=10, help="updates between checkpoints [ours]")
    g("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    g("--overwrite", action="store_true", help="delete the run in --out first")
    g("--explain", action="store_true", help="tell one update call by call, with equations and shapes; writes nothing")
    g = p.add_argument_group("the reward (Eqs. 7-13)").add_argument
    g("--reward", default="hpsv2.1", help="hpsv2.1, a .pt in its file layout, or an open_clip folder [paper 4.1]")
    g("--control", type=words, default=["Natural-lighting", "Detail", "Detailed", "Real"],
      help="wanted words, comma-separated, cycling with the step [released code]")
    g("--neg", type=words, default=["Concept art", "Painting", "Anime", "Flat", "Oil"], help="unwanted words, likewise")
    g("--form", choices=sr.FORMS, default="released", help="which reward in which branch: the table in "
      "srpo_reward.branch_reward [released code]")
    g("--cfg-k", type=float, default=1.5, help="k of Eq. 11, for --form cfg [ours; the paper gives none]")
    g("--discount-denoise", type=float, nargs=2, default=[0.1, 0.25], metavar=("LATE", "EARLY"),
      help="d of --form released, denoising branch [released code]")
    g("--discount-invert", type=float, nargs=2, default=[0.3, 0.01], metavar=("LATE", "EARLY"),
      help="the same, inverting branch [released code]")
    g("--threshold", type=off, default=0.7, help="relu(threshold - r) instead of -r, or off [released code]")
    g = p.add_argument_group("Direct-Align (Eqs. 3-6)").add_argument
    g("--sigma-range", type=float, nargs=2, default=[27 / 28, 0.75], metavar=("MAX", "MIN"),
      help="noise levels that are trained [released code: 0.9643 0.75]")
    g("--cells", type=int, default=1000, help="grid cells in that range [released code]")
    g("--groundtruth-ratio", type=float, default=0.92, help="share of the range left to the known noise; the network "
      "is called the rest away from where it lands [released code: 0.92 HPS, 0.9 PickScore]")
    g("--branches", type=words, default=["denoise", "invert"], help="denoise, invert, or both [paper 3.2]")
    g("--injections", type=int, default=1, help="n of Eq. 6: noise levels a branch visits per image [released code]")
    g("--meet", choices=["landing", "call"], default="landing", help="where the branches meet: at the level they land "
      "on [released code], or at the level they call the network [paper]")
    g("--recover", choices=["velocity", "epsilon"], default="velocity", help="Eq. 5 for a velocity [released code], or "
      "as printed")
    g("--lam", type=float, nargs=2, default=[1.0, 1.0], metavar=("EARLY", "LATE"), help="lambda(t) of Eq. 6 at both "
      "ends of --sigma-range [released code: none]")
    g("--noise", choices=["shared", "independent", "fresh"], default="shared", help="one noise prior for all images of "
      "an update [released code], one each, or shared but with fresh noise to inject")
    g = p.add_argument_group("the rollout").add_argument
    g("--size", type=int, default=720, help="side of the pictures, pixels [released code]")
    g("--rollout-steps", type=int, default=25, help="Euler steps to x0 [paper 4.1]")
    g("--rollout-guidance", type=float, default=1.0, help="distilled guidance of the rollout [released code]")
    g("--guidance", type=float, default=3.5, help="distilled guidance of the update, and of samples [released code]")
    g("--shift", type=off, default=3.0, help="time shift of the rollout; off: the model's own [released code]")
    g = p.add_argument_group("watching for collapse").add_argument
    g("--eval-prompts", default="prompts.txt", help="text file: the first of them are sampled at fixed seeds")
    g("--eval-steps", type=int, default=50, help="sampling steps of samples and evaluation [paper 4.1]")
    g("--watch", type=int, default=4, help="pictures sampled at fixed seeds while training [ours]")
    g("--watch-every", type=int, default=5, help="updates between them [ours]")
    g("--eval", type=int, default=0, help="pictures of the evaluation before and after; 0: none [ours]")
    g("--drift-band", type=float, nargs=4, default=[0.25, 0.1, 0.2, 0.04], metavar=tuple(s.upper() for s in STATISTICS),
      help="largest change of these mean statistics of the watched pictures before the run is called hacked [ours]")
    p.add_argument("--recipe", choices=["released", "paper"], default="released", help="paper: every form as printed ("
                   + ", ".join(f"{k} {v}" for k, v in PAPER.items()) + ") [ours where the paper gives no number]")
    return p


def check(a):
    """Raise ValueError, one line, for the first flag that is out of range."""
    ranges = {"steps": (1, None), "batch": (1, None), "injections": (1, None), "rollout_steps": (1, None),
              "eval_steps": (1, None), "cells": (20, None), "watch": (1, None), "watch_every": (1, None),
              "save_every": (1, None), "eval": (0, None), "groundtruth_ratio": (0, 1), "seed": (0, 2**40)}
    for name, (low, high) in ranges.items():
        value = getattr(a, name)
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be {limits}")
    for name in ("lr", "clip"):
        if not 0 < getattr(a, name) < 1e3:
            raise ValueError(f"--{name} {getattr(a, name)}: must be above 0 and finite")
    high, low = a.sigma_range
    if not 0 <= low < high < 1:
        raise ValueError(f"--sigma-range {high} {low}: give MAX then MIN, with 0 <= MIN < MAX < 1")
    for name in ("control", "neg"):
        words = getattr(a, name)
        if not words or not all(words):
            raise ValueError(f'--{name} "{",".join(words)}": an empty control word; give for example "realistic photo"')
    if not a.branches or set(a.branches) - {"denoise", "invert"}:
        raise ValueError(f"--branches {','.join(a.branches)}: must be denoise, invert or denoise,invert")


def open_out(a):
    """Make the run's folder; ValueError if it holds a run (or, with --resume, another one, or none)."""
    out = Path(a.out or f"runs/{Path(a.model).name}")
    stored, now = out / "args.json", json.loads(json.dumps(vars(a)))
    if a.resume:
        if not (out / "checkpoint.pt").exists():
            raise ValueError(f"--resume: no checkpoint.pt in {out}; start without --resume, or give the run's --out")
        then = json.loads(stored.read_text())
        free = ("steps", "resume", "overwrite", "explain", "out", "save_every")
        changed = [k for k in now if k not in free and now[k] != then.get(k)]
        if changed:
            k = changed[0]
            raise ValueError(f"--resume: the run in {out} has --{k.replace('_', '-')} {then.get(k)}, now {now[k]}; give "
                             f"the same flags, or another --out")
    elif stored.exists():
        if not a.overwrite:
            raise ValueError(f"--out {out} already holds a run; --resume continues it, --overwrite deletes it")
        shutil.rmtree(out)
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(now, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {error.strerror}") from error
    return out


class NotFinite(Exception):
    """A NaN or Inf on its way to the weights: what, and for which row of the batch."""


def must_be_finite(**tensors):
    for name, t in tensors.items():
        bad = ~t.detach().isfinite()
        if bad.any():
            raise NotFinite(name, int(bad.reshape(len(t), -1).any(1).nonzero()[0]))


# ------------------------------------------------------------------------------------------- one update, Eqs. 3-6, 9-13
def update(a, v, decode, image_features, x0, eps, C0, C1, C2, middles):
    """Add the gradient of Eq. 6 to the network's, for B images of clean latents x0 [B, N, C] (no gradient).

    v(x_t, sigma) the network's velocity; decode(x0_hat) pictures; image_features(pictures) f [B, D]; eps [B, N, C] the
    noise prior; C0, C1, C2 [B, D] text features of the prompt, with control and with negative words; middles a list of n
    draws [B] (`da.draw_middle`). Returns {branch: mean reward, "sgp": mean f.(C1 - C2)} over the n injections.
    """
    grid, told = da.training_grid(*a.sigma_range, a.cells), {b: [] for b in (*a.branches, "sgp")}
    reach, n = da.reach_of(a.groundtruth_ratio, a.cells), len(middles) * len(a.branches)
    for m in middles:  # Eq. 6's sum
        for branch in a.branches:
            at = da.place(branch, m, grid, reach, a.meet)
            sigma, sigma_to = at.sigma.to(x0.device), at.sigma_to.to(x0.device)
            x_t = da.inject(x0, eps, sigma)  # Eq. 3, [B, N, C]
            v_theta = v(x_t, sigma)  # the only call with a gradient
            if a.recover == "velocity":
                x0_hat = da.recover(x_t, v_theta, eps, sigma, sigma_to)  # Eq. 5
            else:
                x0_hat = da.recover_epsilon(x_t, da.epsilon(x_t, v_theta, sigma), eps, sigma, sigma_to)
            image = decode(x0_hat)  # [B, 3, H, W]
            f = image_features(image)  # [B, D]
            d = da.discount(at.cell, *getattr(a, f"discount_{branch}"), a.cells)
            r = sr.branch_reward(a.form, branch, f, C0, C1, C2, d, a.cfg_k)  # Eqs. 12 and 13, [B]
            must_be_finite(x0=x0, v_theta=v_theta, image=image, reward=r)
            weight = da.lam(sigma_to, *a.sigma_range, *a.lam)
            da.aggregate(sr.loss(r, a.threshold), weight, n).mean().backward()  # Eq. 6
            told[branch].append(r.mean().item())
            told["sgp"].append(sr.relative(f, C1, C2).mean().item())
    return {k: sum(values) / len(values) for k, values in told.items()}


def prompt_order(n, count, seed):
    """The first `count` prompts of an endless series of seeded permutations of n: a list of rows."""
    g, rows = torch.Generator().manual_seed(seed), []
    while len(rows) < count:
        rows += torch.randperm(n, generator=g).tolist()
    return rows[:count]


def hacking(now, before, band):
    """The hacking gauge: (drift {statistic: change of the mean}, list of what is wrong, in words).

    now, before: scores {name: [P]} of the same prompts and seeds. A rise or fall counts when it is above two standard
    errors of the paired differences.
    """
    drift = {k: (now[k] - before[k]).mean().item() for k in STATISTICS}
    wrong = [f"{k} drifted by {drift[k]:+.3f}, outside ±{limit}" for k, limit in zip(STATISTICS, band)
             if abs(drift[k]) > limit]
    change = {k: now[k] - before[k] for k in ("reward", "sgp")}
    sure = {k: d.mean().abs() > 2 * d.std(unbiased=False) / len(d) ** 0.5 for k, d in change.items()}
    if all(sure.values()) and change["reward"].mean() > 0 > change["sgp"].mean():
        wrong.append("the reward rises while the SGP gap falls")
    return drift, wrong


def main():
    try:
        a = flux.parse_flags(flags(), {"paper": PAPER})
        check(a)
        device, dtype = flux.pick_device(a.model)
        prompts = flux.read_prompts(a.prompts)
        held_out = flux.read_prompts(a.eval_prompts, "--eval-prompts")[:max(a.eval, a.watch)]
        rows = prompt_order(len(prompts), a.steps * a.batch, a.seed)
        used = sorted(set(rows))  # only the run's own prompts are encoded
        rows = [used.index(r) for r in rows]
        prompts = [prompts[r] for r in used]
        reward, judge = sr.load_reward(a.reward, device), evaluate.load_judge(a.model)
        model = flux.load(a.model, None, device, dtype)
        grid = model.grid(a.size, a.size)
        txt, pooled, cut = flux.encode_prompts(a.model, prompts + held_out, device, dtype)
        out = None if a.explain else open_out(a)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(" ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(a).items()))
    if cut:
        print(f"{cut} of {len(prompts) + len(held_out)} prompts are longer than the text encoder takes; their end is not seen")
    (txt, txt_held), (pooled, pooled_held) = (t.split([len(prompts), len(held_out)]) for t in (txt, pooled))
    transformer = model.transformer
    optimizer = torch.optim.AdamW(transformer.parameters(), a.lr, (0.9, 0.999), weight_decay=a.weight_decay)
    sigmas = da.sigma_steps(a.rollout_steps, a.shift or model.shift(grid[0] * grid[1]))
    shape = (grid[0] * grid[1], transformer.config.in_channels)
    controls, negs = a.control, a.neg
    if a.explain:
        explain.tell(flux, "rollout", "velocity", "decode")
        explain.tell(da, "training_grid", "place", "inject", "recover", "recover_epsilon", "epsilon", "discount", "lam", "aggregate")
        explain.tell(sr, "with_words", "branch_reward", "loss")
        explain.tell(reward, "image_features", "text_features")

    def look(n, desc):
        """Pictures [n, 3, H, W] of the first n held-out prompts at fixed seeds, and their scores."""
        n, bar = min(n, len(held_out)), partial(tqdm, desc=desc, leave=False) if n > 64 else list
        images = flux.sample(model, txt_held[:n], pooled_held[:n], flux.noise(model, grid, range(n)), grid,
                             a.eval_steps, a.guidance, progress=bar)
        return images, evaluate.measure(images, held_out[:n], reward, judge, controls[0], negs[0])

    start, best, before, evaluated = 0, -1e9, None, None
    if a.resume:
        state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        transformer.load_state_dict(state["transformer"])
        optimizer.load_state_dict(state["optimizer"])
        start, best, before, evaluated = (state[k] for k in ("step", "best", "before", "evaluated"))
        kept = [line for line in (out / "log.jsonl").read_text().splitlines() if json.loads(line)["step"] <= start]
        (out / "log.jsonl").write_text("".join(line + "\n" for line in kept))
    elif not a.explain:
        images, before = look(a.watch, "watch")
        evaluate.save_grid(images, out / "samples" / "step_00000.png")
        evaluated = evaluate.summary(look(a.eval, "evaluate before")[1]) if a.eval else None
    log = None if a.explain else open(out / "log.jsonl", "a")

    # -------------------------------------------------------------------------------------------------------- the loop
    bar = tqdm(range(start + 1, a.steps + 1), initial=start, total=a.steps, desc="train", disable=a.explain)
    for step in bar:
        clock = time.perf_counter()
        g = torch.Generator().manual_seed(a.seed * 1_000_003 + step)  # all of a step's chance comes from its number
        batch = rows[(step - 1) * a.batch:step * a.batch]
        texts = [prompts[r] for r in batch]
        c, p = txt[batch].to(device, dtype), pooled[batch].to(device, dtype)
        draw = lambda n: torch.randn(n, *shape, generator=g).expand(a.batch, *shape).to(device)
        eps = draw(a.batch if a.noise == "independent" else 1)  # [B, N, C]
        with torch.no_grad():
            x0 = flux.rollout(lambda x, s: flux.velocity(transformer, x.to(dtype), s, c, p, a.rollout_guidance, grid).float(),
                              eps, sigmas)
        if a.noise == "fresh":
            eps = draw(1)
        rolled = time.perf_counter() - clock

        control, neg = controls[step % len(controls)], negs[step % len(negs)]
        C0, C1, C2 = (reward.text_features(t) for t in (texts, sr.with_words(control, texts), sr.with_words(neg, texts)))
        middles = [da.draw_middle(a.batch, a.cells, g) for _ in range(a.injections)]
        try:
            told = update(a, lambda x, s: flux.velocity(transformer, x.to(dtype), s, c, p, a.guidance, grid).float(),
                          lambda z: flux.decode(model.vae, z, grid), reward.image_features, x0, eps, C0, C1, C2, middles)
            norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), a.clip)
            must_be_finite(gradient=norm.view(1))
        except NotFinite as error:
            what, row = error.args
            where = f"the {len(texts)} prompts from {texts[0]!r}" if what == "gradient" else f"prompt {texts[row]!r}"
            print(f"\ntrain.py: step {step}, {where}: {what} is not finite; the weights of step {step - 1} are kept. Try "
                  f"a smaller --lr, or another --seed.", file=sys.stderr)
            transformer.save_pretrained(out / "weights")
            sys.exit(1)
        if a.explain:
            print(f"\ngradient norm {norm:.4g}, clipped to {a.clip}; then AdamW with lr {a.lr} would step.")
            return
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        line = {"step": step, **{f"reward_{b}" if b != "sgp" else b: x for b, x in told.items()}, "grad_norm": norm.item(),
                "seconds_rollout": round(rolled, 3), "seconds_update": round(time.perf_counter() - clock - rolled, 3)}

        if step % a.watch_every == 0 or step == a.steps:
            images, now = look(a.watch, "watch")
            evaluate.save_grid(images, out / "samples" / f"step_{step:05d}.png")
            drift, wrong = hacking(now, before, a.drift_band)
            line |= {"drift": drift, "watch": {k: s["mean"] for k, s in evaluate.summary(now).items()}, "hacking": wrong}
            for w in wrong:
                tqdm.write(f"step {step}: {w}")
            if not wrong and now["sgp"].mean().item() > best:
                best = now["sgp"].mean().item()
                transformer.save_pretrained(out / "weights_best")
            bar.set_postfix(sgp=f"{now['sgp'].mean():+.3f}", hacking="YES" if wrong else "no")
        log.write(json.dumps(line) + "\n")
        log.flush()
        if step % a.save_every == 0 or step == a.steps:
            state = dict(step=step, best=best, before=before, evaluated=evaluated, optimizer=optimizer.state_dict(),
                         transformer=transformer.state_dict())
            torch.save(state, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")

    # ------------------------------------------------------------------------------------------------------ the results
    transformer.save_pretrained(out / "weights")
    pictures = [read_image(str(out / "samples" / f"step_{s:05d}.png")) for s in (0, a.steps)]
    write_png(torch.cat(pictures, 1), str(out / "before_after.png"))
    result = {"steps": a.steps, "best_sgp": best}
    if a.eval:
        result |= {"before": evaluated, "after": evaluate.summary(look(a.eval, "evaluate after")[1])}
        print(evaluate.table({"before": result["before"], "after": result["after"]}))
    (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"weights in {out}/weights (best by SGP gap inside the drift band: weights_best), pictures in {out}/before_after.png")


if __name__ == "__main__":
    main()
