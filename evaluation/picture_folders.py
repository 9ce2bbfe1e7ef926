"""Folders of pictures. A picture is named by its prompt's number, 00012.png; prompts.json lies beside the pictures.

sample.py and evaluate.py write such folders. evaluate.py scores them, and the human study shows them. Both also take
folders that other programs wrote. made.json beside the pictures says how they are made; its digest is in every picture
that belongs to it. A picture without the digest is not ours, and is never replaced.
"""

import hashlib
import io
import json
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

from engine.data import prompt_files
from engine.data.pictures import read_picture
from engine.errors import UserError, printable
from engine.files import (
    PNG_MARK,
    is_ours,
    must_be_writable,
    must_not_lead_away,
    read_json,
    remove_leftovers,
    stamp,
    write_json,
    write_whole,
)
from engine.memory import sampling
from engine.model import trained
from engine.paths import named_path
from srpo_reward import with_words

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last bytes of every PNG
OWN = ("geneval", "diversity")  # metrics with their own pictures, in subfolders of these names
PREFIXED = "base with the words"
# The names that evaluate.py itself writes in --out.
TAKEN = ["base", "base_with_the_words", "scores", "made.json", "results.json", "pictures.jsonl", "table.md",
         "table.csv", "table.tex", "sheet.png"]
BY = "evaluate.py"


@dataclass
class Picture:
    """A picture to sample or score: its name (the prompt's number), prompt, noise seed and category.

    entry: for a metric with its own prompts, the data that it needs about this prompt; otherwise None."""
    name: str
    prompt: str
    seed: int
    category: str
    entry: dict = None


@dataclass
class Method:
    """A row of evaluate.py's table, and the folder of its pictures."""
    name: str
    folder: Path
    weights: str = None  # None: the model's own
    files: dict = field(default_factory=dict)  # {name: file} of pictures that exist already (--images)
    made: dict = None  # how the pictures are sampled: the content of made.json
    words: str = None  # words before every prompt (--prefix)

    def asks(self, picture):
        """The text that a picture is sampled from: its prompt, after `words` if there are any. Scorers always get the
        prompt alone."""
        return with_words(self.words, [picture.prompt])[0] if self.words else picture.prompt

    def path(self, picture):
        """The file of a picture. It may not exist yet."""
        return self.files.get(picture.name, self.folder / f"{picture.name}.png")

    def read(self, pictures, unreadable):
        """{name: PIL picture} of those that can be read. For each other one a text is added to `unreadable`."""
        images = {}
        for picture in pictures:
            try:
                images[picture.name] = read_picture(self.path(picture))
            except UserError as error:
                unreadable.append(str(error))
        return images


def first_of_each(categories, n):
    """The indices of the first n entries of each category; all indices if n is None."""
    seen = Counter()
    chosen = []
    for i, category in enumerate(categories):
        if n is None or seen[category] < n:
            chosen.append(i)
        seen[category] += 1
    return chosen


def benchmark(prompts, seed, n):
    """The `Picture`s of [(prompt, category)]: the first n of each category, or all if n is None. Picture i always has
    the noise seed `seed` + i, for any n."""
    found = []
    for i in first_of_each([category for _, category in prompts], n):
        prompt, category = prompts[i]
        found.append(Picture(f"{i:05d}", prompt, seed + i, category))
    return found


# ---------------------------------------------------------------------------------------------------- reading
def picture_files(folder):
    """The files in a folder with a picture's suffix, sorted; [] if there is no such folder. Raises UserError for one
    that is not a regular file, because reading a pipe could wait for ever."""
    found = []
    if not folder.is_dir():
        return found
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES:
            if file.exists() and not file.is_file():
                raise UserError(f"{file}: not a file")
            found.append(file)
    return found


def files_of(folder):
    """{name: file} of a folder's pictures. 12.png and 00012.JPG are both named "00012". geneval/00012_3.png, of a
    metric with its own pictures, is named "geneval/00012_3". Raises UserError if there are no pictures, or two with
    one name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = {}
    for file in picture_files(folder):
        if re.fullmatch("[0-9]+", file.stem):
            number = int(file.stem)
            if found.setdefault(f"{number:05d}", file) != file:
                raise UserError(f"{file}: a second picture of prompt {number}")
    if not found:
        raise UserError(f"{folder}: no pictures 00000.png, 00001.png, ... (or .jpg, .jpeg, .webp) in it")
    for name in OWN:
        for file in picture_files(folder / name):
            if re.fullmatch("[0-9]{5}_[0-9]+", file.stem):
                if found.setdefault(f"{name}/{file.stem}", file) != file:
                    raise UserError(f"{file}: a second picture {file.stem}")
    return found


ENTRY = '{"prompt": ..., "category": ...}'  # of prompts.json; the category may be left out


def listed(folder):
    """The list of `Prompt` in a folder's prompts.json, in the order of the pictures' numbers; None without the file.
    Raises UserError if the file holds something else."""
    path = Path(folder) / "prompts.json"
    if not path.exists():
        return None
    entries = read_json(path, [{"prompt": str}], f'must be a list of {ENTRY}')
    if not all(isinstance(entry.get("category", ""), str) for entry in entries):
        raise UserError(f"{path}: must be a list of {ENTRY}")
    return [prompt_files.Prompt(entry["prompt"], entry.get("category", "")) for entry in entries]


def list_prompts(folder, prompts):
    """Write prompts.json for [(prompt, category)] into a folder."""
    entries = [{"prompt": text, "category": category} for text, category in prompts]
    write_json(folder / "prompts.json", entries)


def is_whole(path):
    """Whether a PNG exists and is complete to its last bytes. A failed disk may have truncated it."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - len(PNG_END)))
        return file.read() == PNG_END


# ------------------------------------------------------------------------------------------ rows of the table
def named(flag, items, taken=TAKEN):
    """["NAME=PATH" or "PATH"] -> {name: path}. A path without a name is its own name. Raises UserError for names that
    cannot be separate folders in --out. taken: the names that the script itself writes there."""
    found = {}
    own = ", ".join(taken)
    taken = set() if flag == "--images" else set(taken)
    for item in items:
        name, path = named_path(item)
        name = printable(path if name is None else name)
        folder = folder_name(name)
        on_disk = unicodedata.normalize("NFC", folder).casefold()  # some file systems ignore case and Unicode forms
        if not 0 < len(folder) <= 200:
            raise UserError(f'{flag} "{item}": not a name for a folder; give NAME=PATH')
        if on_disk in taken:
            raise UserError(f"{flag} {item}: a name is used twice, or taken ({own} are the "
                            f"script's own); give NAME=PATH")
        taken.add(on_disk)
        found[name] = path
    return found


def folder_name(name):
    """A row's name as a folder's name: characters that a file system may refuse become "_"."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._")


def must_be_own(out, rows):
    """Raise UserError if --out cannot be written, or if evaluate.py would overwrite files there that it did not write.
    Its made.json is the mark. rows: the names of the rows' folders."""
    must_be_writable(out, "--out")
    must_not_lead_away(out, [*TAKEN, *rows, "scores/*", "scores/*/*"])
    mark = Path(out) / "made.json"
    if mark.exists() and read_json(mark) == {"by": BY}:
        return
    theirs = [name for name in [*TAKEN, *rows] if os.path.lexists(Path(out) / name)]
    if theirs:
        raise UserError(f"--out {out}: {theirs[0]} is there, and not from {BY}; give another --out")


def make_own(out):
    """Make --out, with the mark that `must_be_own` looks for. Raises UserError if it cannot be."""
    make_folder(out)
    write_json(Path(out) / "made.json", {"by": BY})


def make_folder(out):
    """Make a folder of pictures. Raises UserError if it cannot be."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error


def planned(args, prompts):
    """The `Method`s to sample: the base, the base with --prefix, and each of --weights, in folders of --out. Raises
    UserError if a folder holds pictures that were made with other settings. Nothing is written."""
    methods = [Method("base", Path(args.out) / "base")]
    if args.prefix:
        methods.append(Method(PREFIXED, Path(args.out) / folder_name(PREFIXED), words=args.prefix))
    for name, path in named("--weights", args.weights).items():
        methods.append(Method(name, Path(args.out) / folder_name(name), str(trained.place_of(path))))
    must_be_own(args.out, [method.folder.name for method in methods])
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    for method in methods:
        method.made = made_of(BY, args, method.weights, digest) | {"words": method.words}
        method.made |= sampling.made(args.memory)
        check_made(method.folder, method.made, args.out)
    return methods


def made_of(by, args, weights, prompts):
    """The content of made.json: how a script (`by`) samples pictures with its flags. weights: a path, or None: the
    model's own. prompts: a list, or a digest of it."""
    made = {"by": by, "prompts": prompts, "model": args.model, "size": args.size,
            "weights": stamp(weights) if weights else [], "eval_steps": args.eval_steps, "guidance": args.guidance,
            "seed": args.seed}
    return made if args.cfg is None else made | {"cfg": args.cfg}


def mark_of(made):
    """The mark in the pictures that are made as `made` says, bytes."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest().encode()


def check_made(folder, made, out):
    """Raise UserError if pictures that are made as `made` says would replace other files in a folder. Nothing is
    written."""
    own = ["made.json", "prompts.json", "grid.png"]
    must_not_lead_away(folder, [*own, *OWN, "[0-9]*.png", *(f"{name}/[0-9]*.png" for name in OWN)])
    stored = folder / "made.json"
    if stored.exists():
        then = read_json(stored)
        if not isinstance(then, dict) or then.get("by") != made["by"]:
            raise UserError(f"{stored}: not {made['by']}'s; give another --out")
        for key, now in made.items():
            if then.get(key) != now:
                what = "" if key in ("weights", "prompts", "lines") else f" {then.get(key)}, now {now}"
                raise UserError(f"--out {out}: the pictures in {folder} were made with other {key}{what}; "
                                f"delete that folder, or give another --out")
    files = [file for place in (folder, *(folder / name for name in OWN)) for file in picture_files(place)]
    theirs = [file for file in files if file.suffix == ".png" and file.stem[0].isdecimal() or file.name == "grid.png"]
    if not stored.exists():
        theirs += [folder / name for name in own if (folder / name).exists()]
    for file in theirs:
        if file.stat().st_size and not is_ours(file, mark_of(made)):  # a failed disk leaves empty files
            raise UserError(f"--out {out}: {file} is there, and not from {made['by']} with these flags; give another "
                            "--out")


def clean(*folders):
    """Remove the hidden files that a killed process left in these folders. No process may be writing there."""
    for folder in folders:
        for place in (folder, *(Path(folder) / name for name in OWN)):
            remove_leftovers(place, ["*.png", *TAKEN, "prompts.json"])


def begin(folder, made, prompts):
    """Make a folder of pictures, with made.json and prompts.json for [(prompt, category)]. Raises UserError if it
    cannot be made."""
    make_folder(folder)
    if (folder / "prompts.json").exists() and listed(folder) != prompts:
        raise UserError(f"{folder / 'prompts.json'}: is not {made['by']}'s; give another --out")
    write_json(folder / "made.json", made)
    list_prompts(folder, prompts)


def existing(args):
    """(list of `Method`, list of `Prompt`) for --images. The prompts come from the folders' prompts.json, otherwise
    from --prompts. Raises UserError for a folder without pictures, and for folders whose prompts differ."""
    methods = []
    for name, path in named("--images", args.images).items():
        methods.append(Method(name, Path(path), files=files_of(path)))
    lists = {method.folder: listed(method.folder) for method in methods}
    lists = {folder: prompts for folder, prompts in lists.items() if prompts is not None}
    if lists:
        first, prompts = next(iter(lists.items()))
        if args.eval_prompts is not None:
            raise UserError(f"--prompts {args.eval_prompts}: {first} has its own, in prompts.json; leave --prompts out")
    elif args.eval_prompts is None:
        raise UserError(f"--images {methods[0].folder}: no prompts.json in it; give its prompts: --prompts FILE")
    else:
        prompts = prompt_files.read_prompts_by_category(args.eval_prompts)
    prompt_files.check_prompts([prompt.text for prompt in prompts], "--images: prompts.json")
    for folder, others in lists.items():
        if others != prompts:
            same = [a == b for a, b in zip(others, prompts, strict=False)]
            i = same.index(False) if False in same else len(same)
            raise UserError(f"--images: the prompts of {folder} and {first} differ, first at number {i}")
    for method in methods:
        last = max(int(name) for name in method.files if name.isdigit())
        if last >= len(prompts):
            raise UserError(f"--images {method.folder}: picture {last}, but there are {len(prompts)} prompts; give "
                            "theirs, in prompts.json or by --prompts FILE")
    return methods, prompts


# ---------------------------------------------------------------------------------------------------- writing
def write_png(picture, path, mark=b""):
    """Write a PIL picture as a PNG that carries PNG_MARK, and a further `mark`. An interrupted write leaves no partial
    file."""
    texts = PngInfo()
    keyword, ours = PNG_MARK.decode().split("\0")
    texts.add_text(keyword, ours)
    if mark:
        texts.add_text("made", mark.decode())
    png = io.BytesIO()
    picture.save(png, "PNG", pnginfo=texts)
    write_whole(path, png.getvalue())


def save_picture(images, path, columns=8, mark=b""):
    """Write a picture [3, H, W] or a grid of pictures [P, 3, H, W], in [0, 1], as a PNG, by
    `write_png`."""
    grid = make_grid(images, columns).mul(255).add(0.5).clamp(0, 255).permute(1, 2, 0).to("cpu", torch.uint8)
    path.parent.mkdir(exist_ok=True)
    write_png(Image.fromarray(grid.numpy()), path, mark)


def save_grid(images, path, columns=8, mark=b""):
    """Write pictures [P, 3, H, W] as one PNG. Small pictures are enlarged to about 128 pixels, so that they can be
    seen."""
    scale = max(1, 128 // images.shape[-1])
    save_picture(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), path, columns, mark)


def places(picture, side, number):
    """[(x, y, width, height)] in pixels: where the pictures are in a grid that `save_grid` wrote, a PIL picture. side:
    of each picture, which is square, before it was enlarged; number: how many there are, at most."""
    side *= max(1, 128 // side)
    if min(picture.size) < side + 4:  # a grid of one picture has no frame
        return [(0, 0, *picture.size)]
    columns = (picture.width - 2) // (side + 2)
    rows = (picture.height - 2) // (side + 2)
    return [(2 + i % columns * (side + 2), 2 + i // columns * (side + 2), side, side)
            for i in range(min(number, columns * rows))]
