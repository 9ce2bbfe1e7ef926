"""Claims about the study's page in a real browser: ratings survive and come out, a prompt stays text, every
rater has an order of their own, a phone will do."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from itertools import product

import pytest
from study_builders import NASTY, made, run

from evaluation.study import votes as sv


class Browser:
    """Headless Chromium by the WebDriver protocol."""

    def __init__(self, tmp, chromium, chromedriver):
        self.driver = subprocess.Popen([chromedriver, "--port=0"], stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True)
        port = next(m[1] for line in self.driver.stdout
                    if (m := re.search(r"successfully on port (\d+)", line)))
        self.base, self.downloads = f"http://127.0.0.1:{port}/session", tmp / "downloads"
        self.downloads.mkdir()
        options = {"binary": chromium,
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
        with urllib.request.urlopen(request, timeout=60) as answer:
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

    def emulate(self, command, **params):
        self("/goog/cdp/execute", {"cmd": f"Emulation.{command}", "params": params})

    def phone(self, on):
        if on:
            self.emulate("setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        else:
            self.emulate("clearDeviceMetricsOverride")

    def alert(self):
        try:
            return self("/alert/text")
        except urllib.error.HTTPError:
            return None


def programs():
    """(browser, driver) on this machine. Without them tests skip, or fail where REQUIRE_BROWSER=1."""
    chromium = shutil.which("google-chrome") or shutil.which("chromium")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        complain = pytest.fail if os.environ.get("REQUIRE_BROWSER") == "1" else pytest.skip
        complain("needs chromium and chromedriver (apt-get install chromium-driver)")
    return chromium, chromedriver


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"), *programs())
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
    assert "ratings missing: 5" in browser.js("return document.getElementById('said').textContent")
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
    run("tally", saved[0], "--key", tmp_path / "study.key.json", "--json", tmp_path / "r.json")
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


def test_where_a_browser_is_required_its_absence_is_a_failure(monkeypatch):
    """The workflow sets REQUIRE_BROWSER: there, these tests cannot be skipped unseen."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception):
        programs()
    monkeypatch.setenv("REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception):
        programs()
