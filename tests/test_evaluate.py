"""Claims about evaluate.py: Table 1's columns from any pictures, both stages resumable to the picture, the
same result on any number of processes, and no score for what cannot be had or read."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from builders import (
    geneval_metadata,
    make_aesthetic,
    make_deqa,
    make_geneval,
    make_imagereward,
    make_pickscore,
    write_lines,
)
from PIL import Image
from scripts import call, start

import evaluate
import flow
import sample
from engine.data import prompt_files
from engine.data.pictures import read_picture
from engine.errors import UserError
from evaluation import metrics, picture_folders, tables
from evaluation.metrics import diversity, geneval, statistics

SMALL = ["--model", "miniature", "--first", "40", "--eval-steps", "2", "--batch", "8"]


def run(monkeypatch, *argv):
    """evaluate.py with these arguments, in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    return stop.value.code


def one_line(monkeypatch, capsys, *argv):
    assert run(monkeypatch, *argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("evaluate.py: "), lines
    return lines[0]


def rows(out):
    return json.loads((out / "results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted evaluation of the base and of "trained" weights, in one process."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, *SMALL, "--weights", "again=miniature/transformer", "--out", out) == 0
    return out


def same(a, b):
    assert rows(a) == rows(b) and (a / "table.md").read_bytes() == (b / "table.md").read_bytes()
    for picture in (a / "base").glob("*.png"):
        assert picture.read_bytes() == (b / "base" / picture.name).read_bytes()


def test_pictures_are_named_by_their_prompts_number_and_the_same_noise_serves_every_model(whole):
    names = [f"{i:05d}.png" for i in range(40)]
    for method in ("base", "again"):
        assert sorted(p.name for p in (whole / method).glob("*.png")) == names
        assert len(picture_folders.listed(whole / method)) == 256
    same_weights = rows(whole)["again"]["difference"]
    assert all(d["mean"] == 0 == d["se"] and d["n"] == 40 for d in same_weights.values())
    assert Image.open(whole / "sheet.png").width > 1000
    assert [list(r) for r in rows(whole).values()] == [["overall", "categories", "difference"]] * 2


def test_killed_anywhere_and_run_again_it_ends_the_same(whole, tmp_path):
    """kill -9 in the middle of the first stage and of the second; a torn picture and a torn line stay
    behind."""
    script = [tmp_path / "printed", "evaluate.py", *SMALL, "--weights", "again=miniature/transformer",
              "--out", tmp_path]
    for seen in (lambda: len(list(tmp_path.glob("base/*.png"))) >= 16,
                 lambda: sum(f.stat().st_size for f in tmp_path.glob("scores/*/reward.0.jsonl")) > 0):
        process, = start(*script)
        while not seen() and process.is_alive():
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "results.json").exists()
    with open(tmp_path / "scores" / "base" / "reward.0.jsonl", "a") as log:
        log.write('{"picture": "00039", "key": "0123')
    os.remove(tmp_path / "base" / "00003.png")
    call(*script)
    same(whole, tmp_path)


def test_two_processes_end_as_one(whole, tmp_path):
    call(tmp_path / "printed", "evaluate.py", *SMALL, "--weights", "again=miniature/transformer",
         "--out", tmp_path, ranks=2)
    same(whole, tmp_path)
    lines = {f.name: len(f.read_text().splitlines()) for f in (tmp_path / "scores" / "base").glob("reward.*")}
    assert lines == {"reward.0.jsonl": 24, "reward.1.jsonl": 16}


def test_the_first_process_encodes_for_the_second_which_alone_has_something_to_sample(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "some")
    os.remove(tmp_path / "some" / "base" / "00008.png")
    call(tmp_path / "printed", "evaluate.py", *SMALL, "--weights", "again=miniature/transformer",
         "--out", tmp_path / "some", ranks=2)
    same(whole, tmp_path / "some")


def test_nothing_is_sampled_or_scored_twice(whole, monkeypatch, capsys):
    times = {p: p.stat().st_mtime_ns for p in whole.rglob("*.[pj][ns]*") if p.parent != whole}
    monkeypatch.setattr(flow, "load", lambda *_: 1 / 0)
    for metric in ("judge", "reward", "statistics"):
        monkeypatch.setattr(f"evaluation.metrics.{metric}.load", lambda *_: 1 / 0)
    assert run(monkeypatch, *SMALL, "--weights", "again=miniature/transformer", "--out", whole) == 0
    after = {p: p.stat().st_mtime_ns for p in times}
    assert all(times[p] == after[p] for p in times if p.suffix == ".png")
    assert (whole / "table.md").read_text() in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_what_is_there_stays(monkeypatch, capsys, tmp_path):
    write = picture_folders.write_whole

    def full(path, content):
        if "00009" in str(path):
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(picture_folders, "write_whole", full)
    assert run(monkeypatch, *SMALL, "--out", tmp_path) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.py:")]
    assert len(said) == 1 and "No space left on device; run it again to go on" in said[0]
    assert len(list(tmp_path.glob("base/*.png"))) == 9


def test_pictures_made_otherwise_are_not_mixed(whole, monkeypatch, capsys, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert "made with other seed 0, now 1; delete that folder" in one_line(
        monkeypatch, capsys, *SMALL, "--out", tmp_path, "--seed", 1)
    (tmp_path / "p.txt").write_text("a red circle\n")
    assert "made with other prompts; delete" in one_line(
        monkeypatch, capsys, *SMALL, "--out", tmp_path, "--prompts", tmp_path / "p.txt")
    shutil.copytree("miniature/transformer", tmp_path / "w")
    os.utime(tmp_path / "w" / "diffusion_pytorch_model.safetensors")
    assert "made with other weights; delete" in one_line(
        monkeypatch, capsys, *SMALL, "--out", tmp_path, "--weights", f"again={tmp_path / 'w'}")


def mine(*names):
    """What puts a user's files into a folder."""
    def put(out):
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).unlink(missing_ok=True)
            (out / name).write_text("mine")
    return put


def linked(name):
    """What puts a link to a user's folder into a folder."""
    def put(out):
        shutil.rmtree(out / name, ignore_errors=True)
        mine("thesis/00000.png")(out)
        (out / name).symlink_to("thesis")
    return put


NOT_FROM = "is there, and not from "
FOREIGN = {  # what is in --out: (whether beside evaluate.py's own, what puts it there, what is said)
    "a table": (False, mine("table.md"), "table.md " + NOT_FROM + "evaluate.py"),
    "results beside a folder base": (False, mine("results.json", "base/00000.png"), "base " + NOT_FROM),
    "another's mark": (False, mine("made.json"), "made.json: not JSON"),
    "a folder with a row's name": (False, mine("again/notes.txt"), "again " + NOT_FROM),
    "pictures in base": (True, mine("base/00003.png"), "base/00003.png " + NOT_FROM),
    "another's made.json in base": (True, mine("base/made.json"), "base/made.json: not JSON"),
    "base, a link": (True, linked("base"), "base: is a link, which is not followed"),
    "scores, a link": (True, linked("scores"), "scores: is a link"),
    "a link among the scores": (True, linked("scores/base"), "scores/base: is a link"),
    "a link to nothing": (True, lambda out: [(out / "table.md").unlink(), (out / "table.md").symlink_to("gone")],
                          "table.md: is a link")}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_evaluate_did_not_make_stays_and_is_not_scored(whole, monkeypatch, capsys, tmp_path, name):
    beside, put, words = FOREIGN[name]
    if beside:
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    put(tmp_path)
    before = everything(tmp_path)
    assert words in one_line(monkeypatch, capsys, *SMALL, "--weights", "again=miniature/transformer", "--out", tmp_path)
    assert everything(tmp_path) == before


def test_what_a_kill_left_goes_and_a_users_hidden_file_stays(whole, monkeypatch, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    mine("base/.00003.png.4711", ".table.md.4711", "base/.mine.png")(tmp_path)
    assert run(monkeypatch, *SMALL, "--weights", "again=miniature/transformer", "--out", tmp_path) == 0
    assert [path.name for path in tmp_path.rglob(".*")] == [".mine.png"]


def everything(folder):
    """{path: content} of all that is in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


SAMPLES = {  # a further command line, or what is put into --out: what is said; None: it goes on
    "the same": ([], None, None), "other prompts": (["a fox"], None, "made with other prompts"),
    "another seed": (["--seed", "1"], None, "made with other seed 0, now 1"),
    "other weights": (["--weights", "miniature/transformer"], None, "made with other weights"),
    "a user's picture": ([], mine("00001.png"), "00001.png " + NOT_FROM + "sample.py"),
    "a user's grid": ([], mine("grid.png"), "grid.png " + NOT_FROM),
    "a broken note": ([], mine("made.json"), "not JSON"),
    "a note of another shape": ([], lambda out: (out / "made.json").write_text('{"by": "sample.py", "prompts": 3}'),
                                "made with other prompts"),
    "a list": ([], lambda out: (out / "made.json").write_text("[]"), "made.json: not sample.py's"),
    "a link": ([], lambda out: [(out / "00002.png").unlink(), (out / "00002.png").symlink_to("00001.png")],
               "00002.png: is a link"),
    "a link to nothing": ([], lambda out: [(out / "prompts.json").unlink(), (out / "prompts.json").symlink_to("gone")],
                          "prompts.json: is a link"),
    "a user's prompts": ([], lambda out: (out / "prompts.json").write_text('[{"prompt": "mine"}]'),
                         "prompts.json: is not sample.py's"),
    "one gone": ([], lambda out: (out / "00001.png").unlink(), None),
    "one cut": ([], lambda out: (out / "00001.png").write_bytes((out / "00001.png").read_bytes()[:-9]), None)}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """What a command line of sample.py leaves."""
    out = tmp_path_factory.mktemp("sampled") / "s"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert samples(monkeypatch, out) == 0
    return out


def samples(monkeypatch, out, *more):
    """sample.py of three prompts, or of other arguments, in this process; its exit status."""
    prompts = [] if more and not more[0].startswith("--") else ["a red circle", "a blue square", "a green circle"]
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", "miniature", "--eval-steps", "1", "--out", str(out),
                                      *prompts, *more])
    try:
        sample.main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("name", SAMPLES)
def test_what_another_command_line_made_is_never_removed_or_mixed(sampled, monkeypatch, capsys, tmp_path, name):
    argv, put, words = SAMPLES[name]
    out = tmp_path / "s"
    shutil.copytree(sampled, out)
    if put is not None:
        put(out)
    before = everything(out)
    status = samples(monkeypatch, out, *argv)
    if words is None:
        assert status == 0 and sorted(everything(out).values()) == sorted(everything(sampled).values())
    else:
        said = capsys.readouterr().err.strip()
        assert status == 2 and "\n" not in said and words in said, said
        assert everything(out) == before


def test_a_picture_cut_short_is_sampled_again(whole, monkeypatch, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    picture = tmp_path / "base" / "00003.png"
    picture.write_bytes(picture.read_bytes()[:-20])
    (tmp_path / "base" / "00004.png").write_bytes(b"")
    assert run(monkeypatch, *SMALL, "--weights", "again=miniature/transformer", "--out", tmp_path) == 0
    same(whole, tmp_path)


def test_a_bad_line_of_scores_loses_that_line_only(whole, monkeypatch, tmp_path):
    """Cut off, empty, not UTF-8, not JSON, or JSON of another sort: that picture alone is scored again."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "scores" / "base" / "reward.0.jsonl"
    lines = file.read_bytes().split(b"\n")
    bad = [b"", b"3", b"[]", b"null", b'{"key": "a"}', b"\xff\xfe", b'{"key": [], "scores":', b"[" * 100_000,
           b'{"key": {}, "scores": {"reward": 1, "sgp": 1}}', b'{"key": "a", "scores": {"reward": 1}}']
    lost = lines[5:5 + len(bad)]
    lines[5:5 + len(bad)] = bad
    file.write_bytes(b"\n".join(lines))
    assert run(monkeypatch, *SMALL, "--weights", "again=miniature/transformer", "--out", tmp_path) == 0
    same(whole, tmp_path)
    assert file.read_bytes().split(b"\n")[40:-1] == lost


def test_what_is_no_file_is_refused_before_anything_is_sampled(whole, monkeypatch, capsys, tmp_path):
    """A pipe would be read for ever, and so would a device."""
    for name in ("own", "others"):
        shutil.copytree(whole / "base", tmp_path / name / "base")
        shutil.copy(whole / "made.json", tmp_path / name)
    os.remove(tmp_path / "own" / "base" / "00039.png")
    os.mkfifo(tmp_path / "own" / "base" / "00039.png")
    (tmp_path / "others" / "base" / "00040.png").symlink_to("/dev/zero")
    monkeypatch.setattr(flow, "load", lambda *_: 1 / 0)
    assert "00039.png: not a file" in one_line(monkeypatch, capsys, *SMALL, "--out", tmp_path / "own")
    said = one_line(monkeypatch, capsys, "--images", tmp_path / "others" / "base", "--out", tmp_path / "o",
                    "--metrics", "statistics")
    assert said.endswith("00040.png: not a file")


def test_the_first_of_each_category_of_many_prompts():
    """80,000 prompts in four categories, in a second: each is looked at once."""
    categories = [f"c{i % 4}" for i in range(80_000)]
    start = time.perf_counter()
    assert picture_folders.first_of_each(categories, 2) == list(range(8))
    assert picture_folders.first_of_each(categories, None) == list(range(80_000))
    assert picture_folders.first_of_each(categories, 15_000) == list(range(60_000))
    assert time.perf_counter() - start < 1


def test_a_metric_is_one_file_that_nothing_else_names(whole, monkeypatch, capsys, tmp_path):
    """It is found by its name, and its columns are in the table, after Table 1's."""
    (tmp_path / "sidelong.py").write_text("""
from rewards.base import Column

COLUMNS = {"width": Column("Width", ".1f"), "wide": Column("Is wide", ".0%")}

def fetch(where=None):
    return None

def load(files, args, device):
    return score

def score(pictures, prompts):
    return {"width": [p.width for p in pictures], "wide": [p.width > p.height for p in pictures]}
""")
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    assert "sidelong" in metrics.names() and list(metrics.find("sidelong").COLUMNS) == ["width", "wide"]
    assert run(monkeypatch, "--images", f"a={whole / 'base'}", "--out", tmp_path / "out",
               "--metrics", "sidelong,statistics,hpsv2.1=miniature/reward") == 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    cells = [[word.strip() for word in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [line[0] for line in cells[2:12]] == [
        "HPS", "SGP-HPS, raw", "SGP-HPS, authors' scale", "Width", "Is wide", "saturation", "redness", "brightness",
        "texture", ""]
    assert cells[5][1:] == ["64.0 ± 0.0", "40"] and cells[6][1] == "0 ± 0 %"


@pytest.mark.slow
def test_a_metrics_libraries_are_imported_when_it_is_asked_for():
    """So `evaluate.py -h`, and a flag that is refused, need no more than torch and diffusers."""
    look = ("import sys, evaluate; evaluate.flags(); "
            "print([m for m in sys.modules if m.startswith(('open_clip', 'timm', 'transformers.models.'))])")
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ----------------------------------------------------------------------------------------- pictures of others
def test_names_with_control_characters_are_shown_not_obeyed(whole, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "red\x1b[31m|x"
    shutil.copytree(whole / "base", folder)
    (folder / "00001.png").write_bytes(b"")
    os.remove(folder / "00002.png")
    assert run(monkeypatch, "--images", folder, "--metrics", "statistics", "--out", folder / "out") == 1
    said = capsys.readouterr()
    assert "\x1b[31m" not in said.out + said.err
    assert r"red\x1b[31m\|x |" in said.out and r"red\x1b[31m|x/00001.png: cannot be read" in said.err


def test_pictures_that_exist_are_scored_and_a_changed_one_again(whole, monkeypatch, tmp_path, capsys):
    argv = ["--images", f"a={whole / 'base'}", f"b={tmp_path / 'b'}", "--out", tmp_path / "out",
            "--metrics", "reward,statistics,judge=miniature,frechet", "--reward", "miniature/reward",
            "--control", "realistic photo", "--neg", "CG render"]
    shutil.copytree(whole / "base", tmp_path / "b")
    os.remove(tmp_path / "b" / "00007.png")
    assert run(monkeypatch, *argv) == 0
    assert "b: 217 of 256 pictures are not there" in capsys.readouterr().out
    found = rows(tmp_path / "out")
    assert found["a"]["overall"] == rows(whole)["base"]["overall"]
    assert found["b"]["overall"]["reward"]["n"] == 39 == found["b"]["difference"]["reward"]["n"]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "b" / "00003.png")
    assert run(monkeypatch, *argv) == 0
    assert rows(tmp_path / "out")["b"]["difference"]["redness"]["mean"] > 0.02


def test_a_picture_that_cannot_be_read_is_named_counted_and_left_out(whole, monkeypatch, capsys, tmp_path):
    shutil.copytree(whole / "base", tmp_path / "a")
    (tmp_path / "a" / "00001.png").write_bytes((tmp_path / "a" / "00001.png").read_bytes()[:200])
    (tmp_path / "a" / "00002.png").write_bytes(b"")
    (tmp_path / "a" / "00005.png").write_text("not a picture")
    argv = ["--images", tmp_path / "a", "--out", tmp_path / "out", "--metrics", "statistics"]
    for _ in range(2):  # and it stays so when the other scores are known
        assert run(monkeypatch, *argv) == 1
        said = capsys.readouterr()
        [line] = [line for line in said.err.splitlines() if line.startswith("evaluate.py: ")]
        assert "3 pictures could not be read; means are over the others: " in line
        assert "00001.png: cannot be read as a picture: " in line
        others = [line for line in said.out.splitlines() if line.endswith("; left out")]
        for number, line in zip((2, 5), others, strict=True):
            assert f"0000{number}.png: cannot be read as a picture" in line
        row = rows(tmp_path / "out")[str(tmp_path / "a")]
        assert row["overall"]["redness"]["n"] == 37


def test_names_need_no_zeros_and_other_weights_of_a_scorer_are_noticed(whole, monkeypatch, tmp_path):
    """0.png is picture 00000; a scorer replaced at the same path scores again."""
    (tmp_path / "a=b").mkdir()
    for i in range(2):
        shutil.copy(whole / "base" / f"{i:05d}.png", tmp_path / "a=b" / f"{i}.PNG")
    shutil.copy(whole / "base" / "prompts.json", tmp_path / "a=b")
    means = []
    for reward in ("reward", "reward_unbiased"):
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        shutil.copytree(f"miniature/{reward}", tmp_path / "r")
        assert run(monkeypatch, "--images", tmp_path / "a=b", "--out", tmp_path / "out",
                   "--metrics", "reward", "--reward", tmp_path / "r") == 0
        means.append(next(iter(rows(tmp_path / "out").values()))["overall"]["reward"])
    assert means[0]["n"] == means[1]["n"] == 2 and means[0]["mean"] != means[1]["mean"]


@pytest.mark.parametrize("case, words", [
    ("numbers", r"prompts.json: must be a list of"), ("two", "0.jpg: a second picture of prompt 0|"
                                                      "00000.png: a second picture of prompt 0"),
    ("differ", "the prompts of .*b and .*a differ, first at number 3"), ("none", "b: no such folder"),
    ("empty", "b: no pictures 00000.png"), ("many", "picture 40, but there are 40 prompts"),
    ("list", r"prompts.json: must be a list of \{\"prompt\""), ("twice", "a name is used twice"),
    ("both", "--prompts p.txt: .*a has its own, in prompts.json")])
def test_folders_that_do_not_fit(whole, monkeypatch, capsys, tmp_path, case, words):
    a, b = tmp_path / "a", tmp_path / "b"
    prompts = [{"prompt": f"p{i}", "category": ""} for i in range(40)]
    for folder in (a, b):
        folder.mkdir()
        shutil.copy(whole / "base" / "00000.png", folder)
        (folder / "prompts.json").write_text(json.dumps(prompts))
    if case == "differ":
        prompts[3]["prompt"] = "another"
        (b / "prompts.json").write_text(json.dumps(prompts))
    elif case == "numbers":
        (b / "prompts.json").write_text(json.dumps([{"prompt": i} for i in range(40)]))
    elif case == "two":
        shutil.copy(b / "00000.png", b / "0.jpg")
    elif case == "list":
        (b / "prompts.json").write_text('["a"]')
    elif case == "many":
        shutil.copy(b / "00000.png", b / "00040.png")
    elif case in ("empty", "none"):
        shutil.rmtree(b)
        if case == "empty":
            b.mkdir()
    names = {"twice": [f"x={a}", f"x={b}"], "both": [a, b, "--prompts", "p.txt"]}.get(case, [a, b])
    said = one_line(monkeypatch, capsys, "--metrics", "statistics", "--out", tmp_path / "o",
                    "--images", *names)
    assert re.search(words, said), said


@pytest.mark.parametrize("argv, words", [
    (["--metrics", "fid"], "--metrics fid: not a metric; there are aesthetic, clip, deqa, diversity, "
     "frechet, geneval, hpsv2.1"),
    (["--metrics", "hpsv2.1=nowhere"], "none can be had, give NAME=PATH: nowhere: no such file or folder"),
    (["--weights", "base=miniature/transformer"], "a name is used twice, or taken"),
    (["--weights", "a b=miniature/transformer", "a_b=miniature/transformer"], "a name is used twice"),
    (["--weights", "nowhere"], "--weights 'nowhere': no transformer there: no such file or folder"),
    (["--metrics", "reward", "--reward", "miniature/none"], "give NAME=PATH: miniature/none: no such file"),
    (["--metrics", "reward", "--reward", "hpsv2.1:x"], "hpsv2.1:x: give NAME, NAME=PATH"),
    (["--weights", ""], '--weights "": not a name for a folder; give NAME=PATH'),
    (["--weights", "..=miniature/transformer"], "not a name for a folder; give NAME=PATH"),
    (["--weights", "scores=miniature/transformer"], "a name is used twice, or taken"),
    (["--weights", "results.json=miniature/transformer"], "a name is used twice, or taken"),
    (["--weights", "table.md=miniature/transformer"], "a name is used twice, or taken"),
    (["--weights", "sheet.png=miniature/transformer"], "a name is used twice, or taken"),
    (["--weights", "w=miniature/transformer", "--images", "miniature"], "--images and --weights"),
    (["--batch", "0"], "--batch 0: must be a whole number, at least 1"),
    (["--guidance", "nan"], "--guidance nan: must be a finite number"),
    (["--first", "1e3"], "--first 1e3: must be a whole number")], ids=str)
def test_one_line_and_status_2(monkeypatch, capsys, tmp_path, argv, words):
    assert words in one_line(monkeypatch, capsys, *SMALL, "--out", tmp_path, *argv)
    assert not list(tmp_path.rglob("*.png"))


# -------------------------------------------------------------------------------------------- all of Table 1
def test_with_no_path_given_every_scorer_is_asked_of_the_hub_by_its_authors_name(monkeypatch, tmp_path):
    asked = []
    for name in ("ImageReward.pt", "a.safetensors", "model.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.setattr("engine.hub.snapshot_download",
                        lambda at, allow_patterns: asked.append(at) or tmp_path)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda at, **_: asked.append(at.split("/")[4]))
    monkeypatch.setattr(geneval, "metadata_file", lambda where: asked.append(geneval.URL.split("/")[4]))
    monkeypatch.setattr(geneval.open_clip, "download_pretrained", lambda c: asked.append(c["hf_hub"]) or "x")
    args = evaluate.flags().parse_args([])
    for name in metrics.parse_metrics(args.metrics):
        metrics.fetch(metrics.find(name), None, args)
    assert asked == ["google/siglip-so400m-patch14-384", "aesthetic-predictor-v2-5",
                     "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
                     "THUDM/ImageReward", "google-bert/bert-base-uncased", "xswu/HPSv2", "geneval",
                     "facebook/mask2former-swin-small-coco-instance",
                     "timm/vit_large_patch14_clip_224.openai/",
                     "zhiyuanyou/DeQA-Score-Mix3"]


@pytest.mark.slow
def test_every_column_of_table_1_from_a_benchmark_in_four_categories(monkeypatch, capsys, tmp_path):
    """Each scorer from a folder in its real layout, tiny and random; GenEval on pictures of its own; a scorer
    whose files are damaged is a dash with its reason, never a number."""
    files = {}
    for name, make in (("aesthetic", make_aesthetic), ("pickscore", make_pickscore),
                       ("imagereward", make_imagereward), ("geneval", make_geneval), ("deqa", make_deqa)):
        (tmp_path / name).mkdir()
        files[name] = make(tmp_path / name)
    files["hpsv2.1"] = "miniature/reward"
    few = [e for e in geneval_metadata() for tag in geneval.TASKS if e["tag"] == tag][::20]
    monkeypatch.setattr(geneval, "TASKS", {tag: sum(e["tag"] == tag for e in few) for tag in geneval.TASKS})
    monkeypatch.setattr(geneval, "SHORT", 64)
    write_lines(files["geneval"] / geneval.METADATA, few)
    prompts = prompt_files.read_prompts("miniature/prompts_eval.txt")
    (tmp_path / "benchmark").mkdir()
    for i, category in enumerate(("anime", "concept-art", "paintings", "photo")):
        (tmp_path / "benchmark" / f"{category}.json").write_text(json.dumps(prompts[5 * i:5 * i + 5]))
    argv = ["--model", "miniature", "--eval-steps", 1, "--first", 2, "--prompts", tmp_path / "benchmark",
            "--out", tmp_path / "out", "--control", "Realistic photo", "--neg", "CG Render", "--metrics",
            ",".join(f"{k}={v}" for k, v in files.items())]
    assert run(monkeypatch, *argv) == 0
    assert sorted(p.stem for p in (tmp_path / "out" / "base").glob("0*.png")) == [
        f"{5 * c + i:05d}" for c in range(4) for i in range(2)]
    assert len(list((tmp_path / "out" / "base" / "geneval").glob("*.png"))) == 6 * 2 * 4
    row = rows(tmp_path / "out")["base"]
    for column in ("aesthetic", "pickscore", "imagereward", "hps", "sgp_hps_shown", "geneval", "deqa"):
        assert column in tables.ORDER
        assert row["overall"][column]["n"] == (48 if column == "geneval" else 8), column
    assert row["categories"]["anime"]["deqa"]["n"] == 2 and row["categories"]["colors"]["geneval"]["n"] == 8
    table = (tmp_path / "out" / "table.md").read_text()
    assert "anime:" in table and "Table 1 of the paper:" in table and "position:" in table
    (files["deqa"] / "config.json").write_text("{}")
    os.remove(tmp_path / "out" / "scores" / "base" / "deqa.0.jsonl")
    capsys.readouterr()
    assert run(monkeypatch, *argv) == 0
    said = capsys.readouterr().out
    assert re.search(r"deqa: - \(.*cannot be loaded as DeQA-Score", said)
    base = next(line for line in said.splitlines() if line.startswith("| DeQA"))
    assert base.split("|")[2].strip() == "-" and "deqa" not in rows(tmp_path / "out")["base"]["overall"]


# ------------------------------------------------------------------------------------------------- diversity
def test_diversity_is_the_distance_of_a_prompts_pictures(monkeypatch):
    """1 - cosine, the mean over all others of the prompt; of copies 0, of a picture that is alone NaN."""
    class Network:
        def picture_features(self, images):
            return torch.tensor(images)

    score = diversity.Scorer([(Network(), 1)])
    pictures = [[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 0.0], [5.0, 0.0], [1.0, 1.0]]
    told = score(pictures, ["a", "a", "a", "b", "b", "c"])["diversity"]
    half = 1 - 0.5**0.5
    assert told[:5].tolist() == pytest.approx([(1 + half) / 2, (1 + half) / 2, half, 0, 0], abs=1e-6)
    assert told[5].isnan()


def test_per_prompt_samples_pictures_for_diversity_alone(tmp_path, monkeypatch):
    """The benchmark's picture of a prompt and three more, in a subfolder, from seeds that no other picture has; the
    table has the column, and no picture is sampled twice."""
    out = tmp_path / "out"
    argv = ["--model", "miniature", "--first", "8", "--metrics", "statistics", "--per-prompt", "4",
            "--eval-steps", "2", "--out", str(out)]
    assert evaluate.run(argv) == 0
    row = json.loads((out / "results.json").read_text())["rows"]["base"]["overall"]
    assert row["diversity"]["n"] == 32 and 0 < row["diversity"]["mean"] < 1 and row["redness"]["n"] == 8
    files = [*(out / "base").glob("*.png"), *(out / "base" / "diversity").glob("*.png")]
    assert len(files) == 32 == len({file.read_bytes() for file in files})
    lines = [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]
    assert len(lines) == 32 and sum("redness" in line for line in lines) == 8
    assert sum(line["redness"] for line in lines if "redness" in line) / 8 == pytest.approx(row["redness"]["mean"])
    args = evaluate.flags().parse_args(["--per-prompt", "4"])
    pictures = diversity.pictures(None, args, picture_folders.benchmark([("a", ""), ("b", "")], 0, None))
    assert len({picture.seed for picture in pictures}) == 8


def test_a_prefixed_base_is_sampled_with_the_words_and_scored_without(tmp_path):
    """Its pictures are those of the longer prompts; its alignment is asked of the bare ones."""
    out = tmp_path / "out"
    common = ["--model", "miniature", "--first", "4", "--metrics", "judge", "--eval-steps", "4"]
    assert evaluate.run([*common, "--prefix", "realistic photo", "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert list(rows) == ["base", picture_folders.PREFIXED] and rows[picture_folders.PREFIXED]["overall"]
    lines = [f"realistic photo. {prompt.text}" for prompt in prompt_files.read_prompts_by_category(
        "miniature/prompts_eval.txt")[:4]]
    (tmp_path / "longer.txt").write_text("\n".join(lines))
    argv = [*common, "--prompts", str(tmp_path / "longer.txt"), "--out", str(tmp_path / "longer")]
    assert evaluate.run(argv) == 0
    for i in range(4):
        folders = (out / "base_with_the_words", tmp_path / "longer" / "base", out / "base")
        prefixed, longer, bare = (read_picture(folder / f"{i:05d}.png").tobytes() for folder in folders)
        assert prefixed == longer != bare


def test_the_judge_names_the_size_that_it_takes(tmp_path, capsys):
    argv = ["--model", "miniature", "--first", "1", "--eval-steps", "1", "--size", "32", "--out", str(tmp_path)]
    assert evaluate.run([*argv, "--metrics", "judge,statistics"]) == 0
    said = capsys.readouterr().out
    assert "judge: no scores (it takes pictures of 64 x 64 pixels only, and one has 32 x 32; it can be left out" in said


def test_two_metrics_with_one_column_are_refused(monkeypatch):
    monkeypatch.setattr(diversity, "COLUMNS", {"redness": statistics.COLUMNS["redness"]})
    with pytest.raises(UserError, match="--metrics statistics,diversity: both have a column 'redness'"):
        metrics.all_shown(["statistics", "diversity"])
