"""Prompts to the table: base against trained weights, on fixed prompts and seeds.

    python evaluate.py --model miniature --weights runs/miniature/weights

Columns: the reward of the bare prompt (Eq. 7), the SGP gap (Eq. 10 with --control and --neg), plain pixel
statistics and, for a model whose folder has a judge, what the judge says: realism, alignment, broken.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torchvision.utils import save_image
from tqdm import tqdm

import flux
from flags import Help, check_sampling
from metrics import pixel_statistics
from srpo_reward import load_reward, preference, relative, with_words


def load_judge(model):
    """The judge that lies in the model's folder, or None."""
    if not (Path(model) / "judge").is_dir():
        return None
    from miniature.judge import load_judge
    return load_judge(model)


@torch.no_grad()
def measure(images, prompts, reward, judge, control, neg, batch=64):
    """Every score of P pictures [P, 3, H, W] in [0, 1] for their P prompts: a dict of [P] float tensors.

    reward  Eq. 7, f.C0 of the bare prompt;  sgp  Eq. 10, f.(C1 - C2);  the pixel statistics;
    the judge's verdicts.
    """
    parts = []
    for i in range(0, len(images), batch):
        x, texts = images[i:i + batch], prompts[i:i + batch]
        f = reward.image_features(x.to(reward.device))
        C0, C1, C2 = (reward.text_features(t)
                      for t in (texts, with_words(control, texts), with_words(neg, texts)))
        scores = {"reward": preference(f, C0), "sgp": relative(f, C1, C2), **pixel_statistics(x)}
        if judge is not None:
            scores |= judge.verdicts(x, texts)
        parts.append({k: v.float().cpu() for k, v in scores.items()})
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def summary(scores):
    """{metric: {"mean", "se"}} of [P] scores; se is the standard error of the mean. NaN (not judged) is left
    out."""
    out = {}
    for k, v in scores.items():
        v = v[~v.isnan()]
        out[k] = {"mean": v.mean().item(), "se": (v.std(unbiased=False) / max(len(v), 1) ** 0.5).item()}
    return out


def save_grid(images, path, columns=8):
    """Write pictures [P, 3, H, W] as one PNG; small ones enlarged to 128 pixels, so that they can be seen."""
    scale = max(1, 128 // images.shape[-1])
    save_image(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), path, nrow=columns)


PERCENT = ("realism", "alignment", "broken")


def table(rows):
    """A Markdown table of {name: summary}: one line a model, mean +- standard error."""
    metrics = list(next(iter(rows.values())))
    cell = lambda k, s: (f"{100 * s['mean']:.1f} ± {100 * s['se']:.1f} %" if k in PERCENT
                         else f"{s['mean']:+.3f} ± {s['se']:.3f}")
    lines = ["| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    return "\n".join(lines + [f"| {n} | " + " | ".join(cell(k, s[k]) for k in metrics) + " |"
                              for n, s in rows.items()])


def spread(rows):
    """The mean over runs (weights of several seeds) and, as its "se", the standard deviation between them."""
    over = {k: torch.tensor([row[k]["mean"] for row in rows]) for k in rows[0]}
    return {k: {"mean": v.mean().item(), "se": v.std().item()} for k, v in over.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--model", default="black-forest-labs/FLUX.1-dev", help="folder in FLUX.1-dev's layout, or hub id")
    add("--weights", nargs="*", default=[],
        help="folders of trained transformer weights, each compared with the base")
    add("--prompts", dest="eval_prompts", default="hpdv2-benchmark",
        help="text file, one prompt a line, or hpdv2-benchmark")
    add("--n", type=int, default=256, help="how many of the prompts, from the first")
    add("--reward", default="hpsv2.1", help="hpsv2.1, a .pt in its layout, or an open_clip folder")
    add("--control", default="Realistic photo", help="the wanted words of the SGP gap [paper 4.2]")
    add("--neg", default="CG Render", help="the unwanted words of the SGP gap [paper 4.2]")
    add("--size", type=int, default=1024, help="side of the pictures, pixels [authors' answer for Table 1]")
    add("--eval-steps", type=int, default=50, help="sampling steps [paper 4.1]")
    add("--guidance", type=float, default=3.5, help="distilled guidance of sampling [FLUX.1-dev]")
    add("--seed", type=int, default=0, help="prompt i is sampled from noise seed + i, for every model")
    add("--out", help="folder for results.json and a contact sheet a model (None: nothing is written)")
    try:
        args = flux.parse_flags(parser)
        flux.needs_gpu(args.model)
        check_sampling(args)
        device, dtype = flux.pick_device(args.model)
        prompts = flux.read_prompts(args.eval_prompts)[:args.n]
        reward, judge = load_reward(args.reward, device), load_judge(args.model)
        txt, pooled, _ = flux.encode_prompts(args.model, prompts, device, dtype)
        rows, sheets = {}, {}
        for name in [None, *args.weights]:
            model = flux.load(args.model, name, device, dtype)
            grid = model.grid(args.size, args.size)
            eps = flux.noise(model, grid, range(args.seed, args.seed + len(prompts)))
            bar = partial(tqdm, desc=f"sample {name or 'base'}", leave=False)
            images = flux.sample(model, txt, pooled, eps, grid, args.eval_steps, args.guidance, progress=bar)
            rows[name or "base"] = summary(measure(images, prompts, reward, judge, args.control, args.neg))
            sheets[name or "base"] = images[:64]
    except ValueError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    if len(args.weights) > 1:
        rows[f"mean of {len(args.weights)}, ± spread"] = spread([rows[w] for w in args.weights])
    print(f"{len(prompts)} prompts, {args.eval_steps} steps, guidance {args.guidance}, "
          f"mean ± standard error")
    print(table(rows))
    if args.out:
        out = Path(args.out)
        (out / "results.json").write_text(json.dumps({"args": vars(args), "results": rows}, indent=2) + "\n")
        for i, images in enumerate(sheets.values()):
            save_grid(images, out / f"sheet_{i}.png")


if __name__ == "__main__":
    main()
