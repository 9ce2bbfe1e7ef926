"""From pictures to scores, for evaluate.py. Scores are kept on disk, one line for each picture. So an evaluation that
was stopped continues, and scores nothing twice."""

import gc
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

from engine.errors import UserError, one_line
from engine.files import append, stamp
from evaluation import picture_folders

SCORED_AT_ONCE = 16  # pictures


@dataclass
class Task:
    """A metric, its files, and the pictures that it scores."""
    name: str
    metric: object  # has the names that the docstring of evaluation/metrics/__init__.py lists
    files: object
    pictures: list


@dataclass
class Outcome:
    """The results of scoring."""
    scores: dict                                    # {row: {picture's name: {column: value}}}
    missing: dict                                   # {metric: why it has no scores}
    unreadable: list = field(default_factory=list)  # what is wrong with pictures, a line each

    def add(self, row, found):
        """Add the scores {picture's name: {column: value}} of a row."""
        for picture, values in found.items():
            self.scores[row].setdefault(picture, {}).update(values)


# ------------------------------------------------------------------------------------------------------ scoring
def share(pictures, size, world):
    """This process's chunks of a list, of `size` pictures each. The chunks do not depend on the number of processes. So
    a picture is always in the same batch, and always the same."""
    chunks = [pictures[i:i + size] for i in range(0, len(pictures), size)]
    return chunks[world.rank::world.size]


def score(args, task, methods, world, outcome):
    """One metric, all rows, into the outcome. The scorer is loaded if it is needed."""
    load = cache(partial(task.metric.load, task.files, args, world.device))
    settings = settings_of(task.name, task.files, args)
    picture_folders.make_own(args.out)
    try:
        for method in methods:
            folder = Path(args.out) / "scores" / picture_folders.folder_name(method.name)
            kept = Scores(folder, task.name, task.metric.COLUMNS, settings, world.rank)
            outcome.add(method.name, score_row(task, method, kept, load, world, outcome.unreadable))
    except UserError as error:
        outcome.missing[task.name] = reason(task.name, error)
    del load
    free()


@torch.no_grad()
def score_row(task, method, kept, load, world, unreadable):
    """One metric of one row. Chunks with a picture that has no score are scored, and their scores written at once.
    Returns {picture's name: {column: value}}. For a picture that cannot be read, a text is added to `unreadable`."""
    scores = {}
    chunks = share(task.pictures, SCORED_AT_ONCE, world)
    for chunk in tqdm(chunks, f"{task.name} {method.name}", leave=False, disable=not world.main):
        keys = kept.keys(method, chunk, unreadable)
        chunk = [p for p in chunk if p.name in keys]
        if any(keys[p.name] not in kept.known for p in chunk):
            images = method.read(chunk, unreadable)
            chunk = [p for p in chunk if p.name in images]
            if chunk:
                scorer = load()
                prompts = [p.prompt if p.entry is None else p.entry for p in chunk]
                kept.add(chunk, keys, scorer([images[p.name] for p in chunk], prompts))
        scores |= {p.name: kept.known[keys[p.name]] for p in chunk}
    return scores


def merged(outcomes):
    """The outcomes of all processes as one."""
    first, *others = outcomes
    for other in others:
        first.unreadable += other.unreadable
        first.missing |= other.missing
        for row, found in other.scores.items():
            first.add(row, found)
    first.unreadable = sorted(set(first.unreadable))
    return first


def reason(name, error):
    """Why a metric cannot be had, without the metric's name and the advice, which are printed beside it."""
    return one_line(error).removeprefix(f"{name}: ").removesuffix(f"; give {name}=PATH")


def free():
    """Give back the memory of models that are no longer held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------ on disk
def settings_of(name, files, args):
    """What a metric's scores depend on, apart from a picture and its prompt: its name, --control, --neg, its files."""
    return [name, args.control, args.neg, str(files), stamp(*paths_in(files))]


def paths_in(files):
    """All paths in the return value of a metric's fetch: a path, a tuple of such values, or None."""
    if files is None:
        return []
    if isinstance(files, tuple):
        return [path for part in files for path in paths_in(part)]
    return [files]


class Scores:
    """The scores that one metric gave to the pictures of one row.

    Each process writes its own file, NAME.RANK.jsonl, and reads all of them. A score's key is a hash of all that the
    score depends on. So a score is valid no matter which process wrote it, or when.
    """

    def __init__(self, folder, name, columns, settings, rank):
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.columns = columns
        self.known = {}  # {key: {column: value}}
        for file in folder.glob(f"{name}.*.jsonl"):
            for line in file.read_bytes().split(b"\n"):
                self.read(line)
        self.path = folder / f"{name}.{rank}.jsonl"
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            append(self.path, "\n")  # a killed process left its last line unfinished

    def read(self, line):
        """Remember the score in a line. A damaged line is skipped, so its picture is scored again."""
        try:
            entry = json.loads(line)
            self.known[entry["key"]] = {column: float(entry["scores"][column]) for column in self.columns}
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            pass

    def key(self, picture, file):
        """A hash of all that a picture's score depends on: the file's bytes, the prompt and the settings. Raises
        OSError."""
        words = json.dumps([picture.prompt, picture.entry, *self.settings]).encode()
        return hashlib.sha256(file.read_bytes() + words).hexdigest()[:24]

    def keys(self, method, pictures, unreadable):
        """{picture's name: key} of the pictures that exist. For a file that cannot be read, a text is added to
        `unreadable`."""
        keys = {}
        for picture in pictures:
            file = method.path(picture)
            try:
                if file.exists():
                    keys[picture.name] = self.key(picture, file)
            except OSError as error:
                unreadable.append(f"{file}: cannot be read as a picture: {error.strerror}")
        return keys

    def add(self, pictures, keys, values):
        """Keep the scores {column: [B]} of B pictures under their keys {name: key}, and write the new ones to disk."""
        lines = []
        for i, picture in enumerate(pictures):
            key = keys[picture.name]
            if key not in self.known:
                self.known[key] = {column: float(values[column][i]) for column in self.columns}
                line = {"picture": picture.name, "key": key, "scores": self.known[key]}
                lines.append(json.dumps(line) + "\n")
        append(self.path, "".join(lines))
