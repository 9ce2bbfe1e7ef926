"""Claims about the study with human raters: the page is blind and safe, the votes survive, the numbers are
right."""

import base64
import json
import random
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from io import BytesIO
from itertools import product

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation.study import __main__ as study
from evaluation.study import votes as sv

NASTY = ['<script>alert(1)</script>', '</script><img src=x onerror=alert(1)>',
         '"quotes" \'and\' `ticks` ${1}',
         'Füchse 狐 🦊\u2028&amp; <!-- the study -->']


def folder(path, numbers, prompts=None, size=(48, 32), ending="png", color=None):
    """A folder of small pictures with these numbers, and prompts.json."""
    path.mkdir(parents=True)
    for i in numbers:
        note = PngInfo()
        note.add_text("comment", f"made by {path.name}")
        Image.new("RGB", size, color or (37 * i % 256, 90, len(path.name) * 20)).save(
            path / f"{i:05d}.{ending}", **({"pnginfo": note} if ending == "png" else {}))
    if prompts:
        (path / "prompts.json").write_text(json.dumps(prompts))
    return path


def prompts(n, categories=("",)):
    return [{"prompt": f"prompt {i}", "category": categories[i % len(categories)]} for i in range(n)]


def made(tmp_path, texts=None, n=4, **more):
    """A study of two methods, zebra and okapi: (page, key, text of the page)."""
    entries = [{"prompt": t, "category": ""} for t in texts] if texts else prompts(n)
    for name in ("zebra", "okapi"):
        folder(tmp_path / name, range(len(entries)), entries, **more)
    out = tmp_path / "study.html"
    study.main([str(tmp_path / "zebra"), f"okapi={tmp_path / 'okapi'}", "--out", str(out)])
    return out, json.loads((tmp_path / "study.key.json").read_text()), out.read_text(encoding="utf-8")


def page_data(text):
    return json.loads(re.search(r'<script type="application/json" id="study">(.*)</script>', text)[1])


def one_line(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        study.main([str(a) for a in argv])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("study.py: "), said
    return said[0]


# ---- the page ----

def test_the_first_prompts_of_each_category_that_all_folders_have(tmp_path, capsys):
    entries = prompts(12, ("photo", "anime"))
    folder(tmp_path / "zebra", [0, 1, 2, 3, 4, 5, 6, 7, 9], entries)
    folder(tmp_path / "okapi", [0, 1, 3, 4, 5, 6, 7, 9, 11], ending="webp")
    (tmp_path / "okapi" / "grid.png").write_bytes(b"not one of them")
    study.main([str(tmp_path / "zebra"), str(tmp_path / "okapi"), "--out", str(tmp_path / "s.html"),
                "--per-category", "3"])
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


def test_pictures_are_jpegs_of_the_side_that_was_asked_for(tmp_path):
    for name in ("zebra", "okapi"):
        folder(tmp_path / name, [0], prompts(1), size=(300, 150))
    study.main([str(tmp_path / "zebra"), str(tmp_path / "okapi"), "--out", str(tmp_path / "s.html"),
                "--side", "100"])
    for data in re.findall(r'id="p0-\d">(.*)</script>', (tmp_path / "s.html").read_text()):
        picture = Image.open(BytesIO(base64.b64decode(data)))
        assert picture.format == "JPEG" and picture.size == (100, 50)


def test_a_prompt_stays_data(tmp_path):
    _, _, text = made(tmp_path, NASTY)
    assert [p["prompt"] for p in page_data(text)["prompts"]] == NASTY
    assert "<script>alert" not in text and "<img src=x" not in text
    assert not re.search(r'(src|href)="?(https?:)?//', text)


def test_folders_without_prompts_take_them_from_a_file(tmp_path, capsys):
    a, b = folder(tmp_path / "a", [0, 1]), folder(tmp_path / "b", [0, 1], ending="jpg")
    assert "give --prompts FILE" in one_line(capsys, a, b, "--out", tmp_path / "s.html")
    (tmp_path / "p.txt").write_text("a fox\n\na street\n")
    study.main([str(a), str(b), "--out", str(tmp_path / "s.html"), "--prompts", str(tmp_path / "p.txt")])
    assert [p["prompt"] for p in page_data((tmp_path / "s.html").read_text())["prompts"]] == [
        "a fox", "a street"]


def test_an_existing_study_is_replaced_only_when_asked(tmp_path, capsys):
    out, key, text = made(tmp_path)
    again = [tmp_path / "zebra", tmp_path / "okapi", "--out", out]
    said = one_line(capsys, *again)
    assert "exists already, and raters may be at work on it; --overwrite replaces it" in said
    assert out.read_text() == text
    study.main([str(a) for a in again] + ["--overwrite"])
    assert page_data(out.read_text())["study"] != key["study"]
    out.unlink()
    assert "study.key.json exists already" in one_line(capsys, *again) and not out.exists()


@pytest.mark.parametrize("argv, words", [
    ([], "at least two folders"), (["zebra"], "at least two folders"),
    (["zebra", "no"], "no: no such folder"), (["zebra", "empty"], "empty: no pictures 00000.png"),
    (["zebra", "zebra=okapi"], 'two folders are called "zebra"'), (["zebra", "="], "give NAME=FOLDER"),
    (["zebra", "other"], "prompt 1 differs between zebra and other"),
    (["zebra", "broken"], "broken/00001.png: cannot be read as a picture"),
    (["zebra", "cut"], "cut/00001.png: cannot be read as a picture: image file is truncated"),
    (["zebra", "twice"], "a second picture of prompt 0"),
    (["zebra", "apart"], "no prompt of which all folders"),
    (["okapi", "bare"], "picture 2: okapi has only 2 prompts"),
    (["zebra", "shape"], "shape/prompts.json: must be"), (["zebra", "text"], "text/prompts.json: not JSON"),
    (["zebra", "okapi", "--side", "0"], "--side 0: must be between 64 and"),
    (["zebra", "okapi", "--quality", "101"], "--quality 101"),
    (["zebra", "okapi", "--out", "no/s.html"], "no/s.html: a file cannot be written there"),
    (["zebra", "okapi", "--out", "zebra/00000.png/s.html"], "cannot be written"),
    (["zebra", "okapi", "--out", "zebra"], "zebra: a file cannot be written there"),
    (["zebra", "--no-such-flag"], "unrecognized"),
    (["zebra", "okapi", "--prompts", "no.txt"], "--prompts no.txt: cannot be read"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    here = lambda name, *more: folder(tmp_path / name, *more)
    here("zebra", [0, 1], prompts(2)), here("okapi", [0, 1, 2], prompts(2)), here("empty", [])
    here("other", [0, 1], [{"prompt": "prompt 0"}, {"prompt": "another"}]), here("bare", [0, 2])
    for name in ("twice", "broken", "cut", "shape", "text"):
        here(name, [0, 1])
    here("apart", [7])
    (tmp_path / "broken/00001.png").write_bytes(b"no picture")
    noise = Image.frombytes("RGB", (99, 99), random.Random(0).randbytes(99 * 99 * 3))
    noise.save(tmp_path / "cut/00001.png")
    whole = (tmp_path / "cut/00001.png").read_bytes()
    (tmp_path / "cut/00001.png").write_bytes(whole[:len(whole) // 2])
    shutil.copy(tmp_path / "zebra/00000.png", tmp_path / "twice/0.png")
    (tmp_path / "shape/prompts.json").write_text('["prompt 0", "prompt 1"]')
    (tmp_path / "text/prompts.json").write_text("prompt 0")
    before = sorted(tmp_path.rglob("*"))
    assert words in one_line(capsys, *argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_every_flag_tells_its_default(capsys):
    for argv in (["-h"], ["tally", "-h"]):
        with pytest.raises(SystemExit) as stop:
            study.main(argv)
        said = capsys.readouterr().out
        assert stop.value.code == 0
        for flag in re.split(r"\n  (?=--)", said.split("options:")[1])[1:]:
            assert "default" in flag or "None" in flag or flag.startswith("--key"), flag


# ---- the tally ----

KEY = {"study": "s", "methods": ["base", "<b>|x"], "prompts": {"0": {"prompt": "a", "category": "photo"},
                                                              "1": {"prompt": "b", "category": "anime"}},
       "pictures": {"p0-1": {"method": "base", "prompt": 0}, "p0-2": {"method": "<b>|x", "prompt": 0},
                    "p1-1": {"method": "<b>|x", "prompt": 1}, "p1-2": {"method": "base", "prompt": 1}}}
E, G, P, F = sv.LEVELS


def cells(*levels):
    return dict(zip(["realism", "aesthetics", "detail", "alignment"], levels))


VOTES = {"ann": {"p0-1": cells(G, G, P, E), "p0-2": cells(E, E, E, E), "p1-1": cells(E, G, E, P),
                 "p1-2": cells(F, P, P, P)},
         "bob": {"p0-1": cells(G, P, P, E), "p0-2": cells(E, E, G, E), "p1-1": cells(P, G)}}


def sent(tmp_path, votes=VOTES, key=KEY):
    """The files of a study's votes and its key: their paths."""
    (tmp_path / "k.key.json").write_text(json.dumps(key))
    for name, cast in votes.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"study": "s", "annotator": name, "votes": cast}))
    return [*(str(tmp_path / f"{name}.json") for name in votes), "--key", str(tmp_path / "k.key.json")]


def test_the_tables_are_the_votes(tmp_path, capsys):
    study.main(["tally", *sent(tmp_path), "--json", str(tmp_path / "r.json")])
    r, said = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
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
    ratings = [sv.Rating("a", f"p{i}-1", "m", i, "", "realism", 0 if i < 12 else 2) for i in range(40)]
    assert sv.rate(ratings)["se"] == pytest.approx((0.3 * 0.7 / 39) ** 0.5)


def test_alpha_is_krippendorffs():
    """The worked example of "Computing Krippendorff's Alpha-Reliability" (2011), section E: 0.815."""
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[int(row[i]) for row in rows if row[i] != "."] for i in range(12)]
    assert sv.alpha(units) == pytest.approx(0.815, abs=5e-4)
    assert sv.alpha([[0, 0], [3, 3], [1, 1, 1]]) == 1
    assert sv.alpha([[0, 0], [0, 0]]) is None and sv.alpha([[1], [2]]) is None


@pytest.mark.parametrize("levels, verdict", [
    ("0000", E), ("0001", G), ("0022", G), ("0012", G), ("0111", P), ("1111", P), ("2222", P), ("0003", F),
    ("3333", F)])
def test_overall_follows_from_the_four(levels, verdict):
    assert sv.LEVELS[sv.overall([int(c) for c in levels])] == verdict


def test_bars_are_a_picture_of_the_four_levels(tmp_path):
    study.main(["tally", *sent(tmp_path), "--bars", str(tmp_path / "b.svg")])
    svg = ET.parse(tmp_path / "b.svg").getroot()
    rows = {}
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
        if len(rect):
            rows.setdefault(rect.get("y"), []).append((rect.get("fill"), float(rect.get("width"))))
    assert len(rows) == 5 * 2
    for row in rows.values():
        assert [c for c, _ in row] == sv.COLORS and abs(sum(w for _, w in row) - 520) < 0.5
    texts = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "<b>|x" in texts and set(sv.LEVELS) <= set(texts)


@pytest.mark.parametrize("content, words", [
    (None, "cannot be read: No such file"), ("{", "not JSON"), ("[]", "not a file of votes"),
    ({"study": "other"}, "votes of another study, other; the key is of s"),
    ({"annotator": " "}, "not a file of votes"), ({"votes": {}}, "no votes"),
    ({"votes": {"p9-1": {}}}, 'votes for a picture that the study lacks, "p9-1"'),
    ({"votes": {"p0-1": []}}, "p0-1: not"), ({"votes": {"p0-1": {"realism": "Superb"}}}, 'rated "Superb"'),
    ({"votes": {"p0-1": {"overall": E}}}, '"overall" rated'),
    ({"votes": {"p0-1": {"realism": [E]}}}, "rated"),
    ({"annotator": "ann", "votes": {"p0-1": cells(F)}}, '"ann" votes differently in'),
])
def test_a_bad_file_of_votes_is_one_line(tmp_path, capsys, content, words):
    argv = sent(tmp_path, {"ann": VOTES["ann"]} if "differently" in words else {})
    if content is not None:
        whole = {"study": "s", "annotator": "c", "votes": {"p0-1": cells(E)}}
        (tmp_path / "v.json").write_text(content if isinstance(content, str) else json.dumps(whole | content))
    said = one_line(capsys, "tally", tmp_path / "v.json", *argv, "--bars", tmp_path / "b.svg")
    assert words in said and not (tmp_path / "b.svg").exists()


def test_the_same_votes_twice_count_once_and_a_key_must_be_one(tmp_path, capsys):
    argv = sent(tmp_path)
    shutil.copy(tmp_path / "ann.json", tmp_path / "ann (1).json")
    study.main(["tally", str(tmp_path / "ann (1).json"), *argv])
    assert "2 raters: ann (4 pictures), bob (3 pictures)" in capsys.readouterr().out
    assert "not a study's key" in one_line(capsys, "tally", *argv[:2], "--key", tmp_path / "ann.json")
    (tmp_path / "b.svg").write_text("mine")
    assert "exists already" in one_line(capsys, "tally", *argv, "--bars", tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == "mine"


# ---- a real browser ----

class Browser:
    """Headless Chromium by the WebDriver protocol."""

    def __init__(self, tmp):
        self.driver = subprocess.Popen([shutil.which("chromedriver"), "--port=0"], stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True)
        port = next(m[1] for line in self.driver.stdout
                    if (m := re.search(r"successfully on port (\d+)", line)))
        self.base, self.downloads = f"http://127.0.0.1:{port}/session", tmp / "downloads"
        self.downloads.mkdir()
        options = {"binary": shutil.which("chromium"),
                   "prefs": {"download.default_directory": str(self.downloads)},
                   "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                            "--window-size=1280,860", f"--user-data-dir={tmp / 'profile'}"]}
        try:
            self.base += "/" + self("", {"capabilities": {"alwaysMatch": {
                "goog:chromeOptions": options, "unhandledPromptBehavior": "ignore"}}})["sessionId"]
        except (OSError, KeyError):
            self.driver.kill()
            raise

    def __call__(self, path, data=None, method=None):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.base + path, body, {"Content-Type": "application/json"},
                                         method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)["value"]

    def js(self, script, *args):
        return self("/execute/sync", {"script": script, "args": args})

    def open(self, path):
        self("/url", {"url": path.as_uri()})

    def keys(self, text):
        self("/actions", {"actions": [{"type": "key", "id": "k", "actions": [
            {"type": kind, "value": c} for c in text for kind in ("keyDown", "keyUp")]}]})

    def click(self, css):
        element = self("/element", {"using": "css selector", "value": css})
        self(f"/element/{next(iter(element.values()))}/click", {})

    def enter(self, name):
        self.js("document.getElementById('name').value = ''")
        self.click("#name")
        self.keys(name + "\ue007")

    def phone(self, on):
        self("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride" if on else
                                   "Emulation.clearDeviceMetricsOverride", "params": {
            "width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True} if on else {}})

    def alert(self):
        try:
            return self("/alert/text")
        except urllib.error.HTTPError:
            return None


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver (apt-get install chromium-driver)")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser("", method="DELETE")
    browser.driver.terminate()
    browser.driver.wait()


STATE = """
const texts = css => [...document.querySelectorAll(css)].map(element => element.textContent);
return {prompt: texts("#prompt")[0], where: texts("#where")[0], overall: texts(".overall b"),
        pressed: [...document.querySelectorAll("[aria-pressed=true]")].map(b => b.ariaLabel)};"""
RIGHT, DOWN, ENTER = "\ue014", "\ue015", "\ue007"


def test_ratings_survive_a_reload_and_come_out_in_the_file(browser, tmp_path, capsys):
    out, key, _ = made(tmp_path, NASTY + [f"prompt {i}" for i in range(4)])
    browser.open(out)
    browser.enter("Ann <i>")
    for _ in range(3):                                         # by keyboard: eight ratings, next prompt
        browser.keys("1111" + "2114" + ENTER)
    assert browser.js(STATE)["where"] == "Prompt 4 of 8, 3 rated"
    for p, i, level in product(range(2), range(4), [2]):       # by click
        browser.click(f"#c{p}-{i} .l{level}")
    assert browser.js(STATE)["overall"] == ["Pass", "Pass"]
    browser.click("#next")
    browser.keys("1" + RIGHT + "3" + DOWN + "2")               # and by arrows
    before = browser.js(STATE)
    assert len(before["pressed"]) == 3 and before["overall"] == ["–", "–"]
    assert before["pressed"][1:] == ["Picture B, Realism and artifacts: Pass", "Picture B, Aesthetics: Good"]
    browser("/refresh", {})
    assert browser.js(STATE) == before and before["where"] == "Prompt 5 of 8, 4 rated"
    browser.keys(ENTER)                                        # five are open: it says so and stays
    assert "5 still open" in browser.js("return document.getElementById('said').textContent")
    browser.keys(ENTER + "b")
    assert browser.js(STATE) == before
    browser.click("#export")
    saved, until = [], time.time() + 5
    while not saved and time.time() < until:
        time.sleep(0.05)
        saved = list(browser.downloads.glob("*.json"))
    votes = json.loads(saved[0].read_text())
    assert saved[0].name == f"votes_{key['study']}_Ann_i_.json" and votes["annotator"] == "Ann <i>"
    assert sum(map(len, votes["votes"].values())) == 3 * 8 + 8 + 3
    capsys.readouterr()
    study.main(["tally", str(saved[0]), "--key", str(tmp_path / "study.key.json"),
                "--json", str(tmp_path / "r.json")])
    methods = json.loads((tmp_path / "r.json").read_text())["methods"].values()
    assert [sum(m["overall"]["counts"][k] for m in methods) for k in range(4)] == [3, 0, 2, 3]


def test_a_prompt_is_shown_as_it_is_written(browser, tmp_path):
    out, _, _ = made(tmp_path, NASTY)
    browser.open(out)
    browser.enter("<b>bob</b>")
    seen = set()
    for _ in NASTY:
        seen.add(browser.js(STATE)["prompt"])
        browser.keys("nn")
    assert seen == set(NASTY) and browser.alert() is None
    assert browser.js("return document.querySelectorAll('#prompt *, #other *').length") == 0


def test_every_rater_has_an_order_of_their_own_and_keeps_it(browser, tmp_path):
    out, _, _ = made(tmp_path, n=20)
    browser.open(out)
    orders = []
    for name in ("ann", "bob", "ann "):
        browser.enter(name)
        orders.append(browser.js("return order.map(p => [p.prompt, ...p.pictures])"))
        browser.click("#other")
    ann, bob, again = orders
    assert ann == again and ann != bob and [p for p, *_ in ann] != [p for p, *_ in bob]
    for order in (ann, bob):
        assert sorted(p for p, *_ in order) == sorted(f"prompt {i}" for i in range(20))
    assert len({a < b for _, a, b in ann}) == 2                # left and right change as well


def test_the_page_and_the_tally_have_one_rule_for_overall(browser, tmp_path):
    out, _, _ = made(tmp_path)
    browser.open(out)
    every = list(product(range(4), repeat=4))
    said = browser.js("return arguments[0].map(levels => overall(Object.fromEntries("
                      "dimensions.map((d, i) => [d, study.levels[levels[i]]]))))", every)
    assert said == [sv.LEVELS[sv.overall(list(levels))] for levels in every]


def test_without_storage_it_says_so_and_works(browser, tmp_path):
    out, _, text = made(tmp_path)
    refuse = 'Object.defineProperty(window, "localStorage", {get() { throw new Error() }});'
    out.write_text(text.replace('"use strict";', '"use strict"; ' + refuse))
    browser.open(out)
    assert browser.js("return document.getElementById('nostore').checkVisibility()")
    browser.enter("ann")
    browser.keys("1111")
    assert browser.js(STATE)["overall"] == ["Excellent", "–"]
    browser.js("votes = {}")                                   # else it asks before it is left


def test_a_phone_has_no_sideways_scroll_and_buttons_for_fingers(browser, tmp_path):
    out, _, _ = made(tmp_path, ["a very long prompt about " + "x" * 90, *NASTY], size=(256, 256))
    browser.phone(True)
    try:
        browser.open(out)
        sideways = "return document.documentElement.scrollWidth > innerWidth"
        assert browser.js("return innerWidth") == 390 and not browser.js(sideways)
        browser.enter("ann")
        for _ in range(5):
            assert not browser.js(sideways)
            boxes = browser.js("return [...document.querySelectorAll('#rating button')].filter(b => "
                               "b.checkVisibility()).map(b => b.getBoundingClientRect())"
                               ".map(r => [r.width, r.height])")
            assert len(boxes) >= 2 * 17 and all(w >= 32 and h >= 32 for w, h in boxes)
            browser.keys("nn")
    finally:
        browser.phone(False)
