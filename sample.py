"""Prompts to pictures: `python sample.py --model miniature "a red circle left of a blue square"`."""

import argparse
import sys
from functools import partial
from pathlib import Path

from torchvision.utils import save_image
from tqdm import tqdm

import flux
from engine.old_flags import Help, check_sampling
from evaluation.picture_folders import write_json
from rewards.pictures import save_grid


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("prompt", nargs="*", help="the prompts; none: those of --prompts")
    add("--model", default="black-forest-labs/FLUX.1-dev", help="folder in FLUX.1-dev's layout, or hub id")
    add("--weights",
        help="folder of trained transformer weights (None: the model's own), such as runs/miniature/weights")
    add("--prompts", dest="eval_prompts", default="hpdv2-benchmark",
        help="text file, one prompt a line, or hpdv2-benchmark")
    add("--first", type=int, default=16, help="how many of the prompts of the file, from the first")
    add("--size", type=int, default=1024, help="side of the pictures, pixels")
    add("--eval-steps", type=int, default=50, help="sampling steps [paper 4.1]")
    add("--guidance", type=float, default=3.5, help="distilled guidance [FLUX.1-dev]")
    add("--seed", type=int, default=0, help="picture i is made from noise seed + i")
    add("--batch", type=int, default=1, help="pictures sampled at a time")
    add("--out", default="samples", help="folder: one PNG a prompt, named by its number, and grid.png")
    try:
        args = flux.parse_flags(parser)
        flux.needs_gpu(args.model)
        check_sampling(args)
        flux.check_size(args.model, args.size)
        device, dtype = flux.pick_device(args.model)
        prompts = args.prompt or flux.read_prompts(args.eval_prompts)[:args.first]
        txt, pooled, cut = flux.encode_prompts(args.model, prompts, device, dtype)
        model = flux.load(args.model, args.weights, device, dtype)
        grid = model.grid(args.size, args.size)
    except ValueError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    if cut:
        print(f"{cut} of {len(prompts)} prompts are longer than the text encoder takes; "
              f"their end is not seen")
    eps = flux.noise(model, grid, range(args.seed, args.seed + len(prompts)))
    images = flux.sample(model, txt, pooled, eps, grid, args.eval_steps, args.guidance, args.batch,
                         partial(tqdm, desc="sample"))
    out = Path(args.out)
    for i, image in enumerate(images):
        save_image(image, out / f"{i:05d}.png")
    write_json(out / "prompts.json", [{"prompt": p, "category": ""} for p in prompts])
    save_grid(images, out / "grid.png")
    print(f"{len(images)} pictures in {out}/, all of them in {out / 'grid.png'}")


if __name__ == "__main__":
    main()
