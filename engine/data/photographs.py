"""Photographs to train on: a folder of pictures with captions (--images). They are cropped to a few shapes of about
the same area, and encoded once. Their order is the same on any number of processes."""

import hashlib
import math
import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from engine.data import captions, draws, pictures
from engine.data.captions import METADATA, NO_CAPTION, Skipped
from engine.errors import UserError
from engine.paths import not_a_path

RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9, 2)  # width : height of the shapes
MOST_ENLARGED = 2  # a picture that would be enlarged more is skipped: it would teach blur
LEAST_KEPT = 0.5   # a picture of which cropping would leave a smaller share is skipped
MOST_TOLD = 10     # how many of the skipped pictures are named, each in a line


class Photograph(NamedTuple):
    """A picture that can be trained on."""
    file: Path
    caption: str
    grid: tuple  # (rows, columns) of tokens that it is cropped to


# ---------------------------------------------------------------------------------------- a folder's pictures
def read(folder, side, unit, world, flag="--images"):
    """The `Photograph`s in a folder and its subfolders, sorted. They are for pictures of about side x side pixels, and
    for tokens of unit x unit pixels. The processes of a `parallel.World` each check a part of the pictures. Those that
    cannot be trained on are named once. flag: the one that named the folder, for messages. Raises UserError if none is
    left."""
    if not_a_path(folder) or not Path(folder).is_dir():
        raise UserError(f"{flag} {folder[:80]!r}: no such folder; give {'a number, or ' * (flag == '--land')}a folder "
                        f"of pictures, with captions in .txt files beside them or in a {METADATA}")
    folder = Path(folder)
    named = captions.captions_of_metadata(folder, flag)
    files, others = captions.files_in(folder, flag)
    captions.must_have_one_caption_each(files, flag)
    if not files:
        raise UserError(f"{flag} {folder}: no picture in it ({', '.join(captions.PICTURES)})")
    found = {}
    mine = files[world.rank::world.size]
    for file in tqdm(mine, f"look at {flag}", leave=False, disable=not world.main or len(mine) < 100):
        found[file] = look(file, named, shapes_of(side // unit), unit)
    for theirs in world.gather(found):
        found |= theirs

    photographs = [found[file] for file in files if isinstance(found[file], Photograph)]
    skipped = {file: found[file] for file in files if not isinstance(found[file], Photograph)}
    unmet = sorted(named.keys() - {os.path.normpath(file) for file in files})
    if set(skipped.values()) == {NO_CAPTION} and not photographs:
        met = ""
        if unmet:
            met = f", and no picture for any of the {len(unmet)} names in {METADATA}, such as " \
                  f"{os.path.relpath(unmet[0], folder)}"
        raise UserError(f"{flag} {folder}: no caption for any of its {len(files)} pictures{met}; write one "
                        f'beside each (fox.txt for fox.jpg), or a {METADATA} with "file_name" and "text"')
    if not photographs:
        file, why = next(iter(skipped.items()))
        raise UserError(f"{flag} {folder}: none of its {len(files)} pictures can be trained on, such as "
                        f"{file.relative_to(folder)}: {why}")
    for name in unmet:
        skipped[name] = f"named in {METADATA}, and there is no such picture"
    tell(skipped | others, folder, world, flag)
    return photographs


def tell(skipped, folder, world, flag):
    """Print which pictures are skipped, {file: why}: the first MOST_TOLD in a line each, then how many more."""
    for file, why in list(skipped.items())[:MOST_TOLD]:
        world.say(f"{flag}: {os.path.relpath(file, folder)} is skipped: {why}")
    if len(skipped) > MOST_TOLD:
        world.say(f"{flag}: {len(skipped) - MOST_TOLD} more are skipped")


# -------------------------------------------------------------------------------------- a picture, and shapes
def look(file, named, shapes, unit):
    """The `Photograph` of a file; or a text, which says why it is skipped. named: captions of metadata files."""
    try:
        caption = captions.caption_of(file, named)
        width, height = pictures.size_of(file)
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
    except (Skipped, UserError) as why:
        return str(why).removeprefix(f"{file}: ")
    return Photograph(file, caption, grid)


def shapes_of(tokens):
    """The shapes that have RATIOS and about tokens x tokens tokens: a list of (rows, columns) of tokens."""
    shapes = []
    for ratio in RATIOS:
        rows = max(1, round(tokens / ratio**0.5))
        columns = max(1, round(tokens * ratio**0.5))
        shapes.append((rows, columns))
    return list(dict.fromkeys(shapes))


def in_pixels(grid, unit):
    """(rows, columns) of tokens as "WIDTHxHEIGHT" pixels."""
    rows, columns = grid
    return f"{columns * unit}x{rows * unit}"


def by_shape(photographs, unit):
    """How many photographs each shape has, in words: "20 of 64x64, 8 of 80x48"."""
    counts = Counter(in_pixels(photograph.grid, unit) for photograph in photographs)
    return ", ".join(f"{number} of {shape}" for shape, number in counts.most_common())


def nearest(ratio, shapes):
    """The shape whose ratio is nearest, on a log scale, to a ratio of width to height."""
    def distance(shape):
        rows, columns = shape
        return abs(math.log(columns / rows) - math.log(ratio))
    return min(shapes, key=distance)


def pixels(photograph, unit):
    """A photograph [1, 3, H, W] in [0, 1], resized and cropped around its centre to its shape; unit: pixels a side of
    a token. Raises UserError if it cannot be decoded: `size_of` decodes a JPEG only coarsely, and the file may have
    changed since."""
    rows, columns = photograph.grid
    size = (columns * unit, rows * unit)
    try:
        picture = ImageOps.fit(pictures.read_picture(photograph.file), size, Image.Resampling.LANCZOS)
    except UserError as error:
        raise UserError(f"{error}; remove it") from error
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

    def says(self, step):
        return {"shape": in_pixels(self.grids[step], self.unit)}

    def latents(self, rows):
        return torch.stack([self.encoded[row] for row in rows])
