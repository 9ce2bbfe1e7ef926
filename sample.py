"""Prompts to pictures: `python sample.py --model miniature "a red circle left of a blue square"`.

    python sample.py --model miniature --weights base --weights srpo=runs/miniature --size 96x64    side by side

The same command line goes on where it was stopped. Another command line needs another --out: pictures are never
replaced.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from engine.loading import until_loaded

if __name__ == "__main__":
    until_loaded("sample.py")  # importing what follows takes seconds

from tqdm import tqdm

import command
import flow
from engine.command_line import WEIGHTS, Parser, given, real, sides, some_path, whole
from engine.data import prompt_files
from engine.data.pictures import read_picture
from engine.data.text_files import is_blank
from engine.errors import UserError, frame, printable
from engine.files import must_be_writable
from engine.memory import modes, parallel, sampling
from engine.model import trained
from engine.paths import leads_somewhere, named_path
from evaluation import picture_folders, sheets

BASE = "base"  # --weights base: the model's own


def flags():
    """The flags of this script."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="the prompts; none: those of --prompts")
    sampling.add_flags(add)
    add("--weights", action="append", default=[], metavar="[NAME=]PATH",
        help="base for the model's own, or " + WEIGHTS + "; given several times: a line of the grid for each")
    add("--strength", type=real(-10, 10), default=1.0, help="factor of every LoRA in --weights")
    add("--prompts", "--eval-prompts", dest="eval_prompts", default="hpdv2-benchmark",
        help="text file, one prompt a line, or hpdv2-benchmark")
    add("--first", type=whole(1), default=16, help="how many of the prompts of the file, from the first")
    add("--out", type=some_path, default="samples",
        help="folder: one PNG a prompt, named by its number, and grid.png; with several --weights, a folder for each")
    return parser


@dataclass
class Line:
    """A line of the grid."""
    name: str
    weights: str  # None: the model's own
    folder: Path
    made: dict    # how its pictures are made: the content of made.json

    def file(self, i):
        """The file of prompt i's picture."""
        return self.folder / f"{i:05d}.png"


def lines_of(args, prompts):
    """The `Line`s of the grid, one for each of --weights. Raises UserError for a --strength without a LoRA."""
    if len(args.weights) > 1:
        asked = picture_folders.named("--weights", args.weights, taken=("grid.png", "made.json", "prompts.json"))
    else:
        asked = {BASE: named_path(args.weights[0])[1] if args.weights else BASE}
    lines = []
    for name, path in asked.items():
        weights = None if path == BASE else path
        made = picture_folders.made_of("sample.py", args, trained.place_of(weights) if weights else None, prompts)
        if args.strength != 1 and weights and not trained.is_full(weights):
            made["strength"] = args.strength
        folder = Path(args.out)
        if len(asked) > 1:
            folder /= picture_folders.folder_name(name)
        lines.append(Line(name, weights, folder, made))
    if args.strength != 1 and not any("strength" in line.made for line in lines):
        raise UserError(f"--strength {args.strength:g}: is the factor of a LoRA, and none of --weights is one")
    return lines


def run(argv, stopping):
    """Sample what a command line asks for. Raises UserError and Stopped."""
    args, model = command.of_script(flags(), argv)
    flow.needs_gpu(model)
    model.grid(*sides(args.size))
    command.check_cfg(args, model)
    for prompt in args.prompt:
        if leads_somewhere(prompt):
            raise UserError(f'"{printable(prompt)}": a path where a prompt is expected; each of several weights has '
                            "its own --weights")
    if args.prompt and "eval_prompts" in given(flags(), argv):
        raise UserError(f"--prompts {args.eval_prompts}: prompts are given too; leave one out")
    if any(map(is_blank, args.prompt)):
        raise UserError('"": a prompt of no words; give some')
    if args.prompt:
        prompt_files.check_prompts(args.prompt, "prompt")
    prompts = args.prompt or prompt_files.read_prompts(args.eval_prompts)[:args.first]
    must_be_writable(args.out, "--out")
    lines = lines_of(args, prompts)
    parts = []
    notes = model.notes(vars(args))
    for line in lines:
        parts += trained.check(line.weights, model)
        notes += trained.notes(line.weights)
    world = parallel.World(mesh=modes.needs_mesh(args.memory))
    args.memory, why = sampling.settle(sampling.job(model, args.size, args.batch, args.cfg), args.memory, world)
    for line in lines:
        line.made |= sampling.made(args.memory)
        picture_folders.check_made(line.folder, line.made, args.out)
    of_all = {"by": "sample.py", "lines": [line.made for line in lines]}
    made = lines[0].made
    if len(lines) > 1:
        made = of_all
        picture_folders.check_made(Path(args.out), made, args.out)
    if why:
        world.say(why)
    for note in dict.fromkeys(notes):
        print(printable(note))

    model.fetch(list(dict.fromkeys(parts)))
    embeddings = flow.encode_prompts(model, prompts, world.device, world.dtype)
    embeddings.say_truncated(print)
    for number, line in enumerate(lines):
        net = flow.load(model, line.weights, world.device, world.dtype,
                        *sampling.how(args.memory, line.weights, model, world), strength=args.strength)
        for folder, of_folder in {Path(args.out): made, line.folder: line.made}.items():
            picture_folders.clean(folder)
            picture_folders.begin(folder, of_folder, [(prompt, "") for prompt in prompts])
        sample(args, net, line, embeddings, stopping, number * len(prompts), len(lines))
        del net  # before the next one is loaded

    columns = [sheets.Column(sheets.label_of(prompt, args.seed + i), [read_picture(line.file(i)) for line in lines])
               for i, prompt in enumerate(prompts)]
    names = [line.name for line in lines] if len(lines) > 1 else [""]
    sheets.save(names, columns, Path(args.out) / "grid.png", picture_folders.mark_of(made))
    print(printable(f"{len(prompts) * len(lines)} pictures in {args.out}/, all of them in "
                    f"{Path(args.out) / 'grid.png'}"))


def sample(args, net, line, embeddings, stopping, done, lines):
    """Sample the pictures of a `Line` that are not there yet, with its `flow.Flow`. done: how many pictures the lines
    before have; lines: how many there are. Raises Stopped."""
    prompts = len(embeddings.txt)
    net.guide(args.cfg, embeddings.empty)
    grid = net.grid(*sides(args.size))
    for first in tqdm(range(0, prompts, args.batch), f"sample {line.name}"):
        stopping.check()
        rows = range(first, min(first + args.batch, prompts))
        if not all(picture_folders.is_whole(line.file(i)) for i in rows):
            part = slice(rows.start, rows.stop)
            noise = flow.noise(net, grid, [args.seed + i for i in rows])
            images = flow.sample(net, embeddings.txt[part], embeddings.pooled[part], noise, grid,
                                 args.eval_steps, args.guidance, args.batch)  # [B, 3, H, W]
            for i, image in zip(rows, images, strict=True):
                picture_folders.save_picture(image, line.file(i), mark=picture_folders.mark_of(line.made))
        stopping.words = (f"stopped; {done + rows.stop} of {lines * prompts} pictures are in {args.out}/; run it again "
                          "to go on")


def main():
    """From the command line to the pictures."""
    with frame("sample.py", "stopped before the first picture; run it again") as stopping:
        run(sys.argv[1:], stopping)


if __name__ == "__main__":
    main()
