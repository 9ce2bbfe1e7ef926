"""A run as a film: its watched pictures at fixed seeds, from update 0 to the end, as a GIF.

    python train.py --model miniature --watch 8 --watch-every 2 --out runs/film
    python -m evaluation.film runs/film
"""

import io
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from engine.command_line import Parser, some_path
from engine.data.pictures import read_picture
from engine.errors import UserError, frame, printable
from engine.files import check_outputs, write_whole

WIDTH = 900  # pixels, at most
LABEL = 24   # height of the line above the pictures, pixels
MARK = b"SRPO film"  # the comment in a GIF that this file wrote
SECONDS = 0.4  # each frame; the last one five times as long


def frames_of(folder):
    """{update: PIL picture of the watched pictures} of a run's folder, in order. Raises UserError if there are none."""
    found = {}
    for file in sorted(Path(folder, "samples").glob("step_*.png")):
        if number := re.fullmatch(r"step_(\d+)", file.stem):
            found[int(number[1])] = read_picture(file)
    if not found:
        raise UserError(f"{folder}: no samples/step_00000.png, ... in it; give the folder of a run")
    return found


def labelled(update, picture):
    """A picture of at most WIDTH pixels with its update written above it, in 256 colours, rare ones among them."""
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (picture.width, picture.height + LABEL), "white")
    page.paste(picture, (0, LABEL))
    ImageDraw.Draw(page).text((4, 3), f"update {update}", "black", ImageFont.load_default(LABEL - 8))
    return page.quantize(256, Image.Quantize.MAXCOVERAGE)


def main(argv=None):
    with frame("film"):
        parser = Parser(__doc__)
        parser.add_argument("run", type=some_path, help="folder of a run")
        parser.add_argument("--out", type=some_path, help="the GIF (None: film.gif in the run's folder)")
        own = parser.parse_args(argv)
        out = Path(own.out or Path(own.run) / "film.gif")
        frames = frames_of(own.run)
        check_outputs([(out, MARK, "a film of a run")], [], overwrite=True)
        pages = [labelled(update, picture) for update, picture in frames.items()]
        times = [1000 * SECONDS] * (len(pages) - 1) + [5000 * SECONDS]
        gif = io.BytesIO()
        pages[0].save(gif, format="GIF", save_all=True, append_images=pages[1:], duration=times, loop=0,
                      comment=MARK)
        write_whole(out, gif.getvalue())
        print(printable(out))


if __name__ == "__main__":
    main()
