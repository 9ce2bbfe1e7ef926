"""The paper's human evaluation (4.2, and the rubric of its appendix) for anyone: two or more folders of
pictures of the same prompts become one page that raters open in a browser; the votes they send back become
a table.

    python -m evaluation.study base=samples/base srpo=samples/srpo --out study.html
    python -m evaluation.study tally votes/*.json --key study.key.json --bars bars.svg

A folder holds 00000.png, 00001.png, ... (or .jpg, .jpeg, .webp; the number is the prompt's) and prompts.json,
a list of {"prompt": ..., "category": ...} in which picture i finds its prompt at place i. The page needs no
server and no network. It names no method: which picture is whose stands in study.key.json, which stays with
the organiser. Every rater, by the name typed in, gets an order of prompts and of pictures of their own.
`python -m evaluation.study tally -h` tells the other half; a folder that is called tally is written ./tally.
"""

import argparse
import base64
import json
import random
import re
import secrets
import sys
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from evaluation.study import votes as study_votes
from evaluation.study.votes import DIMENSIONS, LEVELS, may_write, read_json, write


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every flag's default behind its help."""


class Parser(argparse.ArgumentParser):
    """A mistake in the command line is a ValueError."""

    def error(self, message):
        raise ValueError(message)


def read_folders(texts):
    """["NAME=DIR" or "DIR", ...] -> {name: {prompt number: picture's path}} and {name: DIR}."""
    found, folders = {}, {}
    for text in texts:
        name, sign, folder = text.partition("=")
        if not sign or "/" in name:
            name, folder = Path(text).resolve().name, text
        if not name or not folder:
            raise ValueError(f'"{text}": give NAME=FOLDER')
        if name in found:
            raise ValueError(f'two folders are called "{name}"; give each its own name: NAME=FOLDER')
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder")
        found[name], folders[name] = {}, Path(folder)
        for path in sorted(Path(folder).iterdir()):
            number = re.fullmatch(r"([0-9]+)\.(png|jpg|jpeg|webp)", path.name, re.IGNORECASE)
            if number and found[name].setdefault(int(number[1]), path) != path:
                raise ValueError(f"{path}: a second picture of prompt {int(number[1])}")
        if not found[name]:
            raise ValueError(f"{folder}: no pictures 00000.png, 00001.png, ... (or .jpg, .jpeg, .webp) in it")
    if len(found) < 2:
        raise ValueError("give at least two folders, such as base=DIR1 srpo=DIR2")
    return found, folders


def read_prompts(folders, prompts_file):
    """[(where from, [{"prompt", "category"}, ...]), ...]: prompts.json of every folder that has one, and the
    lines of --prompts."""
    sources = []
    for path in (folder / "prompts.json" for folder in folders.values()):
        if path.exists():
            entries = read_json(path)
            if not isinstance(entries, list) or not all(
                    isinstance(e, dict) and isinstance(e.get("prompt"), str)
                    and isinstance(e.get("category", ""), str) for e in entries):
                raise ValueError(f'{path}: must be a list of {{"prompt": ..., "category": ...}}')
            sources.append((path.parent, [{"category": "", **e} for e in entries]))
    if prompts_file:
        try:
            text = Path(prompts_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {prompts_file}: cannot be read as UTF-8 text") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        sources.append((prompts_file, [{"prompt": line, "category": ""} for line in lines]))
    if not sources:
        raise ValueError("no folder has a prompts.json; give --prompts FILE, one prompt a line")
    return sources


def choose(found, sources, per_category):
    """The first prompts of every category of which all folders have a picture: {number: {"prompt",
    "category"}}, and {name: pictures it lacks of prompts that another folder has}."""
    numbers = set().union(*found.values())
    lacks = {name: len(numbers - set(pictures)) for name, pictures in found.items()}
    chosen, count = {}, Counter()
    for i in sorted(numbers.intersection(*found.values())):
        said = [(where, entries[i]) for where, entries in sources if i < len(entries)]
        if not said:
            raise ValueError(f"picture {i}: {sources[0][0]} has only {len(sources[0][1])} prompts")
        category = next((entry["category"] for _, entry in said if entry["category"]), "")
        if count[category] == per_category:
            continue
        where, first = said[0]
        for other, entry in said[1:]:
            if entry["prompt"] != first["prompt"]:
                raise ValueError(f"prompt {i} differs between {where} and {other}: "
                                 f"{json.dumps(first['prompt'])[:60]}, {json.dumps(entry['prompt'])[:60]}")
        chosen[i] = {"prompt": first["prompt"], "category": category}
        count[category] += 1
    if not chosen:
        raise ValueError("there is no prompt of which all folders have a picture")
    return chosen, lacks


def encode(path, side, quality):
    """A picture's file -> base64 of a JPEG, nothing but pixels in it (no comment that names a model)."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = (str(error) or type(error).__name__).splitlines()[0].split(" '")[0]
        raise ValueError(f"{path}: cannot be read as a picture: {what}") from error
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.info, data = {}, BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return base64.b64encode(data.getvalue()).decode()


def page(study, chosen, found, pictures, side, quality):
    """The parts of the page's text, one picture in memory at a time."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    head, tail = template.split("<!-- the study -->")
    ids = defaultdict(list)
    for name, of in pictures.items():
        ids[of["prompt"]].append(name)
    data = json.dumps({"study": study, "levels": LEVELS, "dimensions": DIMENSIONS, "prompts": [
        {"prompt": entry["prompt"], "pictures": ids[i]} for i, entry in chosen.items()]})
    yield head + '<script type="application/json" id="study">' + data.replace("<", "\\u003c") + "</script>\n"
    for name, of in pictures.items():
        jpeg = encode(found[of["method"]][of["prompt"]], side, quality)
        yield f'<script type="text/plain" id="{name}">{jpeg}</script>\n'
    yield tail


def build(args):
    """Folders to the page and its key."""
    for flag, low, high in (("side", 64, 8192), ("quality", 1, 95), ("per_category", 1, 10**9)):
        if not low <= getattr(args, flag) <= high:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: "
                             f"must be between {low} and {high}")
    out, key = Path(args.out), Path(args.out).with_suffix(".key.json")
    found, folders = read_folders(args.folders)
    chosen, lacks = choose(found, read_prompts(folders, args.prompts), args.per_category)
    for path in (out, key):
        may_write(path, args.overwrite, ", and raters may be at work on it")
    study, pictures = secrets.token_hex(6), {}
    for i in chosen:  # which number a method has is drawn anew for every prompt
        for n, method in enumerate(random.SystemRandom().sample(list(found), len(found)), 1):
            pictures[f"p{i}-{n}"] = {"method": method, "prompt": i}
    write(out, page(study, chosen, found, pictures, args.side, args.quality))
    write(key, [json.dumps({"study": study, "methods": list(found), "prompts": chosen, "pictures": pictures},
                           indent=1) + "\n"])
    for name, n in lacks.items():
        if n:
            print(f"{name} lacks {n} picture{'s' * (n > 1)} that another folder has; left out")
    count = Counter(entry["category"] or "no category" for entry in chosen.values())
    size = out.stat().st_size / 1e6
    print(f"{out}: {len(chosen)} prompts ({', '.join(f'{c}: {n}' for c, n in count.items())}), "
          f"{len(found)} pictures each, {size:.1f} MB; give it to the raters")
    print(f"{key}: which picture is whose; keep it from them, tally needs it")
    if size > 200:
        print("more than 200 MB is slow to open; fewer prompts (--per-category) or smaller pictures (--side) "
              "make it less")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["tally"]:
            parser = Parser(prog="study.py tally", description=study_votes.__doc__, formatter_class=Help)
            add, do = parser.add_argument, study_votes.tally
            argv = argv[1:]
            add("votes", nargs="+", help="files that raters saved from the page")
            add("--key", required=True, help="the study's key, written beside the page")
            add("--bars", help="SVG file for the shares of the four levels (None: not written)")
            add("--json", help="JSON file for all numbers (None: not written)")
            add("--overwrite", action="store_true", help="replace these files if they exist")
        else:
            parser = Parser(prog="study.py", description=__doc__, formatter_class=Help)
            add, do = parser.add_argument, build
            add("folders", nargs="*", metavar="NAME=FOLDER",
                help="pictures of one method; without NAME= it is called by the folder's last part")
            add("--out", default="study.html", help="the page; its key goes beside it (.key.json)")
            add("--prompts", help="text file, one prompt a line, for folders without prompts.json "
                "(None: all from prompts.json)")
            add("--per-category", type=int, default=125, help="how many prompts of each category: "
                "the first that all folders have a picture of [paper 4.2]")
            add("--side", type=int, default=768, help="longest side of a picture, pixels [ours]")
            add("--quality", type=int, default=85, help="of the JPEGs, 1 to 95 [ours]")
            add("--overwrite", action="store_true",
                help="replace the page and its key; votes from the old page are lost")
        do(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
