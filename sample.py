"""Prompts to pictures: `python sample.py --model miniature "a red circle left of a blue square"`."""

import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

import flux
from engine import data, parallel
from engine.command_line import Parser, parse, real, whole
from engine.errors import frame, printable
from evaluation.picture_folders import list_prompts, make_folder, save_grid, save_picture


def flags():
    """The flags of this script."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="the prompts; none: those of --prompts")
    add("--model", default="black-forest-labs/FLUX.1-dev", help="folder in FLUX.1-dev's layout, or hub id")
    add("--weights",
        help="folder of trained transformer weights (None: the model's own), such as runs/miniature/weights")
    add("--prompts", "--eval-prompts", dest="eval_prompts", default="hpdv2-benchmark",
        help="text file, one prompt a line, or hpdv2-benchmark")
    add("--first", type=whole(1), default=16, help="how many of the prompts of the file, from the first")
    add("--size", type=whole(1), default=1024, help="side of the pictures, pixels")
    add("--eval-steps", type=whole(1), default=50, help="sampling steps [paper 4.1]")
    add("--guidance", type=real(0), default=3.5, help="distilled guidance [FLUX.1-dev]")
    add("--seed", type=whole(0), default=0, help="picture i is made from noise seed + i")
    add("--batch", type=whole(1), default=1, help="pictures sampled at a time")
    add("--out", default="samples", help="folder: one PNG a prompt, named by its number, and grid.png")
    return parser


def run(argv):
    args = parse(flags(), argv, flux.defaults_of)
    flux.needs_gpu(args.model)
    flux.check_size(args.model, args.size)
    flux.transformer_folder(args.model, args.weights)
    prompts = args.prompt or data.read_prompts(args.eval_prompts)[:args.first]
    make_folder(args.out)

    parallel.one_thread_on_a_cpu()
    device, dtype = parallel.device_and_dtype()
    embeddings = flux.encode_prompts(args.model, prompts, device, dtype)
    if embeddings.truncated:
        print(f"{embeddings.truncated} of {len(prompts)} prompts are longer than the text encoder takes; "
              f"they are truncated")
    model = flux.load(args.model, args.weights, device, dtype)
    grid = model.grid(args.size, args.size)
    noise = flux.noise(model, grid, range(args.seed, args.seed + len(prompts)))
    images = flux.sample(model, embeddings.txt, embeddings.pooled, noise, grid, args.eval_steps,
                         args.guidance, args.batch, partial(tqdm, desc="sample"))  # [P, 3, H, W]

    out = Path(args.out)
    for i, image in enumerate(images):
        save_picture(image, out / f"{i:05d}.png")
    list_prompts(out, [(prompt, "") for prompt in prompts])
    save_grid(images, out / "grid.png")
    print(printable(f"{len(images)} pictures in {out}/, all of them in {out / 'grid.png'}"))


def main():
    with frame("sample.py"):
        run(sys.argv[1:])


if __name__ == "__main__":
    main()
