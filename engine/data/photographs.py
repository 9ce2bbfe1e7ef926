"""Photographs to train on: a folder of pictures with captions (--images). They are cropped to a few shapes of about
the same area, and encoded once. Their order is the same on any number of processes."""

import hashlib
import math
import os
import warnings
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from engine.data import draws, prompt_files
from engine.errors import UserError, one_line
from engine.paths import not_a_path

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
METADATA = "metadata.jsonl"
RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9, 2)  # width : height of the shapes
MOST_ENLARGED = 2  # a picture that would be enlarged more is skipped: it would teach blur
LEAST_KEPT = 0.5   # a picture of which cropping would leave a smaller share is skipped
MOST_TOLD = 10     # how many of the skipped pictures are named, each in a line
ORIENTATION = 0x0112  # the EXIF tag; values from 5 on swap width and height


class Photograph(NamedTuple):
    """A picture that can be trained on."""
    file: Path
    caption: str
    grid: tuple  # (rows, columns) of tokens that it is cropped to


class Skipped(Exception):
    """Why a picture cannot be trained on."""


# ---------------------------------------------------------------------------------------- a folder's pictures
def read(folder, side, unit, world, flag="--images"):
    """The `Photograph`s in a folder and its subfolders, sorted. They are for pictures of about side x side pixels, and
    for tokens of unit x unit pixels. The processes of a `parallel.World` each check a part of the pictures. Those that
    cannot be trained on are named once. flag: the one that named the folder, for messages. Raises UserError if none is
    left."""
    if not_a_path(folder) or not Path(folder).is_dir():
        raise UserError(f"{flag} {folder[:80]!r}: no such folder; give a folder of pictures, with captions in "
                        f".txt files beside them or in a {METADATA}")
    folder = Path(folder)
    captions = captions_of_metadata(folder, flag)
    files = pictures_in(folder)
    if not files:
        raise UserError(f"{flag} {folder}: no picture in it ({', '.join(PICTURES)})")
    found = {}
    mine = files[world.rank::world.size]
    for file in tqdm(mine, f"look at {flag}", leave=False, disable=not world.main or len(mine) < 100):
        found[file] = look(file, captions, shapes_of(side // unit), unit)
    for theirs in world.gather(found):
        found |= theirs

    photographs = [found[file] for file in files if isinstance(found[file], Photograph)]
    skipped = {file: found[file] for file in files if not isinstance(found[file], Photograph)}
    if set(skipped.values()) == {NO_CAPTION} and not photographs:
        raise UserError(f"{flag} {folder}: no caption for any of its {len(files)} pictures; write one "
                        f'beside each (fox.txt for fox.jpg), or a {METADATA} with "file_name" and "text"')
    if not photographs:
        file, why = next(iter(skipped.items()))
        raise UserError(f"{flag} {folder}: none of its {len(files)} pictures can be trained on, such as "
                        f"{file.relative_to(folder)}: {why}")
    for name in sorted(captions.keys() - {os.path.normpath(file) for file in files}):
        skipped[name] = f"named in {METADATA}, and there is no such picture"
    tell(skipped, folder, world, flag)
    return photographs


def tell(skipped, folder, world, flag):
    """Print which pictures are skipped, {file: why}: the first MOST_TOLD in a line each, then how many more."""
    for file, why in list(skipped.items())[:MOST_TOLD]:
        world.say(f"{flag}: {os.path.relpath(file, folder)} is skipped: {why}")
    if len(skipped) > MOST_TOLD:
        world.say(f"{flag}: {len(skipped) - MOST_TOLD} more are skipped")


def pictures_in(folder):
    """The files in a folder and its subfolders whose names end as in PICTURES; hidden ones are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in PICTURES and not is_hidden and not path.is_dir():
            found.append(path)
    return found


def captions_of_metadata(folder, flag):
    """{path: caption} of all pictures that a metadata.jsonl in a folder names, in the format of Hugging Face's
    imagefolder: a line is an object with a "file_name", relative to the metadata.jsonl, and one of
    `prompt_files.KEYS`. Raises UserError."""
    captions = {}
    for file in sorted(folder.rglob(METADATA)):
        for number, line in prompt_files.lines_of_jsonl(file, flag):
            if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
                raise UserError(f'{flag} {file}: line {number} must be an object with a "file_name" and a '
                                '"text"; fix it or remove it')
            captions[os.path.normpath(file.parent / line["file_name"])] = prompt_files.prompt_in(line)
    return captions


NO_CAPTION = f"no caption, in a .txt beside it or in {METADATA}"


def caption_of(file, captions):
    """The caption of a picture: from the .txt beside it if there is one, otherwise from `captions`, the result of
    `captions_of_metadata`. Raises Skipped."""
    beside = file.with_suffix(".txt")
    try:
        text = captions.get(os.path.normpath(file))
        if beside.exists():
            text = prompt_files.text_of(beside, "its caption")
        caption = " ".join((text or "").split())
        prompt_files.check_prompts([caption], "its caption")
    except UserError as error:
        raise Skipped(str(error)) from error
    if not caption:
        raise Skipped(NO_CAPTION)
    return caption


# -------------------------------------------------------------------------------------- a picture, and shapes
def look(file, captions, shapes, unit):
    """The `Photograph` of a file; or a text, which says why it is skipped."""
    try:
        caption = caption_of(file, captions)
        width, height = size_of(file)
        grid = nearest(width / height, shapes)
        rows, columns = grid
        longer = width / height / (columns / rows)
        kept = min(longer, 1 / longer)
        if kept < LEAST_KEPT:
            raise Skipped(f"{width} x {height} pixels: too long, only {kept:.0%} of it would be left after cropping to "
                          f"{columns * unit} x {rows * unit}")
        larger = max(columns * unit / width, rows * unit / height)
        if larger > MOST_ENLARGED:
            raise Skipped(f"{width} x {height} pixels: too small, it would be enlarged {larger:.1f} times; "
                          f"at most {MOST_ENLARGED} times are allowed")
    except Skipped as why:
        return str(why)
    return Photograph(file, caption, grid)


def size_of(file):
    """(width, height) of a picture in pixels, after the rotation that EXIF asks for. The whole file is decoded, a JPEG
    at an eighth of its size, so that a truncated file is found now. Raises Skipped."""
    if not file.is_file():  # reading from a pipe would wait forever
        raise Skipped("not a file")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ORIENTATION, 1) >= 5
            picture.draft("RGB", (width // 8, height // 8))
            picture.load()
    except Exception as error:  # a decoder may raise anything for a damaged file
        why = one_line(error).split(" '")[0]  # PIL repeats the file's name, in quotes
        raise Skipped(f"cannot be read as a picture: {why}") from error
    return (height, width) if turned else (width, height)


def shapes_of(tokens):
    """The shapes that have RATIOS and about tokens x tokens tokens: a list of (rows, columns) of tokens."""
    shapes = []
    for ratio in RATIOS:
        rows = max(1, round(tokens / ratio**0.5))
        columns = max(1, round(tokens * ratio**0.5))
        shapes.append((rows, columns))
    return list(dict.fromkeys(shapes))


def nearest(ratio, shapes):
    """The shape whose ratio is nearest, on a log scale, to a ratio of width to height."""
    def distance(shape):
        rows, columns = shape
        return abs(math.log(columns / rows) - math.log(ratio))
    return min(shapes, key=distance)


def upright(file):
    """The picture of a file as PIL RGB, rotated as EXIF says. Transparent pixels become white, and 16-bit greys
    become 8-bit."""
    with warnings.catch_warnings(action="ignore"), Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def pixels(photograph, unit):
    """A photograph [1, 3, H, W] in [0, 1], resized and cropped around its centre to its shape; unit: pixels a side of
    a token. Raises UserError if it cannot be decoded: `size_of` decodes a JPEG only coarsely, and the file may have
    changed since."""
    rows, columns = photograph.grid
    size = (columns * unit, rows * unit)
    try:
        picture = ImageOps.fit(upright(photograph.file), size, Image.Resampling.LANCZOS)
    except Exception as error:  # a decoder may raise anything for a damaged file
        raise UserError(f"{photograph.file} cannot be read as a picture: {one_line(error)}; remove "
                        "it") from error
    image = torch.from_numpy(np.array(picture)).float() / 255  # [H, W, 3]
    return image.permute(2, 0, 1)[None]


# ------------------------------------------------------------------------------------------------ their order
class Album(draws.Curriculum):
    """Which photographs a process uses in which update. All photographs of an update have one shape, on all processes.
    So a batch is one tensor, and no process waits for another with larger pictures.

    The shape of an update is that of one photograph, from a seeded permutation of all. So a shape comes as often as it
    has photographs. Each shape has its own series of permutations, and an update continues it where the last update of
    that shape ended. If a shape has fewer photographs than an update, they repeat in it, with other noise.
    """

    def __init__(self, photographs, unit, steps, images, mine, seed):
        """photographs: all of them; unit: pixels a side of a token; the rest is as for `draws.Curriculum`. Raises
        UserError."""
        self.unit = unit
        draws.check_count(steps, images)
        shapes = [photographs[n].grid for n in draws.prompt_order(len(photographs), steps, seed)]
        coming = {}
        for shape in dict.fromkeys(shapes):
            numbers = [n for n, photograph in enumerate(photographs) if photograph.grid == shape]
            order = draws.prompt_order(len(numbers), shapes.count(shape) * images, seed)
            coming[shape] = iter([numbers[i] for i in order])
        drawn = {}
        for step, shape in enumerate(shapes, 1):
            drawn[step] = list(islice(coming[shape], images))[mine]
        self.meet(drawn)
        self.grids = dict(enumerate(shapes, 1))
        self.photographs = [photographs[n] for n in self.met]
        self.prompts = [photograph.caption for photograph in self.photographs]
        self.texts = {"the captions of --images": [photograph.caption for photograph in photographs]}
        self.places = {"--images": [photograph.file for photograph in photographs]}
        self.encoded = []

    def encode(self, encode, made_by, cache, world):
        """Encode the photographs that this process uses, or take their latents from a `Cache`.

        encode: images [1, 3, H, W] in [0, 1] -> latents [1, N, C]; made_by: all that the latents depend on besides
        the picture, as values that JSON can hold.
        """
        for photograph in tqdm(self.photographs, "encode --images", leave=False,
                               disable=not world.main or len(self.photographs) < 100):
            with open(photograph.file, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            key = cache.key("latents", content, photograph.grid, self.unit, made_by)
            kept = cache.get(key)
            if kept is None:
                kept = {"latents": encode(pixels(photograph, self.unit))[0].cpu().contiguous()}  # [N, C]
                cache.put(key, kept)
            self.encoded.append(kept["latents"])

    def grid(self, step):
        return self.grids[step]

    def latents(self, rows):
        return torch.stack([self.encoded[row] for row in rows])
