"""Folders of small pictures, a study made of them, and votes about it, for the tests."""

import json
import re

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation.study import __main__ as study
from evaluation.study import votes

NASTY = ['<script>alert(1)</script>', '</script><img src=x onerror=alert(1)>',
         '"quotes" \'and\' `ticks` ${1}',
         'Füchse 狐 🦊\u2028&amp; <!-- the study -->']
E, G, P, F = votes.LEVELS


def folder(path, numbers, prompts=None, size=(48, 32), ending="png"):
    """A folder of small pictures with these numbers, and prompts.json."""
    path.mkdir(parents=True)
    for i in numbers:
        note = PngInfo()
        note.add_text("comment", f"made by {path.name}")
        picture = Image.new("RGB", size, (37 * i % 256, 90, len(path.name) * 20 % 256))
        picture.save(path / f"{i:05d}.{ending}", **({"pnginfo": note} if ending == "png" else {}))
    if prompts:
        (path / "prompts.json").write_text(json.dumps(prompts))
    return path


def prompts(n, categories=("",)):
    return [{"prompt": f"prompt {i}", "category": categories[i % len(categories)]} for i in range(n)]


def run(*argv):
    study.main([str(word) for word in argv])


def made(tmp_path, texts=None, n=4, **more):
    """A study of two methods, zebra and okapi: (page, key, text of the page)."""
    entries = [{"prompt": t, "category": ""} for t in texts] if texts else prompts(n)
    for name in ("zebra", "okapi"):
        folder(tmp_path / name, range(len(entries)), entries, **more)
    out = tmp_path / "study.html"
    run(tmp_path / "zebra", f"okapi={tmp_path / 'okapi'}", "--out", out)
    return out, json.loads((tmp_path / "study.key.json").read_text()), out.read_text(encoding="utf-8")


def page_data(text):
    return json.loads(re.search(r'<script type="application/json" id="study">(.*)</script>', text)[1])


def one_line(capsys, *argv, status=2):
    """What a command that must fail says: one line, in which nothing can move the cursor."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == status and len(said) == 1 and said[0].startswith("study: "), said
    assert said[0].isprintable()
    return said[0]


# ----------------------------------------------------------------------------------------------------- votes
KEY = {"study": "s", "methods": ["base", "<b>|x"], "prompts": {"0": {"prompt": "a", "category": "photo"},
                                                              "1": {"prompt": "b", "category": "anime"}},
       "pictures": {"p0-1": {"method": "base", "prompt": 0}, "p0-2": {"method": "<b>|x", "prompt": 0},
                    "p1-1": {"method": "<b>|x", "prompt": 1}, "p1-2": {"method": "base", "prompt": 1}}}


def cells(realism, aesthetics=None, detail=None, alignment=None):
    """One picture's ratings: {dimension: level}, those that are given."""
    levels = {"realism": realism, "aesthetics": aesthetics, "detail": detail, "alignment": alignment}
    return {dimension: level for dimension, level in levels.items() if level}


VOTES = {"ann": {"p0-1": cells(G, G, P, E), "p0-2": cells(E, E, E, E), "p1-1": cells(E, G, E, P),
                 "p1-2": cells(F, P, P, P)},
         "bob": {"p0-1": cells(G, P, P, E), "p0-2": cells(E, E, G, E), "p1-1": cells(P, G)}}


def sent(tmp_path, votes=VOTES, key=KEY):
    """The files of a study's votes and its key, as arguments of tally."""
    (tmp_path / "k.key.json").write_text(json.dumps(key))
    for name, cast in votes.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"study": "s", "annotator": name, "votes": cast}))
    return [*(str(tmp_path / f"{name}.json") for name in votes), "--key", str(tmp_path / "k.key.json")]
