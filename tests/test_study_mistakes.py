"""Claims about mistakes with the study: each is one line and an exit status, and costs no file."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from study_builders import KEY, E, F, cells, folder, one_line, prompts, sent

from engine.files import write_whole
from evaluation.study import page


def whole(**changed):
    return {"study": "s", "annotator": "c", "votes": {"p0-1": cells(E)}} | changed


def rated(level):
    """The text of a file with one level as JSON writes it."""
    return '{"study": "s", "annotator": "c", "votes": {"p0-1": {"realism": %s}}}' % level


BAD_VOTES = {  # the text of a file, or its content; what is said about it
    "cut": ("{", "not JSON"),
    "bytes": (b"\xff\xfe", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "long": (rated("9" * 5000), "not JSON"),
    "list": ([], "not a file of votes"),
    "other": (whole(study="other"), 'votes of another study, "other"; the key is of "s"'),
    "numbered": (whole(study=1), "not a file of votes"),
    "nobody": (whole(annotator=" "), "not a file of votes"),
    "nan": (whole(annotator=float("nan")), "not a file of votes"),
    "flat": (whole(votes=[]), "not a file of votes"),
    "stranger": (whole(votes={"p9-1": {}}), 'votes for a picture that the study lacks, "p9-1"'),
    "escape": (whole(votes={"\x1b[2J" * 99: {}}), 'lacks, "\\x1b[2J'),
    "cells": (whole(votes={"p0-1": []}), "p0-1: not"),
    "superb": (whole(votes={"p0-1": {"realism": "Superb"}}), 'rated "Superb"'),
    "overall": (whole(votes={"p0-1": {"overall": E}}), '"overall" rated'),
    "levels": (whole(votes={"p0-1": {"realism": [E]}}), '"realism" rated something that is no text (list)'),
    "nested": (rated("[" * 300 + "]" * 300), "no text (list)"),
    "number": (rated("1"), "no text (int)"),
    "not_a_number": (rated("NaN"), "no text (float)"),
    "huge": (rated("1e999"), "no text (float)"),
    "again": (whole(annotator="ann", votes={"p0-1": cells(F)}), '"ann" votes differently in')}

BAD_KEYS = {
    "votes_k": whole(), "list_k": [], "study_k": KEY | {"study": 1},
    "text_k": KEY | {"methods": "ab", "pictures": {"p0-1": {"method": "a", "prompt": 0}}},
    "twice_k": KEY | {"methods": ["base", "base", "<b>|x"]}, "gone_k": KEY | {"prompts": {}},
    "nan_k": KEY | {"pictures": {"p0-1": {"method": "base", "prompt": float("nan")}}},
    "who_k": KEY | {"pictures": {"p0-1": {"method": ["base"], "prompt": 0}}},
    "category_k": KEY | {"prompts": {"0": {"category": 1}, "1": {"category": 2}}}}


class Mistake(NamedTuple):
    """A command in the folder of `place`; what its one line says; its exit status; the step of the writing at
    which the disk is full. All that was in the folder must still be there, and nothing new."""
    command: str
    words: str
    status: int = 2
    full: str = None


STUDY = "zebra okapi --out s.html"
TALLY = "tally ann.json bob.json --key k.key.json"
MISTAKES = [
    # what is shown
    Mistake("", "at least two folders"),
    Mistake("zebra", "at least two folders"),
    Mistake("zebra no", "no: no such folder"),
    Mistake("zebra no\x1b[2J", "no\\x1b[2J: no such folder"),
    Mistake("zebra empty", "empty: no pictures 00000.png"),
    Mistake("zebra zebra=okapi", 'two folders are called "zebra"'),
    Mistake("zebra =", "give NAME="),
    Mistake("zebra /", "give NAME="),
    Mistake("zebra other", "prompt 1 differs between zebra and other"),
    Mistake("zebra broken", "broken/00001.png: cannot be read as a picture"),
    Mistake("zebra cut", "cut/00001.png: cannot be read as a picture: image file is truncated"),
    Mistake("zebra exif", "exif/00001.png: cannot be read as a picture: not a TIFF file"),
    Mistake("zebra pipe", "pipe/00001.png: not a file"),
    Mistake("zebra twice", "a second picture of prompt 0"),
    Mistake("zebra apart", "no prompt of which all folders"),
    # what it is shown for
    Mistake("okapi bare", "picture 2: okapi has only 2 prompts"),
    Mistake("zebra shape", "shape/prompts.json: must be"),
    Mistake("zebra text", "text/prompts.json: not JSON"),
    Mistake("zebra waits", "waits/prompts.json: not a file"),
    Mistake("zebra okapi --prompts no.txt", "--prompts no.txt: no such file"),
    Mistake("zebra okapi --prompts pipe.json", "pipe.json: not a file"),
    Mistake("zebra okapi --prompts empty", "empty: no prompt in it"),
    Mistake("zebra okapi --prompts latin.txt", "--prompts latin.txt: not UTF-8 text"),
    # flags
    Mistake("zebra okapi --side 0", "--side 0: must be a whole number, from 64 to"),
    Mistake("zebra okapi --quality 101", "--quality 101"),
    Mistake("zebra okapi --per-category 0", "--per-category 0"),
    Mistake("zebra --no-such-flag", "unrecognized"),
    Mistake("tally ann.json", "--key"),
    # where it is written
    Mistake("zebra okapi --out no/s.html", "no/s.html: a file cannot be written there"),
    Mistake("zebra okapi --out zebra/00000.png/s.html", "cannot be written"),
    Mistake("zebra okapi --out zebra", "zebra: a file cannot be written there"),
    Mistake("zebra okapi --out .", "a file cannot be written there"),
    Mistake("zebra okapi --out pipe.json --overwrite", "pipe.json: a file cannot be written there"),
    Mistake("zebra okapi --out old.html", "old.html exists already"),
    Mistake("zebra okapi --out theirs.html --overwrite", "theirs.html exists already and is not a study's page"),
    Mistake("zebra okapi --out later.html --overwrite", "later.key.json exists already and is not a study's key"),
    Mistake("zebra okapi --out linked.html --overwrite", "linked.html: is a link, which is not followed"),
    Mistake("zebra okapi --out zebra/00000.png --overwrite", "zebra/00000.png: is read here"),
    Mistake("zebra okapi --out link.html --overwrite", "link.html: is read here"),
    Mistake("zebra okapi --out zebra/prompts.json --overwrite", "zebra/prompts.json: is read here"),
    Mistake("zebra okapi --prompts p.txt --out p.txt --overwrite", "p.txt: is read here"),
    Mistake("apart apart2 --prompts sets --out sets/photo.json --overwrite", "sets/photo.json: is read here"),
    Mistake("zebra okapi --prompts p.key.json --out p.html --overwrite", "p.key.json: is read here"),
    # both or neither
    Mistake(STUDY, "s.html and s.key.json: cannot be written: No space left on device", 1, ".s.html.new"),
    Mistake(f"zebra okapi --out {'x' * 246}", "x.key.json: cannot be written: File name too long; nothing was written"),
    Mistake(STUDY, "nothing was written", 1, ".s.key.json.new"),
    Mistake(STUDY, "nothing was written", 1, "s.html"),
    Mistake(STUDY, "nothing was written", 1, "s.key.json"),
    Mistake("zebra okapi --out old.html --overwrite", "what was there before", 1, ".old.html.old"),
    Mistake("zebra okapi --out old.html --overwrite", "what was there before", 1, ".old.key.json.old"),
    Mistake("zebra okapi --out old.html --overwrite", "what was there before", 1, "old.key.json"),
    Mistake(f"{TALLY} --bars b.svg --json r.json", "b.svg and r.json: cannot be written", 1, "r.json"),
    # votes and keys
    Mistake("tally none.json --key k.key.json --bars b.svg", "no votes"),
    *(Mistake(f"tally ann.json {name}.json --key k.key.json --bars b.svg", words)
      for name, (_, words) in BAD_VOTES.items()),
    Mistake("tally no.json --key k.key.json", "no.json: cannot be read: No such file"),
    Mistake("tally pipe.json --key k.key.json", "pipe.json: not a file"),
    Mistake("tally zebra --key k.key.json", "zebra: not a file"),
    Mistake("tally ann.json --key pipe.json", "pipe.json: not a file"),
    Mistake("tally ann.json --key no.json", "no.json: cannot be read: No such file"),
    *(Mistake(f"tally ann.json --key {name}.json", f"{name}.json: not a study's key") for name in BAD_KEYS),
    # what a tally writes
    Mistake(f"{TALLY} --bars old.html", "old.html exists already"),
    Mistake(f"{TALLY} --bars theirs.svg --overwrite", "theirs.svg exists already and is not a chart of votes"),
    Mistake(f"{TALLY} --json theirs.svg --overwrite", "theirs.svg exists already and is not a file of a tally's"),
    Mistake(f"{TALLY} --bars ann.json --overwrite", "ann.json: is read here"),
    Mistake(f"{TALLY} --json k.key.json --overwrite", "k.key.json: is read here"),
    Mistake(f"{TALLY} --json link.json --overwrite", "link.json: is read here"),
    Mistake(f"{TALLY} --bars r --json r", "r: two files would be written there"),
    Mistake(f"{TALLY} --bars r --json here/r", "here/r: two files would be written there"),
    Mistake(f"{TALLY} --bars pipe.json --overwrite", "pipe.json: a file cannot be written there"),
    Mistake(f"{TALLY} --bars no/b.svg --json r.json", "no/b.svg: a file cannot be written there"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that a mistake can be made about."""
    here = tmp_path_factory.mktemp("place")
    for name, numbers in {"zebra": [0, 1], "okapi": [0, 1, 2]}.items():
        folder(here / name, numbers, prompts(2))
    folder(here / "other", [0, 1], [{"prompt": "prompt 0"}, {"prompt": "another"}])
    for name in ("twice", "broken", "cut", "exif", "shape", "text", "pipe", "waits"):
        folder(here / name, [0, 1])
    folder(here / "empty", [])
    folder(here / "bare", [0, 2])
    for name in ("apart", "apart2"):
        folder(here / name, [7])
    (here / "sets").mkdir()
    (here / "sets/photo.json").write_text(json.dumps([f"prompt {i}" for i in range(8)]))

    (here / "broken/00001.png").write_bytes(b"no picture")
    noise = Image.frombytes("RGB", (99, 99), random.Random(0).randbytes(99 * 99 * 3))
    noise.save(here / "cut/00001.png")
    half = (here / "cut/00001.png").read_bytes()
    (here / "cut/00001.png").write_bytes(half[:len(half) // 2])
    noise.save(here / "exif/00001.png", exif=b"Exif\0\0no such thing")
    shutil.copy(here / "zebra/00000.png", here / "twice/0.png")
    (here / "shape/prompts.json").write_text('["prompt 0", "prompt 1"]')
    (here / "text/prompts.json").write_text("prompt 0")
    (here / "pipe/00001.png").unlink()
    for pipe in ("pipe.json", "pipe/00001.png", "waits/prompts.json"):
        os.mkfifo(here / pipe)

    for name in ("theirs.html", "theirs.key.json", "theirs.svg", "later.key.json"):
        (here / name).write_text("mine")
    (here / "old.html").write_bytes(page.MARK)
    (here / "later.html").write_bytes(page.MARK)
    (here / "old.key.json").write_bytes(page.KEY_MARK)
    (here / "linked.html").symlink_to("old.html")
    for name in ("p.txt", "p.key.json"):
        (here / name).write_text("prompt 0\nprompt 1\n")
    (here / "latin.txt").write_bytes(b"caf\xe9\n")
    sent(here)
    files = {name: content for name, (content, _) in BAD_VOTES.items()} | BAD_KEYS
    for name, content in files.items():
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        write_whole(here / f"{name}.json", content)
    write_whole(here / "none.json", json.dumps(whole(votes={})))
    (here / "link.html").symlink_to("zebra/00000.png")
    (here / "link.json").symlink_to("ann.json")
    (here / "here").symlink_to(".")
    return here


def contents(place):
    """{path: what is in it} of all below a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def fill(monkeypatch, name):
    """The first rename to `name` (without the process's id in it) finds the disk full."""
    rename = Path.replace
    met = []

    def replace(source, target):
        if target.name.replace(f".{os.getpid()}", "") == name and not met:
            met.append(target)
            raise OSError(28, "No space left on device", str(target))
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.command} {mistake.full or ''}")
def test_a_mistake_is_one_line_and_costs_no_file(place, monkeypatch, capsys, mistake):
    monkeypatch.chdir(place)
    before = contents(place)
    if mistake.full:
        fill(monkeypatch, mistake.full)
    assert mistake.words in one_line(capsys, *mistake.command.split(), status=mistake.status)
    assert contents(place) == before
