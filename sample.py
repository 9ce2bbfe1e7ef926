"""Prompts to pictures: `python sample.py --model miniature "a red circle left of a blue square"`.

The same command line goes on where it was stopped. Another one needs another --out: pictures stay as they are.
"""

import sys
from pathlib import Path

from engine.loading import until_loaded

if __name__ == "__main__":
    until_loaded("sample.py")  # importing what follows takes seconds

import torch
from tqdm import tqdm

import flow
import recipe
from engine.command_line import CFG, MODEL, WEIGHTS, Parser, or_off, real, some_path, whole
from engine.data import prompt_files
from engine.data.pictures import read_picture
from engine.errors import frame, printable
from engine.files import must_be_writable, stamp
from engine.memory import modes, parallel, sampling
from engine.model import trained
from engine.run.stopping import Stopping
from evaluation.picture_folders import begin, check_made, clean, is_whole, mark_of, save_grid, save_picture
from rewards.pictures import pixels


def flags():
    """The flags of this script."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="the prompts; none: those of --prompts")
    add("--model", default="black-forest-labs/FLUX.1-dev", help=MODEL)
    add("--weights", help=WEIGHTS)
    add("--prompts", "--eval-prompts", dest="eval_prompts", default="hpdv2-benchmark",
        help="text file, one prompt a line, or hpdv2-benchmark")
    add("--first", type=whole(1), default=16, help="how many of the prompts of the file, from the first")
    add("--size", type=whole(1), default=1024, help="side of the pictures, pixels")
    add("--eval-steps", type=whole(1), default=50, help="sampling steps [paper 4.1]")
    add("--guidance", type=real(0), default=3.5, help="distilled guidance [FLUX.1-dev]")
    add("--cfg", type=or_off(real(1)), help=CFG)
    add("--seed", type=whole(0, 2**30), default=0, help="picture i is made from noise seed + i")
    add("--batch", type=whole(1), default=1, help="pictures sampled at a time")
    add("--memory", choices=sampling.NAMES, default="auto", help=sampling.HELP)
    add("--out", type=some_path, default="samples",
        help="folder: one PNG a prompt, named by its number, and grid.png")
    return parser


def run(argv, stopping):
    """Sample what a command line asks for. Raises UserError and Stopped."""
    args, model = recipe.of_script(flags(), argv)
    flow.needs_gpu(model)
    model.grid(args.size, args.size)
    recipe.check_cfg(args, model)
    parts = trained.check(args.weights, model)
    if args.prompt:
        prompt_files.check_prompts(args.prompt, "prompt")
    prompts = args.prompt or prompt_files.read_prompts(args.eval_prompts)[:args.first]
    must_be_writable(args.out, "--out")
    out = Path(args.out)
    files = [out / f"{i:05d}.png" for i in range(len(prompts))]
    made = {"by": "sample.py", "prompts": prompts, "model": args.model, "size": args.size,
            "weights": stamp(trained.place_of(args.weights)) if args.weights else [],
            "eval_steps": args.eval_steps, "guidance": args.guidance, "seed": args.seed}
    if args.cfg is not None:
        made["cfg"] = args.cfg
    world = parallel.World(mesh=modes.needs_mesh(args.memory))
    args.memory, why = sampling.settle(sampling.job(model, args.size, args.batch, args.cfg), args.memory, world)
    made |= sampling.made(args.memory)
    check_made(out, made, args.out)
    if why:
        world.say(why)
    for note in [*model.notes(vars(args)), *trained.notes(args.weights)]:
        print(printable(note))

    model.fetch(parts)
    embeddings = flow.encode_prompts(model, prompts, world.device, world.dtype)
    if embeddings.truncated:
        print(f"{embeddings.truncated} of {len(prompts)} prompts are longer than the text encoder takes; "
              f"they are truncated")
    net = flow.load(model, args.weights, world.device, world.dtype,
                    *sampling.how(args.memory, args.weights, model, world))
    net.guide(args.cfg, embeddings.empty)
    grid = net.grid(args.size, args.size)
    clean(out)
    begin(out, made, [(prompt, "") for prompt in prompts])
    for first in tqdm(range(0, len(prompts), args.batch), "sample"):
        stopping.check()
        rows = range(first, min(first + args.batch, len(prompts)))
        if not all(is_whole(files[i]) for i in rows):
            part = slice(rows.start, rows.stop)
            noise = flow.noise(net, grid, [args.seed + i for i in rows])
            images = flow.sample(net, embeddings.txt[part], embeddings.pooled[part], noise, grid,
                                 args.eval_steps, args.guidance, args.batch)  # [B, 3, H, W]
            for i, image in zip(rows, images, strict=True):
                save_picture(image, files[i], mark=mark_of(made))
        stopping.words = (f"stopped; {rows.stop} of {len(prompts)} pictures are in {args.out}/; run it again "
                          "to go on")

    save_grid(torch.stack([pixels(read_picture(file)) for file in files]), out / "grid.png", mark=mark_of(made))
    print(printable(f"{len(prompts)} pictures in {args.out}/, all of them in {out / 'grid.png'}"))


def main():
    """From the command line to the pictures."""
    with frame("sample.py"):
        run(sys.argv[1:], Stopping("stopped before the first picture; run it again"))


if __name__ == "__main__":
    main()
