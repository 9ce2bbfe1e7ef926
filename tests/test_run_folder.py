"""Claims about the folder of a run: nothing of its user is removed or mixed, an interrupted run goes on to
the same end, and no damaged or foreign checkpoint is trained on."""

import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from scripts import call
from test_train import SMALL, log_of

import flow
import prepare
import train
from engine import stopping
from engine.errors import Stopped, UserError, frame
from engine.files import write_whole
from engine.memory import parallel
from engine.model import export, lora
from engine.model.folder import Model
from engine.run import checkpoint, contents
from engine.run import folder as run_folder
from engine.run.folder import RunFolder
from evaluation import watch
from evaluation.picture_folders import save_grid

SHARD = "shard-00001-model-00001-of-00001.safetensors"
ARGS = {"seed": 0, "steps": 200_000, "keep": 2, "resume": False, "overwrite": False}


# ---------------------------------------------------------------------------------- what is in the folder
def write(out, *names, text="mine"):
    """Files in a folder, with a text each."""
    for name in names:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def nothing(out):
    pass


def empty(out):
    out.mkdir()


def a_file(out):
    out.write_text("mine")


def holding(*names, text="mine"):
    """What builds a folder with these files."""
    def build(out):
        write(out, *names, text=text)
    return build


def a_checkpoint(out, step, run="r1", images=2):
    """What stands for a checkpoint where nobody loads its weights."""
    folder = out / "checkpoints" / f"step_{step:05d}"
    state = json.dumps({"run": run, "step": step, "images": images, "unlogged": None})
    write(folder, "state.json", text=state)
    write(folder, "checksums.json", text=json.dumps({"state.json": checkpoint.digest(folder / "state.json")}))
    write(folder, SHARD)


def a_run(out, steps=(1, 2)):
    """What stands for a run that was killed after some checkpoints."""
    write(out, "run.json", text='{"run": "r1"}')
    write(out, "args.json", text=json.dumps(ARGS))
    write(out, "log.jsonl", "samples/step_00000.png", "weights/config.json",
          "weights/diffusion_pytorch_model.safetensors")
    for step in steps:
        a_checkpoint(out, step)


def killed_after(*steps):
    """What builds the folder of a run with checkpoints of these steps."""
    def build(out):
        a_run(out, steps)
    return build


def a_checkpoint_alone(out):
    a_checkpoint(out, 1)


USERS = ("thesis.tex", "samples/notes.txt", "samples/step_1.txt", "samples/step_final.png", "weights/mine.safetensors",
         "weights_best/README.md", "checkpoints/notes.txt", "checkpoints/.mine/x", "data/log.jsonl")


def a_run_with_a_users_files(out):
    a_run(out)
    write(out, *USERS)


def a_run_in_a_link(out):
    a_run(out.with_name("elsewhere"))
    out.symlink_to(out.with_name("elsewhere"))


def a_run_with(*names):
    """What builds a run's folder with these files of a user."""
    def build(out):
        a_run(out)
        write(out, *names)
    return build


def explained(out):
    out.mkdir(exist_ok=True)
    save_grid(torch.zeros(1, 3, 8, 8), out / "explain.png")  # any PNG of this project carries its mark


def explained_run(out):
    a_run(out)
    explained(out)


def linked_to(target, name, copy=False):
    """What builds a run's folder in which `name` is a link to `target` beside it, or with `copy` a file."""
    def build(out):
        a_run(out, steps=())
        write(out.with_name("elsewhere"), "step_00000.png", "config.json")
        write(out.parent, "thesis.tex")
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if copy:
            path.write_text("mine")
        else:
            path.symlink_to(out.with_name(target))
    return build


def a_pipe(name):
    """What builds a folder in which `name` is a pipe."""
    def build(out):
        out.mkdir()
        os.mkfifo(out / name)
    return build


def a_run_with_anothers_checkpoint(out):
    a_run(out)
    a_checkpoint(out, 7, run="r2")


def a_run_with_a_copy(out):
    a_run(out)
    shutil.copytree(out / "checkpoints" / "step_00002", out / "checkpoints" / "step_00004.bak")


def a_run_half_killed(out):
    a_run(out)
    write(out, ".args.json.4711", "weights/.diffusion_pytorch_model.safetensors.4711",
          f"checkpoints/.writing/{SHARD}", "checkpoints/.discarded_step_00001/state.json")


class Case(NamedTuple):
    """A folder, flags, and what comes of them: words (of a refusal; then everything stays), the checkpoint to
    go on from, and where a run may start what stays and what goes."""
    build: object
    flags: str = ""
    words: str = None
    newest: str = None
    stays: tuple = ()
    goes: tuple = ()
    args: dict = {}  # further flags; paths in the folder


ALREADY = "already holds a run; --resume continues it, --overwrite deletes it"
LINK = "is a link, which is not followed"
NOT_A_RUN = "is not a run's folder, and not empty: it holds "
MADE = ("log.jsonl", "weights/config.json", "checkpoints/step_00001", "checkpoints/step_00002")
CASES = {
    "nothing": Case(nothing),
    "nothing, --resume": Case(nothing, "resume"),
    "an empty folder": Case(empty),
    "an empty folder, --resume": Case(empty, "resume"),
    "--explain's picture": Case(explained, stays=("explain.png",)),
    "a user's explain.png": Case(holding("explain.png"), words=NOT_A_RUN + "explain.png"),
    "a run and a user's explain.png, --overwrite": Case(a_run_with("explain.png"), "overwrite", goes=MADE,
                                                        stays=("explain.png",)),
    "a run and --explain's picture, --overwrite": Case(explained_run, "overwrite", goes=("explain.png",)),
    "a cache that a killed run has begun": Case(holding("cache/x"), flags="resume", args={"cache": "cache"},
                                                stays=("cache/x",)),
    "a mark that is a pipe": Case(a_pipe("run.json"), words="run.json: not a file"),
    "a lock that is a pipe": Case(a_pipe(".lock"), words=".lock: not a file"),
    "a lock that is a link": Case(linked_to("thesis.tex", ".lock"), words=LINK),
    "a log that is a link": Case(linked_to("thesis.tex", "log.jsonl"), "resume", words=LINK),
    "checkpoints that are a link": Case(linked_to("elsewhere", "checkpoints"), "resume", words=LINK),
    "a file where a checkpoint is written": Case(a_run_with("checkpoints/.writing"), "resume", "not a folder; remove"),
    "weights that are a file": Case(linked_to("elsewhere", "weights", copy=True), "overwrite", "not a folder; remove"),
    "weights that are a link": Case(linked_to("elsewhere", "weights"), "overwrite", words=LINK),
    "a mark half written": Case(holding(".lock", ".run.json.31"), goes=(".run.json.31",)),
    "a file": Case(a_file, words="cannot be written: Not a directory"),
    "a thesis": Case(holding("thesis.tex"), words=NOT_A_RUN + "thesis.tex"),
    "a thesis, --resume": Case(holding("thesis.tex"), "resume", NOT_A_RUN + "thesis.tex"),
    "a thesis, --overwrite": Case(holding("thesis.tex"), "overwrite", NOT_A_RUN + "thesis.tex"),
    "args.json and a thesis, --overwrite": Case(
        holding("args.json", "log.jsonl", "thesis.tex"), "overwrite", NOT_A_RUN + "args.json"),
    "checkpoints without a mark": Case(a_checkpoint_alone, "resume", NOT_A_RUN + "checkpoints"),
    "a broken mark": Case(holding("run.json", text="{"), "overwrite", "run.json: not JSON"),
    "another mark": Case(holding("run.json", text="[1]"), "resume", "damaged, it has no run's id"),
    "a run": Case(a_run, words=ALREADY),
    "a run, --resume": Case(a_run, "resume", newest="step_00002", stays=MADE),
    "a run, --overwrite": Case(a_run, "overwrite", goes=(*MADE, "weights", "checkpoints")),
    "a marked run without a checkpoint": Case(killed_after(), "resume", goes=("log.jsonl",)),
    "nothing but the mark": Case(holding("run.json", text='{"run": "r1"}'), "resume"),
    "order past step 99999": Case(killed_after(99_998, 99_999, 100_000), "resume",
                                  newest="step_100000"),
    "a copy called .bak": Case(a_run_with_a_copy, "resume", newest="step_00002",
                               stays=("checkpoints/step_00004.bak/state.json",)),
    "a copy called .bak, --overwrite": Case(a_run_with_a_copy, "overwrite", goes=MADE,
                                            stays=("checkpoints/step_00004.bak/state.json",)),
    "another run's checkpoint": Case(a_run_with_anothers_checkpoint, "resume", "is another run's checkpoint"),
    "another run's checkpoint, --overwrite": Case(a_run_with_anothers_checkpoint, "overwrite",
                                                  "is another run's checkpoint"),
    "a user's files": Case(a_run_with_a_users_files, "resume", newest="step_00002", stays=USERS),
    "a user's files, --overwrite": Case(a_run_with_a_users_files, "overwrite", stays=USERS, goes=MADE),
    "a link, --overwrite": Case(a_run_in_a_link, "overwrite", goes=MADE, stays=("../elsewhere", "run.json")),
    "linked samples": Case(linked_to("elsewhere", "samples"), "resume", words=LINK),
    "linked samples, --overwrite": Case(linked_to("elsewhere", "samples"), "overwrite", words=LINK),
    "a folder where the log is": Case(holding("log.jsonl/mine", "run.json", text='{"run": "r1"}'), "resume",
                                      "log.jsonl: not a file; remove it, or give another --out"),
    "what a kill left": Case(a_run_half_killed, "resume", newest="step_00002", goes=(
        ".args.json.4711", "weights/.diffusion_pytorch_model.safetensors.4711", "checkpoints/.writing",
        "checkpoints/.discarded_step_00001")),
}


def opened(folder):
    """A `RunFolder` that a run writes to."""
    folder.take()
    folder.open()
    return folder


def everything(folder):
    """{path: content} of all that is in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_what_a_run_may_do_in_a_folder(tmp_path, name):
    case = CASES[name]
    out = tmp_path / "run"
    case.build(out)
    before = everything(tmp_path)
    args = ARGS | {flag: True for flag in case.flags.split()}
    args |= {name: str(out / value) for name, value in case.args.items()}
    if case.words is not None:
        with pytest.raises(UserError) as refusal:
            RunFolder(out, args)
        assert case.words in str(refusal.value) and "\n" not in str(refusal.value)
        assert everything(tmp_path) == before
        return
    folder = RunFolder(out, args)
    assert everything(tmp_path) == before  # nothing before all is loaded
    folder.take()
    folder.open()
    assert [c.name for c in folder.checkpoints[-1:]] == [case.newest] * (case.newest is not None)
    assert run_folder.run_in(out) == folder.id and json.loads((out / "args.json").read_text()) == args
    assert (folder.id == "r1") == ("resume" in case.flags and out / "run.json" in before)
    for kept in case.stays:
        assert (out / kept).exists(), kept
        if (out / kept).is_file() and kept in USERS:
            assert (out / kept).read_text() == "mine"
    for gone in case.goes:
        assert not (out / gone).exists(), gone


def test_a_run_is_not_resumed_for_less_than_it_has(tmp_path):
    a_run(tmp_path)
    with pytest.raises(UserError, match="is past it, at step_00002; give more steps"):
        RunFolder(tmp_path, ARGS | {"resume": True, "steps": 1})


@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_the_folder_that_one_stands_in(tmp_path, monkeypatch, out):
    here = tmp_path / "here"
    write(here, "paper.tex")
    monkeypatch.chdir(here)
    for flag in ("resume", "overwrite"):
        with pytest.raises(UserError, match="is not a run's folder, and not empty"):
            RunFolder(out, ARGS | {flag: True})
    assert (here / "paper.tex").exists()


def test_a_file_in_a_checkpoint_is_kept_when_that_goes(tmp_path):
    a_run(tmp_path)
    write(tmp_path / "checkpoints" / "step_00001", "notes.txt")
    opened(RunFolder(tmp_path, ARGS | {"overwrite": True}))
    kept = tmp_path / "checkpoints" / "step_00001.1.kept"
    assert os.listdir(tmp_path / "checkpoints") == [kept.name] and os.listdir(kept) == ["notes.txt"]


@pytest.mark.parametrize("flag", ["", "resume", "overwrite"])
def test_one_run_a_folder(tmp_path, flag):
    """The second start says so before it loads anything; and once more before it writes, of a run that came
    and went meanwhile. The lock goes with its process."""
    a_run(tmp_path)
    args = ARGS | {flag: True}
    early = RunFolder(tmp_path, args) if flag else None
    with open(tmp_path / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training there"):
            RunFolder(tmp_path, args)
        if early is not None:
            with pytest.raises(UserError, match="another process is training there"):
                early.take()
    if early is not None:
        a_checkpoint(tmp_path, 3)
        with pytest.raises(UserError, match="another process has trained there meanwhile"):
            early.take()
    assert (tmp_path / "checkpoints" / "step_00001").exists()


def test_the_log_loses_no_line(tmp_path, monkeypatch):
    """A torn line, and one that is none, go; where the disk is full the log stays as it was."""
    folder = opened(RunFolder(tmp_path / "run", ARGS))
    path = tmp_path / "run" / "log.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    path.write_bytes("".join(lines).encode() + b'7\n\xff\n{"step": 4, "rew')
    folder.log_until(2)
    assert path.read_text() == "".join(lines[:2])
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device.*log.jsonl"):
        folder.log({"step": 3})
    with pytest.raises(OSError, match="No space left on device"):
        folder.log_until(1)
    assert path.read_text() == "".join(lines[:2]) and not list(path.parent.glob(".log*"))


def test_a_log_that_was_cut_says_which_steps_it_lacks(tmp_path, capsys):
    a_run(tmp_path, steps=(4,))
    folder = opened(RunFolder(tmp_path, ARGS | {"resume": True}))
    write(tmp_path, "log.jsonl", text='{"step": 1}\n{"step": 3}\n{"step": 5}\n')
    folder.go_on_from({"step": 4, "unlogged": None, "run": "r1"})
    assert "log.jsonl has lost the line of step 2, and 1 more, of 4; the run goes on" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'
    folder.log_until(1)
    assert capsys.readouterr().out == ""


REFUSED = [("", {}), ("--lr 3e-5", {}), ("--prompts p.txt", {}), ("--reward miniature/reward_unbiased", {}),
           (None, {"lr": 3e-5}), (None, {"method": "another"}), (None, {"global_batch": 3})]


@pytest.mark.parametrize("flags, edited", REFUSED)
def test_a_refused_resume_writes_nothing(whole, tmp_path, capsys, flags, edited):
    """It is refused when it is compared with the run, after all is loaded; edited: keys of args.json."""
    out = linked(whole, tmp_path / "run")
    args = json.loads((out / "args.json").read_text()) | edited
    write_whole(out / "args.json", json.dumps(args))
    (tmp_path / "p.txt").write_text("a red circle\n")
    before = everything(out)
    argv = (flags or "").replace("p.txt", str(tmp_path / "p.txt")).split()
    with pytest.MonkeyPatch.context() as monkeypatch:
        if flags == "":
            monkeypatch.setattr(contents, "digest_of_files", lambda places: "another")
            monkeypatch.setattr(contents, "stamp", lambda *places: [])
        try:
            run(monkeypatch, "--out", out, "--resume", "--steps", "9", *argv)
        except SystemExit as stop:
            assert stop.code == 2
        else:
            raise AssertionError("not refused")
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    after = everything(out)
    after.pop(out / ".lock", None)
    before.pop(out / ".lock", None)
    assert after == before


def test_explain_does_not_write_where_another_process_trains(tmp_path):
    a_run(tmp_path)
    with open(tmp_path / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training there"):
            run_folder.may_explain(tmp_path)
    assert run_folder.may_explain(tmp_path) == tmp_path / "explain.png"


def test_without_file_locks_a_line_says_so(tmp_path, capsys, monkeypatch):
    """As on Windows, which has no fcntl and no SIGHUP."""
    monkeypatch.setattr(run_folder, "fcntl", None)
    RunFolder(tmp_path, ARGS).take()
    assert "has no locks; make sure that no other process trains there" in capsys.readouterr().out
    code = ("import sys, signal; sys.modules['fcntl'] = None; del signal.SIGHUP\n"
            "from engine import stopping\nfrom engine.run import folder\nstopping.Stopping('')\n"
            "print(len(stopping.ASKS))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2\n", done.stderr


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_export_before_and_says_where(tmp_path, monkeypatch, miniature):
    world = parallel.World()
    export.export(miniature.transformer, tmp_path, world)
    before = everything(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device: .*diffusion_pytorch_model.safetensors"):
        export.export(miniature.transformer, tmp_path, world)
    assert everything(tmp_path) == before


# ------------------------------------------------------------------------------------ damaged checkpoints
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three updates that nothing interrupted, with all its checkpoints."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, "--out", out)
    return out


FLAGS = [*SMALL, "--eval", "2", "--steps", "3", "--save-every", "1", "--keep", "9"]


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, *map(str, argv)])
    train.main()


def linked(whole, out):
    """A copy of a folder that costs nothing: a file that is replaced is replaced in the copy alone."""
    shutil.copytree(whole, out, copy_function=os.link)
    return out


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


DAMAGES = {"one bit": flipped, "cut in half": lambda content: content[:len(content) // 2],
           "empty": lambda content: b"", "gone": None}


@pytest.fixture(scope="module")
def network():
    """A transformer and its optimizer, to load checkpoints into."""
    transformer = flow.load(Model("miniature")).transformer
    return transformer, torch.optim.AdamW(transformer.parameters(), 1e-5)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [SHARD, "state.json", "checksums.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, network, tmp_path, capsys, file,
                                                                  damage):
    out = linked(whole, tmp_path / "run")
    path = out / "checkpoints" / "step_00003" / file
    content = path.read_bytes()
    path.unlink()
    if DAMAGES[damage] is not None:
        path.write_bytes(DAMAGES[damage](content))
    args = json.loads((out / "args.json").read_text()) | {"resume": True}
    folder = RunFolder(out, args)
    state = checkpoint.load_newest(folder.checkpoints, *network, parallel.World())
    assert state["step"] == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "step_00003 is damaged: " in said[0] and "the one before is used" in said[0]


def test_of_a_damaged_run_the_good_checkpoint_is_not_pruned(whole, tmp_path):
    """Step 3 is damaged, and the run goes on from 2 with --keep 1: 2 stays until there is another one."""
    out = linked(whole, tmp_path / "run")
    write_whole(out / "checkpoints" / "step_00003" / SHARD, b"")
    state = checkpoint.state_of(out / "checkpoints" / "step_00002")
    checkpoint.prune(out, state, keep=1)
    assert [c.name for c in checkpoint.all_checkpoints(out)] == ["step_00002", "step_00003"]


def test_without_a_whole_checkpoint_it_is_one_line(whole, network, tmp_path, capsys):
    out = linked(whole, tmp_path / "run")
    folders = checkpoint.all_checkpoints(out)
    for folder in folders:
        (folder / SHARD).unlink()
    with pytest.raises(UserError, match="no checkpoint in .* is whole; start again with --overwrite"):
        checkpoint.load_newest(folders, *network, parallel.World())
    assert capsys.readouterr().out.count("is damaged") == 3


class Evil:
    """Unpickled as torch would, it makes a folder."""
    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return os.mkdir, (self.name,)


def evil_tensors(folder, trap):
    write_whole(folder / SHARD, pickle.dumps(Evil(trap)))


def cut_tensors(folder, trap):
    write_whole(folder / SHARD, (folder / SHARD).read_bytes()[:-100])


def evil_archive(folder, trap):
    torch.save({"a": Evil(trap)}, folder / "archive")
    write_whole(folder / SHARD, (folder / "archive").read_bytes())
    (folder / "archive").unlink()


def evil_state(folder, trap):
    write_whole(folder / "state.json", pickle.dumps(Evil(trap)))


def evil_settings(folder, trap):
    state = json.loads((folder / "state.json").read_text())
    write_whole(folder / "state.json", json.dumps(state | {"optimizer": [trap]}))


def evil_scores(folder, trap):
    state = json.loads((folder / "state.json").read_text())
    write_whole(folder / "state.json", json.dumps(state | {"before": {"sgp": [trap]}}))


def evil_pipe(folder, trap):
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


@pytest.mark.parametrize("poison, words", [(evil_tensors, "header"), (evil_archive, "it is a"), (cut_tensors, "header"),
                                           (evil_state, "not a text file|codec|not JSON"),
                                           (evil_settings, "is not the state of a run"),
                                           (evil_scores, "is not the state of a run"),
                                           (evil_pipe, "No such file")])
def test_a_checkpoint_from_elsewhere_runs_nothing(whole, network, tmp_path, caplog, poison, words):
    """Its checksums are right: who makes a checkpoint can make those too. Nor is a pickle looked at that lies
    where torch's other format has one. torch has nothing to say."""
    out = linked(whole, tmp_path / "run")
    folder = out / "checkpoints" / "step_00003"
    write_whole(folder / ".metadata", pickle.dumps(Evil(str(tmp_path / "trap"))))
    poison(folder, str(tmp_path / "trap"))
    sums = json.loads((folder / "checksums.json").read_text())
    sums = {name: (folder / name).is_file() and checkpoint.digest(folder / name) for name in sums}
    write_whole(folder / "checksums.json", json.dumps(sums))
    with pytest.raises(checkpoint.Damaged, match=words) as refusal:
        checkpoint.load(folder, *network, watch.STATE)
    assert "\n" not in str(refusal.value) and not (tmp_path / "trap").exists() and not caplog.records


# --------------------------------------------------------------------------------------------- stopping
class Phase(NamedTuple):
    """Where a run is asked to stop: at the n-th call of a function; and with what words it ends."""
    place: object
    function: str
    n: int
    words: str


PHASES = [
    Phase(flow, "encoded", 1, "before the first update: there is nothing to save"),
    Phase(flow, "load", 1, "before the first update: there is nothing to save"),
    Phase(flow, "sample", 1, "before the first update: there is nothing to save"),
    Phase(watch.Watch, "evaluate", 1, "before the first update: there is nothing to save"),
    # Asked in the first update, so that the watch of step 1 is cut short.
    Phase(prepare.Run, "batch", 1, "after step 1, saved; --resume continues"),
    Phase(flow, "encoded", 1, "before another update; step_00001 is there, and --resume continues"),
    Phase(watch.Watch, "look", 1, "before another update; step_00001 is there, and --resume continues"),
    Phase(watch.Watch, "look", 2, "after step 2, saved; --resume continues"),
    Phase(lora, "export_full", 1, "before another update; step_00002 is there, and --resume continues"),
    Phase(checkpoint, "save", 1, "after the last update; its weights are in "),
    Phase(lora, "export_full", 1, "after the last update; its weights are in "),
    Phase(watch.Watch, "evaluate", 1, "after the last update; its weights are in "),
]


def asked_at(monkeypatch, phase):
    """Have this process asked to stop when it comes to a phase."""
    function = getattr(phase.place, phase.function)
    calls = []

    def asked(*arguments, **options):
        calls.append(1)
        if len(calls) == phase.n:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)
    monkeypatch.setattr(phase.place, phase.function, asked)


@pytest.fixture
def handlers():
    """The handlers of the signals, as they were before."""
    before = {number: signal.getsignal(number) for number in stopping.ASKS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_stopped_in_every_phase_it_goes_on_to_the_same_end(whole, tmp_path, monkeypatch, capsys, handlers):
    """One run, by the same command again and again, each time asked to stop a phase later."""
    out = tmp_path / "run"
    for phase in PHASES:
        with monkeypatch.context() as patch:
            asked_at(patch, phase)
            status = 0
            try:
                run(patch, "--out", out, "--resume")
            except SystemExit as stop:  # not pytest.raises: its traceback would hold the run's lock
                status = stop.code
        assert status == 128 + signal.SIGTERM
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith("train.py: stopped ") and phase.words in last, phase
        if "saved" in phase.words:
            assert (out / "weights" / "diffusion_pytorch_model.safetensors").is_file()
            assert f"{phase.words.split()[2][:-1]} updates of" in (out / "weights" / "README.md").read_text()
    run(monkeypatch, "--out", out, "--resume")
    assert log_of(out) == log_of(whole)
    assert (out / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    for name in ("weights", "weights_best"):
        a, b = (load_file(o / name / "diffusion_pytorch_model.safetensors") for o in (out, whole))
        assert all(torch.equal(a[k], b[k]) for k in a)


def in_a_child(function, *arguments):
    """The exit status of a process that runs a function."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def two_signals(seconds):
    asked = stopping.Stopping("")
    asked.later("")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


@pytest.mark.parametrize("seconds, status", [(0.01, 0), (stopping.ONE_REQUEST + 0.05, 128 + signal.SIGTERM)])
def test_asked_twice_is_at_once(seconds, status):
    """But a launcher that passes on what its processes got as well has asked once."""
    assert in_a_child(two_signals, seconds) == status


@pytest.mark.parametrize("script, argv", [("train.py", ["--plan"]), ("sample.py", ["x"]), ("evaluate.py", [])])
def test_a_signal_while_the_libraries_are_imported_is_one_line(script, argv):
    """Nothing that takes time is imported before `until_loaded`."""
    code = (f"import os, runpy, signal, sys; sys.argv = {[script, *argv]!r}\n"
            "from engine import loading\nlistens = loading.until_loaded\n"
            "def asked(name):\n    listens(name)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
            f"loading.until_loaded = asked\nrunpy.run_path({script!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM and done.stderr == ""
    assert done.stdout.strip() == f"{script}: stopped before the start: there is nothing to save"


@pytest.mark.parametrize("module, number, said", [
    ("experiments.landing", signal.SIGINT, "landing: stopped before the start: there is nothing to save"),
    ("engine.merge", signal.SIGTERM, "merge: stopped before the start: there is nothing to save"),
    ("evaluation.report", None, "report: loading torch, diffusers and transformers")])
def test_a_module_says_what_it_loads_and_stops_in_one_line(module, number, said, tmp_path):
    """A numpy of the test's own, which all of them import, takes long or is a signal."""
    act = "time.sleep(4)" if number is None else f"os.kill(os.getpid(), {int(number)})"
    (tmp_path / "numpy.py").write_text(f"import os, time\n{act}\nraise SystemExit\n")
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0 if number is None else 128 + number, "")
    assert done.stdout.splitlines()[-1] == said


def test_a_reader_that_has_seen_enough_ends_a_script_without_a_word():
    code = ("from engine.errors import frame\nwith frame('x'):\n    while True:\n        print('line')")
    done = subprocess.run(f'{sys.executable} -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}', shell=True,
                          executable="/bin/bash", capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("line\n", "", 128 + signal.SIGPIPE)


def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asked = stopping.Stopping("")
    os.kill(os.getpid(), signal.SIGHUP)
    asked.check()
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


@pytest.mark.parametrize("inside", [True, False])
def test_a_signal_that_a_script_inside_another_does_not_answer_is_the_others(inside, handlers, capsys):
    """An experiment runs train.py, which asks for a signal only between two batches."""
    def be_asked():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    with pytest.raises(SystemExit) as stop, frame("outer"):
        with frame("inner") as inner:
            inner.later("too late")
            if inside:
                be_asked()
        be_asked()
    assert stop.value.code == 128 + signal.SIGTERM and capsys.readouterr().out == "\nouter: stopped; run it again\n"


def test_many_processes_say_a_mistake_once(tmp_path):
    """One that all of them meet after they have met one another."""
    said = call(tmp_path / "printed", "train.py", *SMALL, "--prompts", "no.txt", "--out", tmp_path / "run",
                ranks=2, status=2)
    assert [line for line in said.splitlines() if "no.txt" in line] == [
        "train.py: --prompts no.txt: no such file (a text file, one prompt a line, a .json, .jsonl, .csv or .tsv), "
        "and not one of hpdv2, hpdv2-benchmark"]


# ------------------------------------------------------------------------------------------- the long forms
@pytest.mark.slow
@pytest.mark.parametrize("argv", ["kills --stride 25", "disks --sizes 6", "signals --times 3"])
def test_kills_full_disks_and_signals(argv):
    """See torture.py."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("torture.py"), *argv.split()],
                          capture_output=True, text=True)
    if "cannot be mounted" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
