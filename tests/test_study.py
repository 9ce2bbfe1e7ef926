"""Claims about the study with human raters: the page is blind and safe, the numbers are right. More in
test_study_mistakes.py and test_study_browser.py."""

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ET
from io import BytesIO
from itertools import product

import pytest
from PIL import Image
from study_builders import (
    KEY,
    NASTY,
    VOTES,
    E,
    F,
    G,
    P,
    folder,
    made,
    one_line,
    page_data,
    prompts,
    run,
    sent,
)

from evaluation.study import __main__ as study
from evaluation.study import bars, statistics, votes


# -------------------------------------------------------------------------------------------------- the page
def test_the_first_prompts_of_each_category_that_all_folders_have(tmp_path, capsys):
    entries = prompts(12, ("photo", "anime"))
    folder(tmp_path / "zebra", [0, 1, 2, 3, 4, 5, 6, 7, 9], entries)
    folder(tmp_path / "okapi", [0, 1, 3, 4, 5, 6, 7, 9, 11], ending="webp")
    (tmp_path / "okapi" / "grid.png").write_bytes(b"not one of them")
    run(tmp_path / "zebra", tmp_path / "okapi", "--out", tmp_path / "s.html", "--per-category", 3)
    key = json.loads((tmp_path / "s.key.json").read_text())
    assert {int(i): e["category"] for i, e in key["prompts"].items()} == {
        0: "photo", 1: "anime", 3: "anime", 4: "photo", 5: "anime", 6: "photo"}
    assert sorted((of["prompt"], of["method"]) for of in key["pictures"].values()) == sorted(
        product([0, 1, 3, 4, 5, 6], ["zebra", "okapi"]))
    said = capsys.readouterr().out
    assert "zebra lacks 1 picture that" in said and "okapi lacks 1 picture that" in said
    assert "6 prompts (photo: 3, anime: 3), 2 pictures each" in said


def test_the_page_does_not_tell_whose_a_picture_is(tmp_path):
    """No name in it, not even in a picture's comment, and a method's number changes with the prompt."""
    _, key, text = made(tmp_path, n=30)
    jpegs = re.findall(r'<script type="text/plain" id="(p\d+-\d)">(.*)</script>', text)
    assert {name for name, _ in jpegs} == set(key["pictures"]) and len(jpegs) == 60
    for part in (text.encode(), *(base64.b64decode(data) for _, data in jpegs)):
        assert b"zebra" not in part and b"okapi" not in part
    assert len({name.split("-")[1] for name, of in key["pictures"].items() if of["method"] == "zebra"}) == 2
    assert key["methods"] == ["zebra", "okapi"]


def test_pictures_are_upright_jpegs_of_the_side_that_was_asked_for(tmp_path):
    for name in ("zebra", "okapi"):
        folder(tmp_path / name, [0], prompts(1), size=(300, 150))
    lying = Image.Exif()
    lying[0x0112] = 6  # the camera was turned by a quarter
    Image.new("RGB", (300, 150)).save(tmp_path / "okapi" / "00000.png", exif=lying)
    run(tmp_path / "zebra", tmp_path / "okapi", "--out", tmp_path / "s.html", "--side", 100)
    sizes = []
    for data in re.findall(r'id="p0-\d">(.*)</script>', (tmp_path / "s.html").read_text()):
        picture = Image.open(BytesIO(base64.b64decode(data)))
        assert picture.format == "JPEG"
        sizes.append(picture.size)
    assert sorted(sizes) == [(50, 100), (100, 50)]


def test_a_prompt_stays_data(tmp_path):
    _, _, text = made(tmp_path, NASTY)
    assert [p["prompt"] for p in page_data(text)["prompts"]] == NASTY
    assert "<script>alert" not in text and "<img src=x" not in text
    assert not re.search(r'(src|href)="?(https?:)?//', text)


def test_folders_without_prompts_take_them_from_a_file(tmp_path, capsys):
    a = folder(tmp_path / "a", [0, 1])
    b = folder(tmp_path / "b", [0, 1], ending="jpg")
    assert "give --prompts FILE" in one_line(capsys, a, b, "--out", tmp_path / "s.html")
    (tmp_path / "p.txt").write_text("a fox\n\na street\n")
    run(a, b, "--out", tmp_path / "s.html", "--prompts", tmp_path / "p.txt")
    assert [p["prompt"] for p in page_data((tmp_path / "s.html").read_text())["prompts"]] == [
        "a fox", "a street"]


def test_an_existing_study_is_replaced_only_when_asked(tmp_path, capsys):
    out, key, text = made(tmp_path)
    again = [tmp_path / "zebra", tmp_path / "okapi", "--out", out]
    said = one_line(capsys, *again)
    assert "exists already, and raters may be at work on it; --overwrite replaces it" in said
    assert out.read_text() == text
    run(*again, "--overwrite")
    assert page_data(out.read_text())["study"] != key["study"]
    assert {path.name for path in tmp_path.iterdir()} == {"okapi", "study.html", "study.key.json", "zebra"}
    out.unlink()
    assert "study.key.json exists already" in one_line(capsys, *again) and not out.exists()


def test_every_flag_tells_its_default(capsys):
    for argv in (["-h"], ["tally", "-h"]):
        with pytest.raises(SystemExit) as stop:
            study.main(argv)
        said = capsys.readouterr().out
        assert stop.value.code == 0
        for flag in re.split(r"\n  (?=--)", said.split("options:")[1])[1:]:
            assert "default" in flag or "None" in flag or flag.startswith("--key"), flag


# ------------------------------------------------------------------------------------------------- the tally
def test_the_tables_are_the_votes(tmp_path, capsys):
    run("tally", *sent(tmp_path), "--json", tmp_path / "r.json")
    r = json.loads((tmp_path / "r.json").read_text())
    said = capsys.readouterr().out
    x = r["methods"]["<b>|x"]
    assert x["realism"]["counts"] == [3, 0, 1, 0] and x["realism"]["excellent"] == 0.75
    assert x["overall"]["counts"] == [1, 2, 0, 0] and x["overall"]["n"] == 3      # bob's p1-1 is not complete
    assert r["methods"]["base"]["overall"]["counts"] == [0, 0, 2, 1]
    # two prompts: residuals 2 (1 - 0.75) and 1 + 0 - 2 * 0.75, so sqrt(2 / 1 * (0.25 + 0.25)) / 4
    assert x["realism"]["se"] == pytest.approx(0.25)
    assert r["categories"]["anime"]["<b>|x"]["realism"] == {"n": 2, "counts": [1, 0, 1, 0], "excellent": 0.5,
                                                            "se": None}
    assert r["agreement"]["aesthetics"]["pairs"] == 3 and r["agreement"]["aesthetics"]["same"] == 2 / 3
    assert r["annotators"] == {"ann": 4, "bob": 3}
    assert "|  | Real | Aesth | Overall | Detail | Alignment | n |" in said
    assert "| \\<b>\\|x | 75.0 ± 25.0 | 50.0 ± 50.0 | 33.3 ± 22.2 |" in said
    assert "| SRPO (paper) | 38.9 | 40.5 | 29.4 |" in said and "| FLUX (paper) | 8.2 | 9.8 | 5.3 |" in said


def test_one_rating_a_prompt_has_the_binomial_standard_error():
    ratings = []
    for i in range(40):
        ratings.append(votes.Rating("a", f"p{i}-1", "m", i, "", "realism", 0 if i < 12 else 2))
    assert statistics.rate(ratings).se == pytest.approx((0.3 * 0.7 / 39) ** 0.5)


def test_alpha_is_krippendorffs():
    """The worked example of "Computing Krippendorff's Alpha-Reliability" (2011), section E: 0.815."""
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[int(row[i]) for row in rows if row[i] != "."] for i in range(12)]
    assert statistics.alpha(units) == pytest.approx(0.815, abs=5e-4)
    assert statistics.alpha([[0, 0], [3, 3], [1, 1, 1]]) == 1
    assert statistics.alpha([[0, 0], [0, 0]]) is None and statistics.alpha([[1], [2]]) is None


@pytest.mark.parametrize("levels, verdict", [
    ("0000", E), ("0001", G), ("0022", G), ("0012", G), ("0111", P), ("1111", P), ("2222", P), ("0003", F),
    ("3333", F)])
def test_overall_follows_from_the_four(levels, verdict):
    assert votes.LEVELS[votes.overall([int(c) for c in levels])] == verdict


def test_bars_are_a_picture_of_the_four_levels(tmp_path):
    run("tally", *sent(tmp_path), "--bars", tmp_path / "b.svg")
    svg = ET.parse(tmp_path / "b.svg").getroot()
    rows = {}
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
        if len(rect):
            rows.setdefault(rect.get("y"), []).append((rect.get("fill"), float(rect.get("width"))))
    assert len(rows) == 5 * 2
    for row in rows.values():
        assert [c for c, _ in row] == bars.COLORS and abs(sum(w for _, w in row) - 520) < 0.5
    texts = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "<b>|x" in texts and set(votes.LEVELS) <= set(texts)


def test_the_same_votes_twice_count_once(tmp_path, capsys):
    argv = sent(tmp_path)
    shutil.copy(tmp_path / "ann.json", tmp_path / "ann (1).json")
    run("tally", tmp_path / "ann (1).json", *argv)
    assert "2 raters: ann (4 pictures), bob (3 pictures)" in capsys.readouterr().out


def test_no_name_reaches_the_terminal_or_the_svg_raw(tmp_path, capsys):
    """An escape sequence, a line break, half a surrogate pair: as a folder, category, method or rater."""
    evil = "a\x1b[2J\rb\ud800\ufffe"
    entries = [{"prompt": evil, "category": "c\x1b[31m"}]
    name = evil.replace("\ud800", "")  # a file's name is UTF-8
    for method in (name, "okapi"):
        folder(tmp_path / method, [0], entries)
    run(tmp_path / name, tmp_path / "okapi", "--out", tmp_path / f"{name}.html")
    key = json.loads(json.dumps(KEY).replace("base", json.dumps(evil)[1:-1]))
    key["prompts"]["0"]["category"] = evil
    argv = sent(tmp_path, {}, key)
    (tmp_path / "v.json").write_text(json.dumps({"study": "s", "annotator": evil, "votes": VOTES["ann"]}))
    run("tally", tmp_path / "v.json", *argv, "--bars", tmp_path / "b.svg", "--json", tmp_path / "r.json")
    said = capsys.readouterr().out
    assert said.count("\\x1b[2J") >= 5 and "c\\x1b[31m: 1" in said
    assert all(line.isprintable() for line in said.split("\n"))
    texts = [t.text for t in ET.parse(tmp_path / "b.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert any("\\x1b[2J" in words for words in texts)
    assert evil in json.loads((tmp_path / "r.json").read_text())["methods"]
