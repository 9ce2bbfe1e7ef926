"""Claims about a run's page: it tells the run's state and needs nothing beside it; what a prompt or a name
holds stays text; no trouble with it ends a run; several runs lie side by side; and it works in a real
browser."""

import csv
import errno
import io
import json
import os
import re
import time
import zlib

import pytest
import torch
from PIL import Image
from study_builders import NASTY
from test_study_browser import Browser, programs

import command
import recipe
from engine.command_line import as_line
from engine.run.folder import LOCK, lock
from evaluation import film, table_formats
from evaluation.metrics.statistics import STATISTICS
from evaluation.picture_folders import PNG_END, save_grid
from evaluation.report import page as report
from rewards.base import Column

CONTROL = "\x00\x1b[2J\u202e\u2028"
PROMPTS = [NASTY[1], NASTY[3], f"control {CONTROL}", "a red circle"]
ALARM = "saturation drifted by -0.300, outside ±0.2"


def line(step, hacking=()):
    """A line of a log.jsonl whose step was watched."""
    watch = {"reward": 0.8, "sgp": 0.01 * step, **dict.fromkeys(STATISTICS, 0.5), "realism": step / 100,
             "alignment": 1.0, "broken": 0.0}
    return {"step": step, "reward_denoise": 0.1 * step, "reward_invert": -0.1, "sgp": 0.02 * step,
            "grad_norm": 0.2, "seconds_rollout": 0.1, "seconds_update": 0.3,
            "drift": dict.fromkeys(STATISTICS, -0.01 * step), "watch": watch, "hacking": list(hacking)}


def made(folder, lines, *flags, pictures=4, size=64):
    """A run's folder with this log, and its flags: (folder, {flag: value}). The first picture of step s has
    the grey level s."""
    args = vars(command.flags(["--model", "miniature", "--watch", str(pictures), *flags]))
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text('{"run": "abc"}')
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    for step in [0, *(entry["step"] for entry in lines)]:
        images = torch.full((pictures, 3, size, size), step / 255)
        images[1:, 1] = 0.5
        save_grid(images, folder / "samples" / f"step_{step:05d}.png")
    return folder, args


def written(folder, args, status="running", **more):
    """The text of the page that `write` makes."""
    report.write(folder, args, as_line(recipe.GROUPS, args), status, prompts=PROMPTS, **more)
    return (folder / "report.html").read_text(encoding="utf-8")


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="report">(.*)</script>', text)[1])


def one_line(capsys, *argv, status=2):
    """What a command that must fail says: one line, in which nothing can move the cursor."""
    with pytest.raises(SystemExit) as stop:
        report.main([str(word) for word in argv])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == status and len(said) == 1 and said[0].startswith("report: "), said
    assert said[0].isprintable()
    return said[0]


# --------------------------------------------------------------------------------------------- one run's page
def test_the_page_needs_nothing_beside_it(tmp_path):
    text = written(*made(tmp_path / "run", [line(1), line(2)]))
    assert not re.search(r"https?:|//[a-z]|@import|<link|\bsrc\s*=|\bhref\b|url\(", text.split("<script")[0])
    scripts = re.findall(r"<script[^>]*>", text)
    assert scripts and not any("src" in script for script in scripts)
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'; img-src data:;" in text


def test_the_page_tells_whether_a_run_goes_on_and_what_it_does(tmp_path):
    folder, args = made(tmp_path / "run", [line(1), line(2)], "--steps", "4")
    run = data_of(written(folder, args, state={"images": 32, "before": {"sgp": [0.1, 0.3]}}))["runs"][0]
    assert (run["status"], run["step"], run["steps"], run["images"]) == ("running", 2, 4, 32)
    assert run["seconds"] == pytest.approx(0.4) and run["left"] is not None
    assert run["flags"] == as_line(recipe.GROUPS, args)
    assert data_of(written(folder, args, "stopped"))["runs"][0]["status"] == "stopped"
    run = data_of(written(folder, args, status="finished"))["runs"][0]
    assert run["status"] == "finished" and run["left"] is None


@pytest.mark.parametrize("looks, landed, steps", [((False, False), False, 9), ((False, True), True, 2),
                                                  ((True, False), False, 9)])
def test_a_run_that_landed_is_not_told_as_cut_short(tmp_path, looks, landed, steps):
    lines = [line(step) | {"landed": look} for step, look in zip((1, 2), looks, strict=True)]
    run = data_of(written(*made(tmp_path / "run", lines, "--steps", "9", "--land", "0.25")))["runs"][0]
    assert (run["landed"], run["steps"], run["left"] is None) == (landed, steps, landed)


def test_time_left_is_by_the_clock_of_the_pictures(tmp_path):

    folder, args = made(tmp_path / "run", [line(5), line(10)], "--steps", "30")
    for step in (0, 5, 10):
        os.utime(folder / "samples" / f"step_{step:05d}.png", (1000 + 7 * step, 1000 + 7 * step))
    assert data_of(written(folder, args))["runs"][0]["left"] == 7 * 20


def test_the_slider_has_the_first_and_the_last_step_and_24_at_most(tmp_path):
    folder, args = made(tmp_path / "run", [line(step) for step in range(1, 61)], "--steps", "60")
    text = written(folder, args)
    steps = [int(step) for step in data_of(text)["runs"][0]["pictures"]]
    assert steps[0] == 0 and steps[-1] == 60 and 12 <= len(steps) <= 24
    inside = re.findall(r'id="picture-0-(\d+)">data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+</script>', text)
    assert [int(step) for step in inside] == steps
    (folder / "log.jsonl").write_text(json.dumps(line(5)) + "\n")  # pictures beyond the log are out of date
    assert max(map(int, data_of(written(folder, args))["runs"][0]["pictures"])) == 5


def test_pictures_are_told_apart_in_the_grid(tmp_path):
    """A share of the grid for each picture; one picture has no frame; large ones become small JPEGs."""
    folder, args = made(tmp_path / "run", [line(1)], pictures=10)
    tiles = data_of(written(folder, args, status="finished"))["runs"][0]["tiles"]
    with Image.open(folder / "samples/step_00000.png") as grid:
        width, height = grid.size
        assert len(tiles) == len(PROMPTS) and width == 8 * 130 + 2
        x, y, w, h = tiles[1]
        assert (x * width, y * height, w * width, h * height) == pytest.approx((132, 2, 128, 128))
    folder, args = made(tmp_path / "one", [line(1)], pictures=1)
    assert data_of(written(folder, args))["runs"][0]["tiles"] == [[0, 0, 1, 1]]
    noise = tmp_path / "noise.png"
    Image.effect_noise((2890, 724), 60).save(noise)
    uri = report.data_uri(noise, 0)
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 600_000


def test_photographs_are_beside_the_pictures_of_their_prompts(tmp_path):
    folder, args = made(tmp_path / "run", [line(1)])
    assert data_of(written(folder, args))["runs"][0]["beside"] == []
    save_grid(torch.rand(2, 3, 64, 64), folder / "samples" / "photographs.png")
    text = written(folder, args)
    run = data_of(text)["runs"][0]
    assert len(run["beside"]) == 2 and len(run["tiles"]) == 4
    assert f'id="{run["photographs"]}">data:image/png;base64,' in text


def test_every_curve_of_the_log_is_on_the_page(tmp_path):
    held_out = line(2)
    held_out["watch"] |= {"reward pickscore": 22.0, "sgp pickscore": 0.1}
    held_out |= {"grad_norm": float("nan"), "seconds_update": 1e308, "seconds_rollout": 1e308}
    folder, args = made(tmp_path / "run", [line(1), held_out])
    page = data_of(written(folder, args, state={"before": {"sgp": [0.5]}}))
    charts = {chart["title"]: chart for chart in page["charts"]}
    curves = {title: [curve["name"] for curve in chart["curves"]] for title, chart in charts.items()}
    assert curves["SGP gap"] == ["watched", "training"]
    assert charts["SGP gap"]["curves"][0]["points"] == [[0, 0.5], [1, 0.01], [2, 0.02]]
    assert curves["Reward in training, by branch"] == ["denoise", "invert"]
    assert curves["Judge: % of the watched pictures"] == ["realism", "alignment", "broken"]
    assert {"reward pickscore of the watched pictures", "sgp pickscore of the watched pictures"} < set(charts)
    assert charts["Drift of redness"]["bands"] == [[-args["drift_band"][1], args["drift_band"][1]]]
    assert charts["Gradient norm, before clipping"]["curves"][0]["points"] == [[1, 0.2]]   # no NaN
    assert curves["Seconds of an update"] == ["update", "rollout"]


def test_a_prompt_or_a_name_ends_no_element(tmp_path):
    folder, args = made(tmp_path / "<b>&run", [line(1, [NASTY[1]])], "--control", "</script><b>bold")
    text = written(folder, args)
    assert "<img src=x" not in text and text.count("</script>") == 1 + 2 + 1
    assert all(character.isprintable() or character == "\n" for character in text)
    run = data_of(text)["runs"][0]
    assert run["prompts"][0] == NASTY[1] and run["name"] == "<b>&run" and "</script><b>bold" in run["flags"]


def test_a_drift_warning_is_told_with_what_to_do(tmp_path):
    folder, args = made(tmp_path / "run", [line(1), line(2), line(3, [ALARM])], "--steps", "9",
                        "--form", "plain", "--branches", "denoise")
    run = data_of(written(folder, args))["runs"][0]
    assert run["warnings"] == {"3": [ALARM]} and run["best"] == 2
    assert run["advice"] == (
        "Stop here: Ctrl-C saves a checkpoint. weights_best/ holds the weights of step 2, the best by SGP "
        "gap inside the band. To try, one at a time: a smaller --lr (2e-05), fewer updates (--steps 2), "
        "a reward that is relative (--form srp), both branches (--branches denoise,invert).")


def test_before_the_first_update_there_is_a_page_already(tmp_path):
    folder, args = made(tmp_path / "run", [])
    (folder / "log.jsonl").unlink()
    run = data_of(written(folder, args, state={"before": {"sgp": [0.5]}}))["runs"][0]
    assert (run["status"], run["step"], run["pictures"]) == ("running", 0, {"0": "picture-0-0"})


def test_advice_is_about_this_run():
    args = {"steps": 9, "lr": 1e-5, "form": "released", "branches": ["denoise", "invert"]}
    assert report.advice([], {"step": 3}, args) == ""
    assert report.advice([ALARM], {"step": 3}, args).startswith("Stop here: Ctrl-C")
    assert not report.advice([ALARM], {"step": 3}, args, running=False).startswith("Stop here")
    assert report.advice([ALARM], {"step": 9, "best_step": None}, args) == (
        "There is no weights_best/: no look was inside the band. To try, one at a time: a smaller --lr "
        "(5e-06).")


def test_a_run_killed_in_mid_line_has_its_page(tmp_path):
    folder, args = made(tmp_path / "run", [line(1), line(2)])
    with open(folder / "log.jsonl", "a") as file:
        file.write('[1]\n"x"\n{"step": "4"}\n{"step": -1}\n' + json.dumps(line(3))[:40])
    assert data_of(written(folder, args))["runs"][0]["step"] == 2
    report.main([str(folder), "--out", str(tmp_path / "page.html")])
    assert data_of((tmp_path / "page.html").read_text())["runs"][0]["step"] == 2


def test_writing_is_fast(tmp_path):
    folder, args = made(tmp_path / "run", [line(step) for step in range(1, 201)], "--steps", "200")
    written(folder, args)
    started = time.process_time()
    written(folder, args)
    assert time.process_time() - started < 0.3


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, monkeypatch, capsys):
    folder, args = made(tmp_path / "run", [line(1)])
    before = written(folder, args)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(report, "write_whole", full)
    assert written(folder, args) == written(folder, args) == before
    assert capsys.readouterr().out == (
        f"{folder}/report.html: cannot be written: No space left on device; training goes on\n")


# ----------------------------------------------------------------------------------------------- several runs
def test_several_runs_lie_side_by_side(tmp_path, capsys):
    a, args = made(tmp_path / "a", [line(1), line(2)], "--steps", "2", "--lr", "1e-5")
    b, _ = made(tmp_path / "b", [line(1)], "--steps", "2", "--seed", "1", "--compile", "--threshold", "0.7")
    (a / "summary.json").write_text('{"steps": 2}')
    written(a, args, status="finished")
    with open(b / LOCK, "w") as held:
        lock(held, b)
        report.main([str(a), f"new|one={b}", "--out", str(tmp_path / "both.html")])
    said = capsys.readouterr().out
    assert r"|            | a       | new\|one | n   |" in said and "Watched while training:" in said
    assert "| sgp        | +0.020  | +0.010   | 4   |" in said
    page = data_of((tmp_path / "both.html").read_text())
    assert [run["status"] for run in page["runs"]] == ["finished", "running"]
    assert page["runs"][0]["prompts"] and page["runs"][0]["flags"]       # from its own page
    assert page["differ"] == [["flag", "a", "new|one"], ["--seed", "0", "1"], ["--lr", "1e-05", "4e-05"],
                              ["--threshold", "off", "0.7"], ["--compile", "no", "yes"]]
    assert [curve["run"] for chart in page["charts"] for curve in chart["curves"]].count(1) == 15
    report.main([str(a), str(b), "--out", str(tmp_path / "both.html")])  # a report may be replaced
    for runs in ([a, b], [b]):
        assert "is the page of that run alone" in one_line(capsys, *runs, "--out", a / "report.html")


def test_the_evaluation_is_the_number_that_a_run_ends_with(tmp_path, capsys):
    folder, _ = made(tmp_path / "a", [line(1), line(2)], "--steps", "2")
    after = {"sgp": {"mean": 0.25, "se": 0.01, "n": 8}, "realism": {"mean": 0.5, "se": None, "n": 1}}
    (folder / "summary.json").write_text(json.dumps({"steps": 2, "before": None, "after": after}))
    report.main([str(folder), f"b={folder}", "--out", str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert "Evaluated after training:" in said and "| sgp     | +0.250 ± 0.010 | +0.250 ± 0.010 | 8   |" in said
    assert "| realism | 50.0 %         | 50.0 %         | 1   |" in said
    page = data_of((tmp_path / "page.html").read_text())["numbers"]
    assert [made["title"] for made in page] == ["Evaluated after training", "Watched while training"]
    assert page[0]["rows"][1] == ["sgp", "+0.250 ± 0.010", "+0.250 ± 0.010", "8"]


WIDE = table_formats.table(
    {f"model {i}": {"sgp": {"mean": i / 8, "se": 0.5, "n": 4}, "realism": {"mean": -i / 4, "se": None, "n": 5}}
     for i in range(3)}, {"sgp": Column("SGP_gap", "+.2f"), "realism": Column("real", ".1%")}, title="All & more")


@pytest.mark.parametrize("widest, parts", [(None, 1), (80, 1), (50, 2), (10, 3)])
def test_a_table_that_is_too_wide_is_cut_into_several(widest, parts):
    """Each has all metrics, in the same order; no number is lost."""
    text = table_formats.markdown(WIDE, widest)
    lines = text.splitlines()
    assert text.count("| SGP_gap |") == parts and text.count("| real    |") == parts
    assert sum(line.count("±") for line in lines) == 3 and all(text.count(f"model {i}") == 1 for i in range(3))
    if parts < 3:
        assert max(map(len, lines)) <= (widest or 80)


def test_a_table_is_a_csv_and_latex():
    rows = list(csv.reader(io.StringIO(table_formats.as_csv([WIDE]))))
    assert rows[0] == ["table", "metric", "n", *(f"model {i}{se}" for i in range(3) for se in ("", " se"))]
    assert rows[1] == ["All & more", "SGP_gap", "4", "0.0", "0.5", "0.125", "0.5", "0.25", "0.5"]
    assert rows[2] == ["All & more", "real", "5", "0.0", "", "-0.25", "", "-0.5", ""]
    latex = table_formats.as_latex([WIDE])
    assert r"SGP\_gap & $+0.00 \pm 0.50$ & $+0.12 \pm 0.50$ & $+0.25 \pm 0.50$ & 4 \\" in latex
    assert r"real & $0.0$\,\% & $-25.0$\,\% & $-50.0$\,\% & 5 \\" in latex
    assert latex.count(r"\begin{tabular}{lrrrr}") == latex.count(r"\end{tabular}") == 1 and "% All & more" in latex


MISTAKES = {
    "no folder": ("nowhere", "no such folder"),
    "a file": ("notes.txt", "no such folder"),
    "not a run": (".", "not a run's folder"),
    "an empty log": ("empty", "holds no update yet"),
    "no log": ("unlogged", "holds no update yet"),
    "flags that are none": ("flagless", "not the flags of a run"),
    "flags that are not JSON": ("broken", "not JSON"),
    "a mark that is none": ("unmarked", "damaged, it has no run's id"),
    "one run of two": (["run", "nowhere"], "no such folder"),
    "no name": ("=run", "give NAME=PATH"),
    "control characters": ("\x1b[2J", "no such folder"),
    "two runs of one name": (["run", "run"], 'two runs are called "run"; give each its own name'),
    "a NUL": (["run", "--out", "a\0b"], "must be a path, and it holds a NUL"),
    "another's file": (["run", "--out", "notes.txt"], "is not a report"),
    "a folder to write": (["run", "--out", "run"], "cannot be written there"),
    "nowhere to write": (["run", "--out", "nowhere/page.html"], "cannot be written there"),
    "an unknown flag": (["run", "--put", "x"], "unrecognized"),
    "nothing": ([], "required")}


WRONG = {  # JSON that is valid and wrong, in a file of a run's folder: a change of args.json, or the whole; the words
    "a band of three": ("args.json", {"drift_band": [1, 1, 1]}, "--drift-band"),
    "a size of 0": ("args.json", {"size": 0}, "--size 0: must be"),
    "a size of true": ("args.json", {"size": True}, "--size"),
    "branches that are numbers": ("args.json", {"branches": [1, 2]}, "--branches"),
    "a rate that is none": ("args.json", {"lr": None}, "--lr"),
    "no model": ("args.json", {"model": 3}, "not the flags"),
    "a list of flags": ("args.json", [1], "not the flags of a run"),
    "a list of results": ("summary.json", [1], "not the results of a run"),
    "results that are numbers": ("summary.json", {"steps": 1, "before": None, "after": {"sgp": 3}}, "not the results"),
    "means that are texts": ("summary.json", {"steps": 1, "after": {"sgp": {"mean": 1, "se": "x", "n": 2}}}, "not the"),
    "a number that is a list": ("summary.json", {"steps": 1, "after": {"sgp": {"mean": 1, "se": 1, "n": [2]}}}, "not"),
    "a row that is a list": ("summary.json", {"steps": 1, "before": [1], "after": None}, "not the results"),
    "texts for looks": ("log.jsonl", {"step": 1, "watch": {"sgp": "a", "reward": [1]}, "hacking": [3]}, None),
    "lists for looks": ("log.jsonl", {"step": 1, "watch": [1], "drift": [2], "reward_x": {}, "hacking": {}}, None)}


@pytest.mark.parametrize("name", WRONG)
def test_json_that_is_valid_and_wrong_is_one_line_or_left_out(name, tmp_path, monkeypatch, capsys):
    file, value, words = WRONG[name]
    folder, args = made(tmp_path / "run", [line(1)])
    if file == "args.json" and isinstance(value, dict):
        value = args | value
    (folder / file).write_text(json.dumps(value) + "\n")
    monkeypatch.chdir(tmp_path)
    if words is None:
        report.main(["run"])
    else:
        assert words in one_line(capsys, "run")


def test_a_sample_that_is_too_large_or_a_link_does_not_stop_the_page(tmp_path, monkeypatch, capsys):
    folder, _ = made(tmp_path / "run", [line(1), line(2)])
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])  # 900 million pixels
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    (folder / "samples" / "step_00001.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + PNG_END)
    monkeypatch.chdir(tmp_path)
    report.main(["run"])
    assert "step_00001.png: cannot be read as a picture" in capsys.readouterr().out
    assert list(data_of((tmp_path / "report.html").read_text())["runs"][0]["pictures"]) == ["0", "2"]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, tmp_path, monkeypatch, capsys):
    argv, why = MISTAKES[name]
    for folder in ("run", "empty", "unlogged", "flagless", "broken", "unmarked"):
        made(tmp_path / folder, [line(1)])
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty/log.jsonl").write_text('{"step": 1, "sg')
    (tmp_path / "unlogged/log.jsonl").unlink()
    (tmp_path / "flagless/args.json").write_text('{"steps": "6"}')
    (tmp_path / "broken/args.json").write_text("{")
    (tmp_path / "unmarked/run.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert why in one_line(capsys, *([argv] if isinstance(argv, str) else argv))
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------ in a real browser
WATCH_FOR_TROUBLE = """
window.trouble = [];
addEventListener("error", event => trouble.push(event.message));
addEventListener("securitypolicyviolation", event => trouble.push(event.violatedDirective));
console.error = console.warn = (...words) => trouble.push(words.join(" "));
"""
LEFT, END = "\ue012", "\ue010"
GREY = """
const canvas = document.querySelector("#tiles canvas"), pen = canvas.getContext("2d");
return [0.1, 0.9].map(x => pen.getImageData(x * canvas.width, canvas.height / 2, 1, 1).data[0]);"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"), *programs())
    browser("/goog/cdp/execute", {"cmd": "Page.addScriptToEvaluateOnNewDocument",
                                  "params": {"source": WATCH_FOR_TROUBLE}})
    yield browser
    browser("", method="DELETE")
    browser.driver.terminate()
    browser.driver.wait()


def opened(browser, folder, args, **more):
    written(folder, args, **more)
    browser.open(folder / "report.html")
    wait_for(browser, GREY, lambda pixels: pixels[1] > 0)


def wait_for(browser, script, is_there):
    """Wait until what a script returns is there: pictures are decoded when the browser likes."""
    until = time.time() + 10
    while not is_there(browser.js(script)):
        assert time.time() < until, browser.js("return [document.body.innerText, trouble]")
        time.sleep(0.05)


def focus(browser, name):
    browser.js("document.getElementById(arguments[0]).focus()", name)


def nothing_went_wrong(browser):
    return browser.js("return trouble") == [] and browser.alert() is None


def test_in_a_browser_the_slider_moves_by_keys_and_the_divider_by_dragging(browser, tmp_path):
    folder, args = made(tmp_path / "run", [line(10), line(20, [ALARM])], "--steps", "20")
    opened(browser, folder, args, status="finished")
    assert browser.js(GREY) == [0, 20]                         # before on the left, the newest on the right
    focus(browser, "step")
    browser.keys(LEFT)
    wait_for(browser, GREY, [0, 10].__eq__)
    assert browser.js("return document.getElementById('shown').textContent") == "10 of 20"
    legend = "return document.querySelector('.legend b').textContent"
    assert browser.js(legend) == "0.1"                         # the watched SGP gap, at step 10
    tile = browser("/element", {"using": "css selector", "value": ".tile"})
    half = browser.js("return document.querySelector('.tile').clientWidth / 2")
    move = {"type": "pointerMove", "origin": tile, "y": 0, "duration": 0}
    for kind in ("mouse", "touch"):
        for to, seen in ((0.95, [0, 0]), (-0.95, [10, 10])):   # all of it before; all of it after
            browser("/actions", {"actions": [{
                "type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": [
                    move | {"x": 0}, {"type": "pointerDown", "button": 0},
                    move | {"x": round(to * half)}, {"type": "pointerUp", "button": 0}]}]})
            assert browser.js(GREY) == seen
    focus(browser, "divider")
    browser.keys(END)
    assert browser.js(GREY) == [0, 0]
    assert "weights_best/ holds the weights of step 10" in browser.js("return document.body.innerText")
    assert browser.js("return document.querySelectorAll('svg .mark').length > 5")
    assert nothing_went_wrong(browser)


def test_in_a_browser_a_photograph_is_beside_its_picture(browser, tmp_path):
    folder, args = made(tmp_path / "run", [line(10)], "--steps", "10")
    save_grid(torch.ones(2, 3, 64, 64) * 0.2, folder / "samples" / "photographs.png")
    opened(browser, folder, args, status="finished")
    grey = """const canvas = document.querySelectorAll(".pair canvas")[3];
              return canvas ? canvas.getContext("2d").getImageData(9, 9, 1, 1).data[0] : null;"""
    wait_for(browser, grey, (51).__eq__)
    assert browser.js("return document.querySelectorAll('.pair').length") == 2
    assert nothing_went_wrong(browser)


def test_in_a_browser_text_stays_text_and_the_flags_are_copied(browser, tmp_path):
    folder, args = made(tmp_path / "<i>run", [line(1, [NASTY[1]])], "--control", NASTY[1])
    opened(browser, folder, args)
    shown = browser.js("return [...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    assert shown == [*PROMPTS[:1], report.printable(PROMPTS[1]), report.printable(PROMPTS[2]), PROMPTS[3]]
    assert browser.js("return document.querySelectorAll('img, figcaption *, code *, i').length") == 0
    browser.js("window.copied = null; addEventListener('copy', () => copied = String(getSelection()) || "
               "document.activeElement.value)")
    browser.click("#flags button")
    assert browser.js("return copied") == as_line(recipe.GROUPS, args)
    assert browser.js("return document.querySelector('#flags button').textContent") == "Copied"
    assert nothing_went_wrong(browser)


def test_in_a_browser_a_running_page_is_read_again_and_stays_where_it_was(browser, tmp_path):
    folder, args = made(tmp_path / "run", [line(10), line(20)], "--steps", "30")
    opened(browser, folder, args)
    focus(browser, "step")
    browser.keys(LEFT)
    browser.js("divide(30); scrollTo(0, 200)")
    entry = line(30)
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    written(folder, args, status="finished")
    wait_for(browser, "return document.querySelector('.status').textContent", "finished".__eq__)
    assert browser.js("return [stepShown(), shown.divider, scrollY, document.activeElement.id]") == [
        10, 30, 200, "step"]
    assert not browser.js("return goesOn")                     # a finished one is not
    assert nothing_went_wrong(browser)


def test_in_a_browser_a_phone_has_no_sideways_scroll(browser, tmp_path):
    a, args = made(tmp_path / "a", [line(1), line(2, [ALARM])])
    b, _ = made(tmp_path / ("b" * 90), [line(1)], "--lr", "1e-5", "--control", "x" * 200)
    written(a, args)
    report.main([str(a), str(b), "--out", str(tmp_path / "both.html")])
    browser.phone(True)
    try:
        for page in (a / "report.html", tmp_path / "both.html"):
            browser.open(page)
            wait_for(browser, GREY, lambda pixels: pixels[1] > 0)
            assert browser.js("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        assert browser.js("return document.querySelectorAll('.column').length") == 2
        assert nothing_went_wrong(browser)
    finally:
        browser.phone(False)


def test_a_film_has_a_frame_for_each_look(tmp_path, capsys):
    """In the order of the updates, the last one longest; without pictures it is one line."""
    samples = tmp_path / "run" / "samples"
    samples.mkdir(parents=True)
    with pytest.raises(SystemExit):
        film.main([str(tmp_path / "run")])
    assert "no samples/step_00000.png" in capsys.readouterr().err
    for update, colour in ((0, "red"), (5, "green"), (10, "blue")):
        Image.new("RGB", (64, 32), colour).save(samples / f"step_{update:05d}.png")
    film.main([str(tmp_path / "run")])
    with Image.open(tmp_path / "run" / "film.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (64, 32 + film.LABEL)
        gif.seek(2)
        assert gif.convert("RGB").getpixel((32, 40))[2] > 200 and gif.info["duration"] == 5000 * film.SECONDS
    film.main([str(tmp_path / "run")])  # its own film may be made again
    theirs = tmp_path / "theirs.gif"
    theirs.write_bytes(b"GIF89a of somebody")
    with pytest.raises(SystemExit):
        film.main([str(tmp_path / "run"), "--out", str(theirs)])
    assert "is not a film of a run" in capsys.readouterr().err and theirs.read_bytes() == b"GIF89a of somebody"
