"""The one reader of picture files, for training, scores, the study and the report.

A picture is read as a viewer shows it, or refused by name.
"""

import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from engine.errors import UserError, one_line

# PIL reads many more, and starts Ghostscript for an EPS, whatever a file's name ends in. HEIF needs a plugin.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
ORIENTATION = 0x0112        # the EXIF tag
TURNED = (5, 6, 7, 8)       # its values that swap width and height
NO_WHITE = ("I", "F")       # PIL's modes of 32-bit numbers, for which no file says how much is white


@contextmanager
def opened(file):
    """A picture file, opened by PIL; what is decoded inside is checked too. Raises UserError for what is no picture in
    one of FORMATS, is damaged, has more than about 179 million pixels, or has pixels without a known white."""
    if not Path(file).is_file():  # reading from a pipe would wait forever
        raise UserError(f"{file}: not a file")
    Image.init()
    try:
        known = [name for name in FORMATS if name in Image.OPEN]
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=known) as picture:
            if picture.mode in NO_WHITE:
                raise ValueError("its pixels are 32-bit numbers, for which no white is known; save it with 8 or 16 "
                                 "bits")
            yield picture
    except Exception as error:  # a decoder may raise anything for a damaged file
        # PIL's message ends with the file's name in quotes; it is cut off
        why = getattr(error, "strerror", None) or one_line(error).split(" '")[0]
        raise UserError(f"{file}: cannot be read as a picture: {why}") from error


def read_picture(file):
    """A file's picture as PIL RGB: rotated as EXIF says, transparent pixels white, 16-bit greys as 8-bit. Raises
    UserError as `opened`."""
    with opened(file) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def size_of(file):
    """(width, height) of a picture in pixels, after the rotation that EXIF asks for. The whole file is decoded, a JPEG
    at an eighth of its size, so that a truncated file is found now. Raises UserError as `opened`."""
    with opened(file) as picture:
        width, height = picture.size
        picture.draft("RGB", (width // 8, height // 8))
        picture.load()
        turned = picture.getexif().get(ORIENTATION) in TURNED  # PIL turns a TIFF itself when it loads it
    return (height, width) if turned else (width, height)
