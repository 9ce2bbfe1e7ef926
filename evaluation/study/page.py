"""From folders of pictures to the page that raters open, and its key."""

import base64
import json
import random
import secrets
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from engine.data.pictures import read_picture
from engine.data.prompt_files import Prompt, read_prompts_by_category
from engine.errors import UserError, printable
from engine.files import check_outputs
from engine.paths import named_path
from evaluation.picture_folders import files_of, listed
from evaluation.study.files import check_inputs, write_together
from evaluation.study.votes import DIMENSIONS, LEVELS

MARK = b'<meta name="generator" content="page of a study">'
KEY_MARK = b'{\n "study": "'  # the beginning of a key


class Method(NamedTuple):
    """A method to compare: its name, and its pictures."""
    name: str
    folder: Path
    pictures: dict  # {prompt number: file}


class Source(NamedTuple):
    """A list of prompts, and the folder or file that it was read from."""
    where: str
    prompts: list  # of `Prompt`; entry i is the prompt of picture i


class Shown(NamedTuple):
    """A picture on the page: its method's name, and its prompt's number."""
    method: str
    prompt: int


# --------------------------------------------------------------------------------------------------- reading
def read_methods(texts):
    """["NAME=FOLDER" or "FOLDER", ...] -> list of `Method`. Raises UserError for fewer than two, for a repeated name,
    and for a folder without pictures."""
    methods = []
    for text in texts:
        name, folder = named_path(text)
        if name is None:
            name = Path(folder).resolve().name
        if not name or not folder:
            raise UserError(f'"{text}": give NAME=FOLDER')
        if name in [method.name for method in methods]:
            raise UserError(f'two folders are called "{name}"; give each its own name: NAME=FOLDER')
        files = files_of(Path(folder))
        pictures = {int(number): file for number, file in files.items() if number.isdigit()}
        methods.append(Method(name, Path(folder), pictures))
    if len(methods) < 2:
        raise UserError("give at least two folders, such as base=DIR1 srpo=DIR2")
    return methods


def prompt_files(methods, given):
    """The files that may hold prompts: prompts.json of every folder, and --prompts (a file or a folder, or None)."""
    files = [method.folder / "prompts.json" for method in methods]
    if given is not None:
        files += [Path(given), *Path(given).glob("*.json")]
    return [file for file in files if not file.is_dir()]


def read_sources(methods, given):
    """A list of `Source`: every folder with a prompts.json, and --prompts. Raises UserError if there is none."""
    sources = []
    for method in methods:
        prompts = listed(method.folder)
        if prompts is not None:
            sources.append(Source(str(method.folder), prompts))
    if given is not None:
        sources.append(Source(given, read_prompts_by_category(given)))
    if not sources:
        raise UserError("no folder has a prompts.json; give --prompts FILE, one prompt a line")
    return sources


# -------------------------------------------------------------------------------------------------- choosing
def agreed(number, sources):
    """The prompt of picture `number`. Raises UserError if the sources have different prompts for it."""
    first, *others = sources
    prompt = first.prompts[number].text
    for other in others:
        theirs = other.prompts[number].text
        if theirs != prompt:
            raise UserError(f"prompt {number} differs between {first.where} and {other.where}: "
                            f"{json.dumps(prompt)[:60]}, {json.dumps(theirs)[:60]}")
    return prompt


def choose(methods, sources, per_category):
    """{number: Prompt}: the first `per_category` prompts of every category, out of those with a picture in all folders.
    Raises UserError if there is none."""
    chosen = {}
    count = Counter()
    for number in sorted(set.intersection(*(set(method.pictures) for method in methods))):
        telling = [source for source in sources if number < len(source.prompts)]
        if not telling:
            first = sources[0]
            raise UserError(f"picture {number}: {first.where} has only {len(first.prompts)} prompts")
        categories = {source.prompts[number].category for source in telling} - {""}
        if len(categories) > 1:
            raise UserError(f"prompt {number} has two categories, {' and '.join(sorted(categories))}, in two folders' "
                            "prompts.json; keep one")
        category = categories.pop() if categories else ""
        if count[category] < per_category:
            chosen[number] = Prompt(agreed(number, telling), category)
            count[category] += 1
    if not chosen:
        raise UserError("there is no prompt of which all folders have a picture")
    return chosen


def shuffled(chosen, methods):
    """{name on the page: Shown}. The names of a prompt's pictures are given to the methods at random."""
    names = [method.name for method in methods]
    draw = random.SystemRandom()
    pictures = {}
    for number in chosen:
        for place, name in enumerate(draw.sample(names, len(names)), 1):
            pictures[f"p{number}-{place}"] = Shown(name, number)
    return pictures


# --------------------------------------------------------------------------------------------------- writing
def encode(path, side, quality):
    """A picture's file -> base64 of a JPEG. It holds only pixels: a comment could name the model. Raises UserError if
    the file cannot be read."""
    picture = read_picture(path)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.info = {}
    data = BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return base64.b64encode(data.getvalue()).decode()


def page(study, chosen, pictures, methods, side, quality):
    """Yields the page's text in parts, with one picture in memory at a time."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    head, tail = template.split("<!-- the study -->")
    names = defaultdict(list)
    for name, shown in pictures.items():
        names[shown.prompt].append(name)
    prompts = [{"prompt": prompt.text, "pictures": names[number]} for number, prompt in chosen.items()]
    data = json.dumps({"study": study, "levels": LEVELS, "dimensions": DIMENSIONS, "prompts": prompts})
    data = data.replace("<", "\\u003c")  # so a prompt cannot close the <script>
    yield f'{head}<script type="application/json" id="study">{data}</script>\n'
    files = {method.name: method.pictures for method in methods}
    for name, shown in pictures.items():
        jpeg = encode(files[shown.method][shown.prompt], side, quality)
        yield f'<script type="text/plain" id="{name}">{jpeg}</script>\n'
    yield tail


def key_text(study, chosen, pictures, methods):
    """The key's text: a JSON that says which method made each picture."""
    prompts = {}
    for number, prompt in chosen.items():
        prompts[number] = {"prompt": prompt.text, "category": prompt.category}
    key = {"study": study, "methods": [method.name for method in methods], "prompts": prompts,
           "pictures": {name: shown._asdict() for name, shown in pictures.items()}}
    return json.dumps(key, indent=1) + "\n"


def summary(out, key, chosen, methods):
    """A list of lines for the user: what was written, and what to do with it."""
    lines = []
    every = set().union(*(method.pictures for method in methods))
    for method in methods:
        n = len(every) - len(method.pictures)
        if n:
            lines.append(f"{method.name} lacks {n} picture{'s' * (n > 1)} that another folder has; their prompts are "
                         "left out")
    count = Counter(prompt.category or "no category" for prompt in chosen.values())
    counted = ", ".join(f"{category}: {n}" for category, n in count.items())
    megabytes = out.stat().st_size / 1e6
    lines.append(f"{out}: {len(chosen)} prompts ({counted}), {len(methods)} pictures each, "
                 f"{megabytes:.1f} MB; give it to the raters")
    lines.append(f"{key}: says which method made each picture; do not give it to the raters, tally needs it")
    if megabytes > 200:
        lines.append("a page of more than 200 MB opens slowly; give fewer prompts (--per-category) or smaller pictures "
                     "(--side)")
    return lines


def build(args):
    """Write the page and its key from the flags' folders: both or neither. Raises UserError and OSError."""
    methods = read_methods(args.folders)
    inputs = prompt_files(methods, args.prompts)
    check_inputs(inputs)
    for method in methods:
        inputs += method.pictures.values()
    out = Path(args.out)
    if not out.name:
        raise UserError(f"--out {args.out}: a file cannot be written there")
    key = out.with_suffix(".key.json")
    check_outputs([(out, MARK, "a study's page"), (key, KEY_MARK, "a study's key")], inputs, args.overwrite,
                  ", and raters may be at work on it")
    chosen = choose(methods, read_sources(methods, args.prompts), args.per_category)
    study = secrets.token_hex(6)
    pictures = shuffled(chosen, methods)
    write_together({out: page(study, chosen, pictures, methods, args.side, args.quality),
                    key: key_text(study, chosen, pictures, methods)})
    for line in summary(out, key, chosen, methods):
        print(printable(line))
