"""Folders of pictures named by their prompt's number, 00012.png, with prompts.json beside them: what
sample.py and evaluate.py write, what evaluate.py scores, its own or others', and what study.py shows.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

import flux
from rewards.pictures import fitted, pixels, read_picture, save_grid
from engine.files import stamp

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class Picture:
    """One picture to be: its name (its prompt's number), prompt, noise seed and category; for GenEval's also
    its line of their metadata."""
    name: str
    prompt: str
    seed: int
    category: str
    entry: dict = None


@dataclass
class Method:
    """A row of the table: its name, the folder of its pictures, its weights (None: the model's own), and of
    pictures that exist {name: file}."""
    name: str
    folder: Path
    weights: str = None
    files: dict = field(default_factory=dict)

    def path(self, picture):
        """The file of a picture, which need not be there yet."""
        return self.files.get(picture.name, self.folder / f"{picture.name}.png")


def first_of_each(categories, n):
    """The numbers of the first n of each category, or of all (None)."""
    return [i for i, c in enumerate(categories) if n is None or categories[:i].count(c) < n]


def benchmark(prompts, seed, n):
    """The pictures of [(prompt, category)], the first n of each category, or all (None). Picture i is made
    from noise seed + i, whatever n is."""
    return [Picture(f"{i:05d}", prompts[i][0], seed + i, prompts[i][1])
            for i in first_of_each([category for _, category in prompts], n)]


def geneval_pictures(entries, seed, n, each):
    """GenEval's: `each` pictures of each of its prompts, whose categories are its six tasks; the first n
    prompts of each task, or all (None)."""
    chosen = [(i, entries[i]) for i in first_of_each([entry["tag"] for entry in entries], n)]
    return [Picture(f"geneval/{i:05d}_{k}", entry["prompt"], seed + each * i + k, entry["tag"], entry)
            for i, entry in chosen for k in range(each)]


def named(flag, items):
    """["NAME=PATH" or "PATH"] -> {name: path}; a path without a name is its own name."""
    pairs = [(item, "", "") if "/" in item.partition("=")[0] else item.partition("=") for item in items]
    found = {name: path or name for name, _, path in pairs}
    folders = [folder_name(name) for name in found] + (["base", "scores"] if flag == "--weights" else [])
    if len(found) < len(items) or len(set(folders)) < len(folders):
        raise ValueError(f"{flag} {' '.join(items)}: a name is used twice, or taken (base is the model's own "
                         "weights); give NAME=PATH")
    return found


def folder_name(name):
    """A row's name as the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._")


def listed(folder):
    """[(prompt, category)] of a folder's prompts.json, by the pictures' numbers; None if it has none."""
    path = Path(folder) / "prompts.json"
    if not path.exists():
        return None
    try:
        entries = [(e["prompt"], e.get("category", "")) for e in json.loads(path.read_text("utf-8"))]
        if not all(isinstance(word, str) for entry in entries for word in entry):
            raise TypeError
        return entries
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{path}: not a list of {{"prompt": ..., "category": ...}}') from error


def planned(args, prompts):
    """The rows to sample: the base and each --weights, in folders of --out that say what they hold. Raises
    ValueError if one holds pictures made otherwise."""
    methods = [Method("base", Path(args.out) / "base")]
    for name, path in named("--weights", args.weights).items():
        flux.transformer_folder(args.model, path)
        methods.append(Method(name, Path(args.out) / folder_name(name), path))
    for method in methods:
        made = {k: getattr(args, k) for k in ("model", "size", "eval_steps", "guidance", "seed")}
        made |= {"weights": stamp(method.weights) if method.weights else [],
                 "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}
        stored = method.folder / "made.json"
        then = json.loads(stored.read_text()) if stored.exists() else made
        for k in made:
            if made[k] != then.get(k):
                what = "" if k in ("weights", "prompts") else f" {then.get(k)}, now {made[k]}"
                raise ValueError(f"--out {args.out}: the pictures in {method.folder} were made with other "
                                 f"{k}{what}; delete that folder, or give another --out")
        method.folder.mkdir(parents=True, exist_ok=True)
        write_json(method.folder / "prompts.json", [{"prompt": p, "category": c} for p, c in prompts])
        write_json(stored, made)
    return methods


def existing(args):
    """(rows, prompts [(prompt, category)]) of --images; the prompts are the folders' own prompts.json, or
    --prompts. Raises ValueError for a folder without pictures, or folders whose prompts differ."""
    methods = [Method(name, Path(path)) for name, path in named("--images", args.images).items()]
    own = {m.folder: listed(m.folder) for m in methods}
    known = {folder: prompts for folder, prompts in own.items() if prompts is not None}
    prompts = next(iter(known.values())) if known else flux.read_prompts_by_category(args.eval_prompts)
    for folder, theirs in known.items():
        if theirs != prompts:
            i = next((i for i, (a, b) in enumerate(zip(theirs, prompts)) if a != b),
                     min(len(theirs), len(prompts)))
            raise ValueError(f"--images: the prompts of {folder} and {next(iter(known))} differ, first at "
                             f"number {i}")
    for method in methods:
        method.files = files_of(method.folder)
        last = max(int(name) for name in method.files if name.isdigit())
        if last >= len(prompts):
            raise ValueError(f"--images {method.folder}: picture {last}, but there are {len(prompts)} "
                             "prompts; give theirs: --prompts FILE")
    return methods, prompts


def files_of(folder):
    """{name: file} of a folder's pictures: 12.png or 00012.JPG is "00012"; GenEval's are in geneval/. Raises
    ValueError if there are none, or two of one name."""
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder")
    found = {}
    for file in sorted([*folder.iterdir(), *(folder / "geneval").glob("*_?.*")]):
        if file.suffix.lower() in SUFFIXES and (file.stem.isdigit() or file.parent != folder):
            name = f"{int(file.stem):05d}" if file.parent == folder else f"geneval/{file.stem}"
            if found.setdefault(name, file) != file:
                raise ValueError(f"--images {folder}: {found[name].name} and {file.name} are both {name}")
    if not any(name.isdigit() for name in found):
        raise ValueError(f"--images {folder}: no pictures there (00000.png and so on, named by their "
                         "prompt's number)")
    return found


def write_json(path, value):
    """Write a JSON file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
    beside.replace(path)


def contact_sheet(methods, pictures, path, rows=24):
    """Write same-seed pictures side by side, a prompt after the other, the categories in equal parts."""
    common = [p for p in pictures if all(m.path(p).exists() for m in methods)]
    each = -(-rows // len(dict.fromkeys(p.category for p in common)) or 1) if common else 0
    chosen = [p for c in dict.fromkeys(p.category for p in common)
              for p in [q for q in common if q.category == c][:each]]
    images = []
    for p in chosen:
        try:
            images += [pixels(fitted(read_picture(m.path(p)), 256, "letterbox")) for m in methods]
        except ValueError:
            pass  # named where it was scored
    if images:
        save_grid(torch.stack(images[:len(images) // len(methods) * len(methods)]), path,
                  columns=len(methods) * max(1, 8 // len(methods)))
