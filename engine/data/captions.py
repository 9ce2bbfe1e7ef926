"""The pictures of a folder and their captions: in a .txt or .caption beside each, or in a metadata file."""

import mimetypes
import os
from pathlib import Path

from engine.data import prompt_files, text_files
from engine.errors import UserError

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic",
            ".heif")
METADATA = "metadata.jsonl"
ALL_METADATA = (METADATA, "metadata.json", "metadata.csv")
BESIDE = (".txt", ".caption")


class Skipped(Exception):
    """Why a picture cannot be trained on."""


def files_in(folder, flag):
    """(the pictures, {path: why it is not read} of others) in a folder and its subfolders: files whose names end as in
    PICTURES; linked folders, pictures in other formats, and captions without a picture. Hidden ones are left out.
    Raises UserError for a folder that cannot be read."""
    def refuse(error):
        raise UserError(f"{flag} {error.filename}: cannot be read: {error.strerror}") from error

    found = []
    others = {}
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in [Path(place, name) for name in folders]:
            if path.is_symlink():
                others[path] = "a link to a folder, which is not followed; give that folder, or copy it"
        files = [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        pictures_here = [path for path in files if path.suffix.lower() in PICTURES]
        captions = {path.with_suffix(suffix) for path in pictures_here for suffix in BESIDE}
        for path in files:
            kind = mimetypes.guess_type(path.name)[0] or ""
            if path.suffix.lower() in BESIDE and path not in captions:
                others[path] = "a caption, and there is no picture of this name"
            elif kind.startswith("image/") and path not in pictures_here:
                others[path] = "a picture in another format; save it as .jpg or .png"
        found += pictures_here
    return sorted(found), others


def captions_of_metadata(folder, flag):
    """{path: caption} of all pictures that the files of ALL_METADATA in a folder name, in the format of Hugging Face's
    imagefolder: a line of .jsonl, an item of the list in .json, or a row of .csv has a "file_name", relative to the
    file, and one of `text_files.KEYS`. Raises UserError, also for two captions of one picture."""
    captions = {}
    readers = {".jsonl": text_files.lines_of_jsonl, ".json": text_files.items_of_json,
               ".csv": text_files.lines_of_table}
    for file in sorted(file for name in ALL_METADATA for file in folder.rglob(name)):
        where = "item" if file.suffix == ".json" else "line"
        for number, line in readers[file.suffix](file, flag):
            if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
                raise UserError(f'{flag} {file}: {where} {number} must be an object with a "file_name" and a '
                                '"text"; fix it or remove it')
            name = line["file_name"]
            if not (file.parent / name).exists():
                name = name.replace("\\", "/")  # as Windows writes it
            path = os.path.normpath(file.parent / name)
            caption = text_files.prompt_in(line)
            if captions.setdefault(path, caption) != caption:
                raise UserError(f"{flag} {file}: {where} {number} is another caption of {line['file_name']}; keep one")
    return captions


NO_CAPTION = f"no caption, in a .txt or .caption beside it or in {METADATA}"


def caption_of(file, captions):
    """The caption of a picture: from the .txt or .caption beside it if there is one, otherwise from `captions`, the
    result of `captions_of_metadata`. Raises Skipped."""
    try:
        texts = [text_files.text_of(file.with_suffix(suffix), "its caption") for suffix in BESIDE
                 if file.with_suffix(suffix).exists()]
        texts = {" ".join(text.split()) for text in texts or [captions.get(os.path.normpath(file)) or ""]}
        if len(texts) > 1:
            raise Skipped(f"two captions, in the {' and the '.join(BESIDE)} beside it, differ; keep one")
        caption = texts.pop()
        prompt_files.check_prompts([caption], "its caption")
    except UserError as error:
        raise Skipped(str(error)) from error
    if text_files.is_blank(caption):
        raise Skipped(NO_CAPTION)
    return caption


def must_have_one_caption_each(files, flag):
    """Raise UserError if one caption file stands beside two pictures, such as a.txt beside a.jpg and a.png."""
    pictures_of = {}
    for file in files:
        for suffix in BESIDE:
            first = pictures_of.setdefault(file.with_suffix(suffix), file)
            if first != file and file.with_suffix(suffix).exists():
                raise UserError(f"{flag} {file.with_suffix(suffix)}: beside both {first.name} and {file.name}; rename "
                                "one, or remove it")
