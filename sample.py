"""Prompts to pictures: `python sample.py --model miniature "a red circle left of a blue square"`."""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

import flux
import recipe
from engine.command_line import WEIGHTS, Parser, real, some_path, whole
from engine.data import prompt_files
from engine.errors import UserError, frame, printable
from engine.files import read_json, stamp, write_json
from engine.memory import parallel
from engine.model import trained
from engine.run.stopping import Stopping
from evaluation.picture_folders import check_out, is_whole, list_prompts, make_folder, save_grid, save_picture
from rewards.pictures import pixels, read_picture


def flags():
    """The flags of this script."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="the prompts; none: those of --prompts")
    add("--model", default="black-forest-labs/FLUX.1-dev", help="folder in FLUX.1-dev's layout, or hub id")
    add("--weights", help=WEIGHTS)
    add("--prompts", "--eval-prompts", dest="eval_prompts", default="hpdv2-benchmark",
        help="text file, one prompt a line, or hpdv2-benchmark")
    add("--first", type=whole(1), default=16, help="how many of the prompts of the file, from the first")
    add("--size", type=whole(1), default=1024, help="side of the pictures, pixels")
    add("--eval-steps", type=whole(1), default=50, help="sampling steps [paper 4.1]")
    add("--guidance", type=real(0), default=3.5, help="distilled guidance [FLUX.1-dev]")
    add("--seed", type=whole(0, 2**30), default=0, help="picture i is made from noise seed + i")
    add("--batch", type=whole(1), default=1, help="pictures sampled at a time")
    add("--out", type=some_path, default="samples",
        help="folder: one PNG a prompt, named by its number, and grid.png")
    return parser


def run(argv, stopping):
    """Sample what a command line asks for. Raises UserError and Stopped."""
    args, model = recipe.of_script(flags(), argv)
    flux.needs_gpu(model)
    model.grid(args.size, args.size)
    parts = trained.check(args.weights, model)
    if args.prompt:
        prompt_files.check_prompts(args.prompt, "prompt")
    prompts = args.prompt or prompt_files.read_prompts(args.eval_prompts)[:args.first]
    check_out(args.out)
    folder = Folder(args, prompts)
    for note in [*model.notes(vars(args)), *trained.notes(args.weights)]:
        print(printable(note))

    parallel.one_thread_on_a_cpu()
    device, dtype = parallel.device_and_dtype()
    model.fetch(parts)
    embeddings = flux.encode_prompts(model, prompts, device, dtype)
    if embeddings.truncated:
        print(f"{embeddings.truncated} of {len(prompts)} prompts are longer than the text encoder takes; "
              f"they are truncated")
    net = flux.load(model, args.weights, device, dtype)
    grid = net.grid(args.size, args.size)
    folder.open()
    for first in tqdm(range(0, len(prompts), args.batch), "sample"):
        stopping.check()
        rows = range(first, min(first + args.batch, len(prompts)))
        if not all(is_whole(folder.files[i]) for i in rows):
            part = slice(rows.start, rows.stop)
            noise = flux.noise(net, grid, [args.seed + i for i in rows])
            images = flux.sample(net, embeddings.txt[part], embeddings.pooled[part], noise, grid,
                                 args.eval_steps, args.guidance, args.batch)  # [B, 3, H, W]
            for i, image in zip(rows, images, strict=True):
                save_picture(image, folder.files[i])
        stopping.words = (f"stopped; {rows.stop} of {len(prompts)} pictures are in {args.out}/; run it again "
                          "to go on")

    save_grid(torch.stack([pixels(read_picture(file)) for file in folder.files]), folder.out / "grid.png")
    print(printable(f"{len(prompts)} pictures in {args.out}/, all of them in {folder.out / 'grid.png'}"))


class Folder:
    """The folder of the pictures, with a note of what they are made from: a call that was stopped goes on
    where it was, and one with other prompts or flags replaces what an earlier one made. Raises UserError for
    pictures that sample.py did not make; nothing is written or removed before `open`."""

    def __init__(self, args, prompts):
        self.out = Path(args.out)
        self.prompts = prompts
        self.files = self.named(len(prompts))
        self.made = {"by": "sample.py", "prompts": prompts, "model": args.model, "size": args.size,
                     "weights": stamp(trained.place_of(args.weights)) if args.weights else [],
                     "eval_steps": args.eval_steps, "guidance": args.guidance, "seed": args.seed}
        note = self.out / "made.json"
        self.then = read_json(note) if note.exists() else {}
        if not isinstance(self.then, dict) or self.then.get("by") != "sample.py":
            for file in [*self.files, self.out / "prompts.json", self.out / "grid.png"]:
                if file.exists():
                    raise UserError(f"--out {args.out}: {file.name} is there, and not from sample.py; give "
                                    "another --out")
            self.then = {"prompts": []}

    def named(self, n):
        """The files of n pictures."""
        return [self.out / f"{i:05d}.png" for i in range(n)]

    def open(self):
        """Make the folder ready for its pictures."""
        make_folder(self.out)
        if self.then != self.made:
            for file in self.named(len(self.then["prompts"])):
                file.unlink(missing_ok=True)
            write_json(self.out / "made.json", self.made)
        list_prompts(self.out, [(prompt, "") for prompt in self.prompts])


def main():
    """From the command line to the pictures."""
    with frame("sample.py"):
        run(sys.argv[1:], Stopping("stopped before the first picture; run it again"))


if __name__ == "__main__":
    main()
