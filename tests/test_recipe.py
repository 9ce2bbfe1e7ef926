"""Claims about recipe.py and command.py: a hyper-parameter, a recipe and a method stand in one place; an update does
not depend on the hardware; what can be answered without torch is; a run goes on with its own flags."""

import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import make_foreign_flux
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import call

import command
import prepare
import recipe
import srpo_reward as sr
import train
from baselines import Term
from engine.command_line import fields_of
from engine.errors import UserError
from engine.memory import parallel, work
from experiments import bench

SMALL = ["--model", "miniature", "--rollout-steps", "2", "--eval-steps", "1", "--watch", "2", "--watch-every", "1",
         "--eval", "0"]


# ------------------------------------------------------------------------------------------- images of an update
@pytest.mark.parametrize("images, processes, batch, method, share", [
    (32, 1, 1, "srpo", (32, 1, 32)), (32, 8, 1, "srpo", (4, 1, 4)), (32, 32, 1, "srpo", (1, 1, 1)),
    (32, 8, 16, "srpo", (4, 4, 1)), (12, 1, 8, "srpo", (12, 6, 2)), (48, 2, 1, "dancegrpo", (24, 24, 1)),
    (24, 1, 1, "refl", (24, 1, 24))])
def test_an_updates_images_are_shared_among_the_processes(images, processes, batch, method, share):
    argv = ["--global-batch", str(images), "--batch", str(batch), "--method", method]
    assert prepare.share_of(command.flags(argv), processes) == share


@pytest.mark.parametrize("argv, processes, words", [
    ([], 5, "--global-batch 32: cannot be divided among 5 processes; it can among 1, 2, 4, 8, 16, 32"),
    (["--method", "dancegrpo"], 8,
     "a process makes 4 of the 32 images of --global-batch, which is no multiple of --group 12; --global-batch 96 is")])
def test_what_cannot_be_shared_is_one_line(argv, processes, words):
    with pytest.raises(UserError, match=words):
        prepare.share_of(command.flags(argv), processes)


def gradient(folder, ranks, *argv):
    """(the gradient of one update of the miniature, flat; what the log tells of it), made by so many processes."""
    out = folder / f"{ranks}-{len(argv)}"
    call(folder / "printed", "tests/update_worker.py", out, *SMALL, *argv, ranks=ranks)
    tensors = load_file(out)
    with safe_open(out, "pt") as file:
        told = json.loads(file.metadata()["told"])
    images = tensors.pop("images").item()
    assert images * max(1, ranks) == told.get("images", 8)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]), told


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, its eight images at once."""
    return gradient(tmp_path_factory.mktemp("alone"), 0, "--global-batch", "8")


@pytest.mark.parametrize("ranks, argv", [(0, ["--batch", "2"]), (2, []), (4, []), (4, ["--batch", "1"])],
                         ids=["four batches", "2 processes", "4 processes", "4 processes, image by image"])
def test_any_number_of_processes_makes_the_same_update(alone, tmp_path, ranks, argv):
    """To 1e-6 of its gradient, relative, in float32; with no other flag."""
    expected, told = alone
    found, also = gradient(tmp_path, ranks, "--global-batch", "8", *argv)
    assert (found - expected).norm() / expected.norm() < 1e-6
    for name in ("reward_denoise", "reward_invert", "sgp"):
        assert also[name] == pytest.approx(told[name], abs=1e-6)


def test_the_plan_shares_as_the_run_does():
    """Images and batches of a process, for counts that divide; 19 updates of 32 images, whatever the machine."""
    a, model = command.read(["--batch", "2"])
    job = prepare.job(a, model)
    for processes in (1, 2, 4, 8, 16, 32):
        share = prepare.share_of(a, processes)
        assert job.share(processes) == (share.batch, share.accumulate)
    assert (job.images, job.updates) == (32, 19)


# ------------------------------------------------------------------------------------------------------ one place
@pytest.mark.parametrize("argv, watched", [
    ("", None), ("--prompts hpdv2", None), ("--prompts mine.txt", "own"), ("--images photos", "own"),
    ("--prompts mine.txt --watch-prompts theirs.txt", "theirs.txt"),
    ("--model miniature", "miniature/prompts_select.txt"), ("--model miniature --images photos", "own")])
def test_ones_own_prompts_are_watched(argv, watched):
    assert command.flags(argv.split()).watch_prompts == watched


@pytest.mark.parametrize("argv, pictures, percent", [
    ("", 16, 8), ("--recipe fast --lora 32", 0, 38), ("--steps 200", 128, 6), ("--eval 7", 7, None),
    ("--model miniature", 256, None)])
def test_a_run_ends_with_a_table_where_that_costs_little(argv, pictures, percent):
    """Before and after: at most a tenth of the work of the updates, unless --eval or the model says how many."""
    a, model = command.read(argv.split())
    said = []
    prepare.settle_evaluation(a, model, said.append)
    assert a.eval == pictures and len(said) == (percent is not None)
    assert all(f"{percent}% of the updates' work" in line for line in said)


def test_every_flag_is_read_by_something():
    """Of the flags a, somewhere a.name is read."""
    read = set()
    for path in [*Path(".").glob("*.py"), *Path("engine").rglob("*.py"), *Path("evaluation").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("a", "self.a", "args"):
                read.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("self.args.get", "args.get"):
                read.add(getattr(node.args[0], "value", None))
    names = {field.name for field in fields_of(recipe.GROUPS)}
    assert names - read == set()


def test_every_flag_tells_where_its_default_comes_from():
    """Those on which the weights depend: the released code, the paper, or us."""
    for field in fields_of(recipe.GROUPS[:6]):
        if field.name not in ("model", "weights", "method", "recover", "lam_shift", "form", "neg"):
            told = field.metadata["help"]
            sources = ("[released code", "[paper", "[ours", "[as ReFL", "[DanceGRPO")
            assert any(source in told for source in sources), field


def test_a_recipe_that_is_added_is_in_the_help(monkeypatch, capsys):
    """With what it sets; and the metavars are there once."""
    monkeypatch.setitem(recipe.RECIPES, "mine", recipe.Recipe("what I like [ours]", {"cells": 123, "lam": [1.0, 0.5]}))
    with pytest.raises(SystemExit):
        command.flags(["-h"])
    told = capsys.readouterr().out
    assert "mine: what I like [ours]:\n      --cells 123 --lam 1.0 0.5" in told
    assert "--drift-band SATURATION REDNESS BRIGHTNESS TEXTURE" in " ".join(told.split())
    assert command.flags([*SMALL, "--recipe", "mine"]).cells == 123


@pytest.mark.parametrize("argv", [*(["--recipe", name] for name in recipe.RECIPES), ["--images", "a folder"]], ids=str)
def test_the_printed_line_of_flags_gives_the_same_run(argv):
    a = command.flags(["--model", "miniature", "--control", "it's real,a photo", "--no-checkpointing", *argv])
    assert vars(command.flags(shlex.split(command.as_line(a)))) == vars(a)


def test_every_form_is_a_row_of_the_table():
    one = torch.ones(1)
    for form in recipe.FORMS:
        assert sr.branch_reward(form, "denoise", one, one, one, 0.2, 1.5).shape == (1,)
    with pytest.raises(ValueError, match="not a row of the table"):
        sr.branch_reward("another", "denoise", one, one, one, 0.2, 1.5)


def test_baselines_climb_the_plain_reward_unless_a_form_is_given():
    for method in ("refl", "draft-lv", "dancegrpo"):
        assert command.flags([*SMALL, "--method", method]).form == "plain"
        assert command.flags([*SMALL, "--method", method, "--form", "srp"]).form == "srp"
    assert command.flags(SMALL).form == "released"


UNREAD = {
    "--method refl --lam-at landing": "--lam-at landing: --method refl does not read it",
    "--method refl --branches denoise": "--branches denoise: --method refl does not read it",
    "--method refl --group 4": "--group 4: --method refl", "--method draft-lv --refl-steps 2": "--method draft-lv",
    "--method draft-lv --injections 2": "--method draft-lv", "--method dancegrpo --group 4 --threshold 0": "dancegrpo",
    "--method dancegrpo --refl-steps 2": "--method dancegrpo", "--group 4": "--group 4: --method srpo",
    "--refl-steps 2": "--refl-steps 2: --method srpo", "--cfg-k 2": "--cfg-k 2.0: read only with --form cfg",
    "--method refl --cfg-k 2": "read only with --form cfg",
    "--form srp --discount-denoise 0 0.1": "--discount-denoise 0.0,0.1: read only with --form released",
    "--method refl --discount-denoise 0 0.1": "read only with --form released",
    "--branches denoise --discount-invert 0 0.1": "read only with an inverting branch",
    "--branches invert --discount-denoise 0 0.1": "read only with a denoising branch",
    "--lam-at landing": "--lam-at landing: read only with two values of --lam that differ",
    "--lam 2 2 --lam-shift 3": "two values of --lam",
    "--cfg-gradient both": "--cfg-gradient both: read only with --cfg",
    "--cfg-keep-norm": "--cfg-keep-norm: read only with --cfg", "--world-size 2": "read only with --plan",
    "--card H100": "read only with --plan", "--share 0.3": "read only with --plan"}


@pytest.mark.parametrize("argv", UNREAD)
def test_a_flag_that_nothing_reads_is_told(argv):
    """And is not refused, for the runs of an experiment share their flags."""
    a, model = command.read([*SMALL, *argv.split()])
    assert any(UNREAD[argv] in line for line in command.notes(a, model)), command.notes(a, model)


@pytest.mark.parametrize("method, middles", [("srpo", 3), ("refl", 1)])
def test_injections_change_no_draw_of_a_method_that_does_not_read_them(method, middles):
    a, model = command.read([*SMALL, "--method", method, "--global-batch", "2"])
    run = prepare.set_up(a, model, parallel.World())
    one = run.batch(a, 1, 0).chance.normal(4)
    a.injections = 3
    batch = run.batch(a, 1, 0)
    assert len(batch.middles) == middles and torch.equal(batch.chance.normal(4), one) == (middles == 1)


@pytest.mark.parametrize("argv", [
    "--recipe 2026 --lam 1 1", "--recipe fast --discount-invert 0.3 0.01", "--group 8", "--method refl --cfg-k 1.5",
    "--method refl --form cfg --cfg-k 2", "--method refl --form released --discount-denoise 0 0.1",
    "--method refl --threshold 0.5", "--method refl --guidance 2", "--method dancegrpo --group 4",
    "--recipe 2026 --lam-shift 2", "--form cfg --cfg-k 2", "--plan --card H100 --share 0.3 --world-size 1"])
def test_nothing_is_told_of_what_is_read_or_a_recipe_sets_or_changes_nothing(argv):
    assert command.unread(*command.read([*SMALL, *argv.split()])) == []


def quarter(a, net, reward, batch):
    """A method for the tests: a quarter of the mean square of one velocity."""
    v_theta = net.velocity(batch.start, 0.5, batch.c, a.guidance)
    yield v_theta.square().mean() / 4, Term(batch.prompts, "dummy", batch.start, v_theta)


def test_a_method_is_added_as_one_object(monkeypatch, tmp_path, capsys):
    """It trains, and is planned and timed by what it says of itself: three calls without a gradient, one with."""
    method = recipe.Method(quarter, "for the tests", lambda a: recipe.Calls(3, 1))
    monkeypatch.setitem(recipe.METHODS, "dummy", method)
    train.main([*SMALL, "--method", "dummy", "--global-batch", "2", "--steps", "1", "--out", str(tmp_path / "run")])
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert line["grad_norm"] > 0 and "reward_dummy" not in line
    a, model = command.read([*SMALL, "--method", "dummy"])
    job = prepare.job(a, model)
    assert (job.rollout_steps, job.calls) == (3, 1)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bench", *SMALL, "--method", "dummy", "--repeats", "1", "--global-batch", "2"])
    bench.main()
    assert "--method dummy, an update of 2 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.flags(["-h"])
    assert "dummy, for the tests" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="invalid choice: 'other' .choose from srpo, .*dummy"):
        command.flags(["--method", "other"])


@pytest.mark.parametrize("method, calls", [("srpo", 8), ("refl", 4), ("draft-lv", 12)])
def test_the_benchmark_times_the_method_and_divides_its_own_work(monkeypatch, miniature, method, calls):
    """As many calls with a gradient as its plan counts."""
    seen = []
    velocity = type(miniature).velocity

    def counted(self, x_t, *others):
        if torch.is_grad_enabled():
            seen.append(len(x_t))
        return velocity(self, x_t, *others)

    monkeypatch.setattr(type(miniature), "velocity", counted)
    argv = [*SMALL, "--method", method, "--global-batch", "4"]
    divided = []
    monkeypatch.setattr(work, "achieved", lambda flop, *others: divided.append(flop) or {})
    monkeypatch.setattr(sys, "argv", ["bench", *argv, "--repeats", "1"])
    bench.main()
    assert sum(seen) == 2 * calls  # one update is timed, and one is not
    job = prepare.job(*command.read(argv))
    assert divided == [work.update_flop(job)] and 4 * job.calls == calls


# ------------------------------------------------------------------------------------------------- without torch
@pytest.fixture
def no_torch(tmp_path):
    """An environment in which to import torch ends the process with status 99."""
    (tmp_path / "torch.py").write_text("raise SystemExit(99)\n")
    return {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}


@pytest.mark.parametrize("argv, status", [
    ("-h", 0), ("--lr 0", 2), ("--steps many", 2), ("--form none", 2), ("--method none", 2), ("--size 100", 2),
    ("--sigma-range 0.5 0.9", 2), ("--model nowhere", 2), ("--memory fp8", 2), ("--reward hpsv2.1:x", 2),
    ("--card B7", 2), ("--model miniature --control a --neg a", 2)])
def test_the_help_and_a_refused_flag_need_no_torch(no_torch, argv, status):
    done = subprocess.run([sys.executable, "train.py", *argv.split()], env=no_torch, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (len(done.stderr.splitlines()) == 1) == (status == 2)
    assert done.stdout.startswith("usage: train.py") == (status == 0)


# ------------------------------------------------------------------------------------------------ a run goes on
@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run of one update, a LoRA with a rate of its own."""
    out = tmp_path_factory.mktemp("begun") / "run"
    train.main([*SMALL, "--global-batch", "2", "--steps", "1", "--lora", "2", "--recipe", "fast", "--out", str(out)])
    return out


def test_a_run_goes_on_with_its_own_flags(begun):
    """--resume and the folder are enough; what is given beside them agrees, or may change."""
    own = json.loads((begun / "args.json").read_text())
    resume = ["--resume", "--out", str(begun)]
    expected = own | {"resume": True}
    assert vars(command.flags(resume)) == expected
    assert vars(command.flags([*resume, "--recipe", "fast", "--lora", "2"])) == expected
    assert vars(command.flags([*resume, "--steps", "5", "--batch", "1"])) == expected | {"steps": 5, "batch": 1}


@pytest.mark.parametrize("argv, words", [
    (["--lora", "4"], "the run in .* has --lora 2, and --lora 4 is given"),
    (["--lora", "off"], "has --lora 2, and --lora off is given"),
    (["--seed", "1"], "has --seed 0, and --seed 1 is given"),
    (["--global-batch", "4"], "has --global-batch 2, and --global-batch 4 is given"),
    (["--weights", "miniature/transformer"], "has --weights off, and --weights miniature/transformer is given"),
    (["--recipe", "released"], "has --recipe fast, and --recipe released is given"),
    (["--control", "dark"], "has --control realistic photo, and --control dark is given"),
    (["--recipe", "paper"], "has --form srp, and --recipe paper is given")])
def test_a_flag_that_disagrees_is_named_as_it_was_given(begun, argv, words):
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=words):
        command.flags(["--resume", "--out", str(begun), *argv])
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_a_refused_resume_changes_nothing(begun, capsys):
    """What differs is known by content alone, after everything is loaded; args.json stays as it was."""
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "--out", str(begun), "--steps", "9", "--reward", "miniature/reward_unbiased"])
    assert stop.value.code == 2 and "part 1 of --reward is not what it was" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_a_run_records_what_made_it(begun):
    made, = json.loads((begun / "run.json").read_text())["made_by"]
    assert made["libraries"]["torch"] == torch.__version__.split("+")[0] and len(made["devices"]) == 1
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert made["commit"] == (commit or None) and isinstance(made["changed"], bool)


# ------------------------------------------------------------------------------------------ what a start touches
COUNT = """
import sys, traceback
opened = []

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".json") and "r" in (arguments[1] or "r"):
        names = [frame.filename for frame in traceback.extract_stack()]
        names = [name for name in names if "lib/python" not in name or "site-packages" in name]
        here = [name for name in names if not name.startswith("<")][-1]
        if "site-packages" not in here and not here.endswith("digests.py"):  # those are hashed, and not read
            opened.append((str(arguments[0]), here))

sys.addaudithook(hook)
import train
train.main(sys.argv[1:])
print(*(f"READ {file}" for file, _ in opened), *(f"MODULE {name}" for name in sys.modules), sep="\\n")
"""


def started(*argv):
    """The lines that COUNT prints of a start of train.py."""
    done = subprocess.run([sys.executable, "-c", COUNT, *map(str, argv)], capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "PATH": "/usr/bin:/bin", "HOME": "/tmp"})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_flux_run_imports_nothing_of_the_miniature_nor_of_the_study(tmp_path):
    """And reads each JSON file once: those of its folder, and the reward's two; what the libraries read is theirs."""
    model = make_foreign_flux(tmp_path / "flux")
    config = json.loads((model / "tokenizer_2" / "tokenizer_config.json").read_text())
    (model / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 16}))
    lines = started("--model", model, "--reward", "miniature/reward", "--prompts", "miniature/prompts.txt",
                    "--eval-prompts", "miniature/prompts_eval.txt", "--global-batch", 1, "--steps", 1, "--watch", 1,
                    "--rollout-steps", 1, "--eval-steps", 1, "--threshold", "off", "--out", tmp_path / "run")
    modules = [line.split()[1] for line in lines if line.startswith("MODULE ")]
    assert "train" in modules
    assert [name for name in modules if name.split(".")[0] == "miniature" or name.startswith("evaluation.study")] == []
    read = [line.split()[1] for line in lines if line.startswith("READ ")]
    read = [file for file in read if str(tmp_path / "run") not in file]
    assert len(read) == len(set(read)) <= 12, read


@pytest.mark.parametrize("differs, said", [
    ({"rolout_steps": 6}, "--recipe mine: rolout_steps is no flag that a recipe can set"),
    ({"method": "refl"}, "--recipe mine: method is no flag that a recipe can set"),
    ({"form": "crp"}, "--recipe mine: --form: invalid choice: 'crp'"),
    ({"rollout_steps": 0}, "--recipe mine: --rollout-steps 0: must be a whole number")])
def test_a_recipe_is_checked_as_a_command_line_is(monkeypatch, differs, said):
    monkeypatch.setitem(recipe.RECIPES, "mine", recipe.Recipe("mine", differs))
    with pytest.raises(UserError) as refused:
        command.flags(["--model", "miniature", "--recipe", "mine"])
    assert said in str(refused.value)


def test_a_recipe_with_adapters_has_their_learning_rate(monkeypatch):
    monkeypatch.setitem(recipe.RECIPES, "mine", recipe.Recipe("mine", {"lora": 4}))
    assert command.flags(["--model", "miniature", "--recipe", "mine"]).lr == 5e-4


def test_resume_alone_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="there is no run in it"):
        command.flags(["--resume", "--out", str(tmp_path / "nowhere")])


def test_resume_needs_the_runs_flags(tmp_path):
    """A checkpoint without args.json: nothing could be compared."""
    (tmp_path / "checkpoints" / "step_00001").mkdir(parents=True)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="args.json: no such file"):
        command.flags(["--model", "miniature", "--resume", "--out", str(tmp_path), "--lr", "1"])


def test_overwrite_keeps_the_weights_that_a_run_starts_from(tmp_path):
    given = ["--model", "miniature", "--overwrite", "--out", str(tmp_path), "--weights"]
    with pytest.raises(UserError, match="the weights would be deleted"):
        command.flags([*given, str(tmp_path / "weights")])
    assert command.flags([*given, str(tmp_path.parent / "other")]).overwrite
