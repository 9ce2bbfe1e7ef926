"""Sheets: pictures side by side with their labels. A line of pictures for each model, a column for each prompt."""

from collections import defaultdict
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from engine.data.pictures import read_picture
from engine.errors import UserError, printable
from evaluation.picture_folders import write_png

COLUMNS = 8      # pictures of a line, at most
SHOWN = 24       # prompts of a contact sheet
LEAST = 128      # pixels: smaller pictures are enlarged to about this width
MOST_LINES = 4   # of a prompt
GAP = 4          # pixels between pictures


class Column(NamedTuple):
    """The pictures of one prompt, PIL or None, one for each line of the sheet; and the label above them."""
    label: str
    pictures: list


def label_of(prompt, seed):
    """The label of a prompt's pictures."""
    return f"{printable(prompt)}\nnoise seed {seed}"


def enlarged(picture):
    """A picture, a whole number of times as large if it is small."""
    times = max(1, LEAST // picture.width)
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def wrapped(text, font, width):
    """A text as lines of `width` pixels at most. Its first line becomes MOST_LINES at most; its other lines are cut."""
    first, *others = text.split("\n")
    lines = [""]
    for word in first.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1:] = [cut(lines[MOST_LINES - 1], font, width, " ...")]
    return [cut(line, font, width) for line in lines + others]


def cut(line, font, width, end=""):
    """As much of a line as fits into `width` pixels together with `end`."""
    while line and font.getlength(line + end) > width:
        line = line[:-1]
    return line + end


def drawn(names, columns):
    """A sheet as a PIL picture. names: of the lines; [""] for a single line that needs none. columns: `Column`s, in
    blocks of COLUMNS."""
    columns = [Column(label, [picture and enlarged(picture) for picture in pictures]) for label, pictures in columns]
    there = [picture for column in columns for picture in column.pictures if picture]
    width = max(picture.width for picture in there)
    height = max(picture.height for picture in there)
    font = ImageFont.load_default(max(11, width // 26))
    line = font.getbbox("Ag")[3] + 3
    names = [wrapped(printable(name), font, 1.2 * width) if name else [] for name in names]
    beside = max((int(font.getlength(part)) + 3 * GAP for name in names for part in name), default=0)
    across = min(COLUMNS, len(columns))
    blocks = [columns[i:i + across] for i in range(0, len(columns), across)]
    labels = [[wrapped(column.label, font, width) for column in block] for block in blocks]
    above = [line * max(map(len, block)) + 2 * GAP for block in labels]
    high = [top + len(names) * (height + GAP) + 2 * GAP for top in above]
    sheet = Image.new("RGB", (beside + across * (width + GAP) + GAP, sum(high)), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for block, told, room, tall in zip(blocks, labels, above, high, strict=True):
        for row, name in enumerate(names):
            y = top + room + row * (height + GAP)
            for i, part in enumerate(name):
                pen.text((GAP, y + height // 2 + line * (i - len(name) / 2)), part, "black", font)
        for i, (column, label) in enumerate(zip(block, told, strict=True)):
            x = beside + GAP + i * (width + GAP)
            for j, part in enumerate(label):
                pen.text((x, top + room - GAP - line * (len(label) - j)), part, "black", font)
            for row, picture in enumerate(column.pictures):
                if picture:
                    sheet.paste(picture, (x, top + room + row * (height + GAP)))
        top += tall
    return sheet


def save(names, columns, path, mark=b""):
    """Write a sheet as a PNG, with PNG_MARK and a further `mark`. names, columns: as `drawn`."""
    write_png(drawn(names, columns), path, mark)


def contact_sheet(methods, pictures, path):
    """Write a sheet of some prompts' pictures, with a line for each of the `Method`s: SHOWN prompts in all, divided
    equally among the categories, the first picture of each."""
    groups = defaultdict(list)  # {category: the pictures that all methods have}
    first = {}
    for picture in pictures:
        first.setdefault(picture.prompt, picture)
    for picture in first.values():
        if all(method.path(picture).exists() for method in methods):
            groups[picture.category].append(picture)
    columns = []
    for group in groups.values():
        for picture in group[:-(-SHOWN // len(groups))]:
            try:
                images = [read_picture(method.path(picture)) for method in methods]
            except UserError:
                continue  # the error was reported when the picture was scored
            for image in images:
                image.thumbnail((256, 256), Image.Resampling.LANCZOS)
            columns.append(Column(label_of(picture.prompt, picture.seed), images))
    if columns:
        save([method.name for method in methods], columns, path)
