"""Claims about train.py, each on the miniature with few steps and few pictures."""

import json
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch
from builders import a_batch, backward
from diffusers import FluxPipeline, FluxTransformer2DModel

import command
import direct_align as da
import flow
import rewards
import train
from engine.data import draws
from engine.data.pictures import read_picture
from engine.model.folder import Model
from engine.run import log
from evaluation import explain
from evaluation.watch import hacking
from rewards.clip_model import ClipReward

SMALL = ["--model", "miniature", "--global-batch", "2", "--rollout-steps", "3", "--eval-steps", "2",
         "--watch", "2", "--watch-every", "1", "--eval", "0"]


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *map(str, argv)])
    train.main()


def log_of(out):
    """The log without its readings of clock and memory: all the rest must repeat byte for byte."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clocks = ("timestamp", "seconds_", "images_per_", "tflop_", "share_", "peak_")
    return [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in lines]


def test_a_run_leaves_what_the_readme_says(monkeypatch, tmp_path):
    out = tmp_path / "run"
    run(monkeypatch, "--steps", 2, "--eval", 4, "--watch", 24, "--out", out)  # 24 have a Frechet distance
    state = json.loads((out / "checkpoints" / "step_00002" / "state.json").read_text())
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert {"reward_denoise", "reward_invert", "sgp", "grad_norm",
                "seconds_rollout", "seconds_update"} <= line.keys()
        assert {name for name in line if name.startswith("drift.")} == {
            "drift.saturation", "drift.redness", "drift.brightness", "drift.texture"}
        assert not [value for value in line.values() if isinstance(value, dict | list)]  # pandas reads it in one call
        assert line["timestamp"] > 1e9 and line["images_per_second"] > 0
        assert {name for name in line if name.startswith("watch.")} == {f"watch.{name}" for name in state["before"]}
    assert json.loads((out / "args.json").read_text())["steps"] == 2
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"step_0000{i}.png" for i in range(3)]
    summary = json.loads((out / "summary.json").read_text())
    assert {"reward", "sgp", "realism", "alignment", "broken"} <= summary["after"].keys()
    assert (out / "before_after.png").exists() and (out / "weights_best" / "config.json").exists()
    trained = FluxTransformer2DModel.from_pretrained(out / "weights")
    pipe = FluxPipeline.from_pretrained("miniature", transformer=trained)
    assert pipe("a red circle", height=64, width=64, num_inference_steps=2,
                max_sequence_length=16).images[0].size == (64, 64)
    base = FluxTransformer2DModel.from_pretrained("miniature", subfolder="transformer", dtype=torch.float32)
    moved = [(a - b).abs().max().item() 
             for a, b in zip(trained.parameters(), base.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-3


def test_the_same_seed_gives_the_same_log_and_weights(monkeypatch, tmp_path):
    for name in "ab":
        run(monkeypatch, "--steps", 2, "--out", tmp_path / name)
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    weights = [(tmp_path / n / "weights" / "diffusion_pytorch_model.safetensors").read_bytes() for n in "ab"]
    assert weights[0] == weights[1]


def test_a_resumed_run_is_the_uninterrupted_one(monkeypatch, tmp_path):
    run(monkeypatch, "--steps", 3, "--out", tmp_path / "whole")
    run(monkeypatch, "--steps", 2, "--out", tmp_path / "parts")
    run(monkeypatch, "--steps", 3, "--out", tmp_path / "parts", "--resume")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    weights = [(tmp_path / n / "weights" / "diffusion_pytorch_model.safetensors").read_bytes()
               for n in ("whole", "parts")]
    assert weights[0] == weights[1]


PROMPTS = ["a red circle", "a blue square above a white circle", "a green triangle left of a red square",
           "a white circle"]


@pytest.fixture(scope="module")
def reward():
    return rewards.load_rewards("miniature/reward")


@pytest.fixture(scope="module")
def gradient_of(miniature, reward):
    """gradient_of(a, batches of rows, middles): the gradient of an update of these rows of PROMPTS, the
    batches' accumulated."""
    embeddings = flow.encode_prompts(Model("miniature"), PROMPTS)
    eps = flow.noise(miniature, (4, 4), range(len(PROMPTS)))
    everyone = embeddings.condition(slice(None), (4, 4), "cpu")
    x0 = miniature.rollout(eps, everyone, da.sigma_steps(4, 3.0), 3.5)

    def gradient(a, batches, middles):
        miniature.transformer.zero_grad()
        for rows in batches:
            batch = a_batch(PROMPTS[rows], embeddings.condition(rows, (4, 4), "cpu"), x0[rows], eps[rows],
                            [m[rows] for m in middles])
            backward(a, miniature, reward, batch, times=len(batches))
        return torch.cat([p.grad.flatten() for p in miniature.transformer.parameters()])
    return gradient


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_batches_are_one_batch(gradient_of, flags, size):
    """4 images at once, one by one and two by two: the same gradient to 1e-6 in float32."""
    a = flags("--threshold", "off", "--injections", "2")
    middles = [torch.tensor([100, 400, 800, 600]), torch.tensor([900, 50, 300, 500])]
    whole = gradient_of(a, [slice(0, 4)], middles)
    parts = gradient_of(a, [slice(i, i + size) for i in range(0, 4, size)], middles)
    assert (whole - parts).norm() / whole.norm() < 1e-6


def test_frozen_models_get_no_gradient(gradient_of, flags, miniature, reward):
    grad = gradient_of(flags("--threshold", "off"), [slice(0, 4)], [torch.tensor([100, 400, 800, 600])])
    assert grad.norm() > 0
    networks = [miniature.vae, *[part.model for part, _ in reward.parts.values()]]
    assert all(p.grad is None for network in networks for p in network.parameters())


def test_accumulate_is_part_of_the_loop(monkeypatch, tmp_path):
    """Four images at once, or one by one: the same prompts, noise and levels, and the same log."""
    run(monkeypatch, "--global-batch", 4, "--steps", 2, "--out", tmp_path / "whole")
    run(monkeypatch, "--global-batch", 4, "--batch", 1, "--steps", 2, "--out", tmp_path / "parts")
    for a, b in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True):
        assert a["reward_denoise"] == pytest.approx(b["reward_denoise"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_text_is_encoded_once_and_alone():
    """What it is encoded with would change its last bits, and a resumed run meets it with others."""
    reward = rewards.load_reward("miniature/reward")
    calls, encode = [], reward.model.encode_text
    reward.model.encode_text = lambda ids: calls.append(len(ids)) or encode(ids)
    for _ in range(3):
        reward.text_features(["a red circle", "a blue circle", "a red circle"])
    assert calls == [1, 1]


def test_nan_never_reaches_the_weights(monkeypatch, tmp_path, capsys):
    features = ClipReward.image_features

    def poisoned(self, images):
        f = features(self, images)
        return f * float("nan") if f.requires_grad else f

    monkeypatch.setattr(ClipReward, "image_features", poisoned)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--steps", 2, "--out", tmp_path / "run")
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "step 1" in message and "reward is not finite" in message and "prompt 'a " in message
    assert '"status": "failed"' in (tmp_path / "run" / "report.html").read_text()
    base = FluxTransformer2DModel.from_pretrained("miniature", subfolder="transformer", dtype=torch.float32)
    kept = FluxTransformer2DModel.from_pretrained(tmp_path / "run" / "weights")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), kept.parameters(), strict=True))


def test_a_look_at_pictures_that_are_not_finite_names_the_update(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--steps", 4, "--watch", 2, "--watch-every", 1, "--lr", 30, "--clip", 1e6, "--out", tmp_path)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "try a smaller --lr" in message and re.search(r"step \d", message), message
    assert '"status": "failed"' in (tmp_path / "report.html").read_text()


def test_explain_tells_one_step_in_the_order_of_the_code(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--steps", 1, "--out", tmp_path)
    capsys.readouterr()
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    run(monkeypatch, "--explain", "--out", tmp_path)  # a folder with a run is no obstacle
    told = capsys.readouterr().out
    order = ["srpo_reward.texts_of(", "flow.Flow.rollout(", "direct_align.place(", "Eq. 3:",
             "flow.Flow.velocity(", "Eq. 5 for a", "factor     [2]", "flux.Flux.decode(", "Rewards.of(",
             "direct_align.discount(", "branch_reward(", "Eq. 6:", "gradient norm"]
    places = [told.index(word) for word in order]
    assert places == sorted(places)
    assert "below 0 in this branch" in told and "above 0 in this branch" in told
    assert told.count("released  (1 + d) r1 - r2        (1 + d) r2 - r1") == 2
    assert "[2, 16, 64]" in told and "[2, 3, 64, 64]" in told
    after = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    assert [entry for entry in after if entry[0].name != "explain.png"] == before
    assert read_picture(tmp_path / "explain.png").width > 800


@pytest.mark.parametrize("recover", ["velocity", "epsilon"])
def test_explain_tells_the_factor_of_the_networks_error(recover):
    """x0_hat = x0 + factor (v_theta - (eps - x0)), for either way to recover: below 0 when denoising."""
    x0, eps, v = torch.randn(3, 2, 4, 8)
    for sigma, sigma_to in ((0.9, 0.8), (0.8, 0.9)):
        s, s_to = torch.full((2,), sigma), torch.full((2,), sigma_to)
        x_t = da.inject(x0, eps, s)
        if recover == "velocity":
            x0_hat = da.recover(x_t, v, eps, s, s_to)
        else:
            x0_hat = da.recover_epsilon(x_t, da.epsilon(x_t, v, s), eps, s, s_to)
        factor = explain.factor_of(types.SimpleNamespace(sigma=s, sigma_to=s_to), recover)
        assert torch.allclose(x0_hat, x0 + factor.view(-1, 1, 1) * (v - (eps - x0)), atol=1e-5)
        assert (factor < 0).all() == (sigma_to < sigma)


def test_prompts_that_the_judge_does_not_know_are_a_dash(monkeypatch, capsys, tmp_path):
    """A prompt outside the miniature's world has no alignment: not 0, and no crash."""
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    run(monkeypatch, "--steps", 1, "--eval", 2, "--eval-prompts", tmp_path / "p.txt",
        "--watch-prompts", tmp_path / "p.txt", "--out", tmp_path / "run")
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    after = {}
    for line in lines:
        after.setdefault(line[1].strip(), line[3].strip())  # the table of the evaluation comes first
    assert "alignment" not in after and "Frechet" not in after and after["realism"] != "-"
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["watch.alignment"] is None


def test_a_threshold_that_stops_every_gradient_is_said(monkeypatch, capsys, tmp_path):
    """relu(0.7 - r) is flat above 0.7, where an HPS cosine never is, and PickScore's bare reward always."""
    run(monkeypatch, "--steps", 1, "--threshold", -9, "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert "the gradient is 0: every reward is above --threshold -9.0; --threshold off" in said


def scores(**means):
    base = dict(saturation=0.5, redness=0.0, brightness=0.5, texture=0.05, reward=0.8, sgp=0.0)
    return {k: torch.full((8,), v + means.get(k, 0.0)) + torch.arange(8) * 1e-3 for k, v in base.items()}


@pytest.mark.parametrize("change, word", [
    ({"saturation": 0.3}, "saturation drifted by +0.300"), ({"redness": -0.2}, "redness drifted by -0.200"),
    ({"reward": 0.05, "sgp": -0.05}, "the reward rises while the SGP gap falls"),
    ({"reward": 0.05, "sgp": 0.05}, None), ({"reward": -0.05, "sgp": 0.05, "saturation": -0.1}, None)])
def test_the_drift_warning(change, word):
    _, wrong = hacking(scores(**change), scores(), [0.25, 0.1, 0.2, 0.04])
    assert (wrong == []) if word is None else (len(wrong) == 1 and word in wrong[0])


def test_the_paper_recipe_sets_every_printed_form():
    """The command line comes before the recipe, the recipe before the model's srpo.json."""
    a = command.flags(["--model", "miniature", "--recipe", "paper", "--lam", "1", "0.2"])
    assert (a.form, a.recover, a.meet, a.lam) == ("branches", "epsilon", "call", [1.0, 0.2])
    assert a.threshold is None and a.shift is None
    assert a.size == 64  # from the miniature's srpo.json


def test_the_printed_line_of_flags_gives_the_same_run():
    argv = ["--model", "miniature", "--control", "it's real,a photo", "--no-checkpointing",
            "--threshold", "0.5"]
    a = command.flags(argv)
    line = command.as_line(a)
    assert vars(command.flags(shlex.split(line))) == vars(a)


def test_prompts_come_in_seeded_permutations():
    rows = draws.prompt_order(5, 12, seed=1)
    assert sorted(rows[:5]) == sorted(rows[5:10]) == list(range(5)) and len(rows) == 12
    assert draws.prompt_order(5, 7, seed=1) == rows[:7] != draws.prompt_order(5, 7, seed=2)


def test_a_question_is_answered_without_loading_the_model_libraries():
    """train.py, evaluate.py and sample.py with -h or a refused flag import torch and diffusers, but no class
    of a model: those take as long again."""
    told = subprocess.run([sys.executable, "-c", "import sys, train, evaluate, sample; print(*sys.modules)"],
                          capture_output=True, text=True, check=True).stdout.split()
    heavy = ("open_clip", "timm", "diffusers.models.transformers", "diffusers.pipelines.flux",
             "transformers.models.clip", "transformers.models.t5", "matplotlib.pyplot")
    assert [name for name in told if name.startswith(heavy)] == []


SHOWN = {"training/sgp", "training/grad_norm", "training/reward_denoise", "speed/images_per_second",
         "watched pictures/sgp", "watched pictures/realism", "watched pictures/drift warnings",
         "drift of watched pictures/redness"}


def test_wandb_gets_the_logs_numbers_and_the_pictures(monkeypatch, tmp_path, capsys):
    """A stand-in for the optional package. Not installed, or not logged in, it is one line before the run."""
    shown = {}
    flags = ["--steps", 1, "--wandb", "--out", tmp_path / "run"]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    module = types.ModuleType("wandb")
    module.api = types.SimpleNamespace(api_key=None)
    module.Image = str
    begun = []

    def init(**options):
        begun.append(options)
        return types.SimpleNamespace(log=lambda what, step: shown.setdefault(step, {}).update(what))

    module.init = init
    for there, words in ((None, "not installed; pip install wandb"), (module, "not logged in; wandb login")):
        monkeypatch.setitem(sys.modules, "wandb", there)
        with pytest.raises(SystemExit):
            run(monkeypatch, *flags)
        assert words in capsys.readouterr().err and not begun
    module.api.api_key = "a key"
    run(monkeypatch, *flags)
    assert begun[0]["config"]["steps"] == 1
    assert begun[0]["id"] == json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    assert shown.keys() == {0, 1} and shown[1].keys() > SHOWN and "watched pictures/sgp" in shown[0]
    assert [shown[step]["watched pictures"] for step in (0, 1)] == [
        str(tmp_path / "run" / "samples" / f"step_0000{step}.png") for step in (0, 1)]


def test_tensorboard_gets_the_logs_numbers_and_the_pictures(monkeypatch, tmp_path):
    """A stand-in for the optional package; without it the flag is refused (test_bad_input.py)."""
    seen = []
    pictures = []

    class Writer:
        def __init__(self, folder):
            assert folder == tmp_path / "run" / "tensorboard"

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def add_image(self, name, picture, step, dataformats):
            pictures.append((name, picture.shape, step, dataformats))

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    run(monkeypatch, "--steps", 1, "--tensorboard", "--out", tmp_path / "run")
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert ("training/sgp", line["sgp"], 1) in seen
    assert ("drift of watched pictures/redness", line["drift.redness"], 1) in seen
    assert {name for name, _, step in seen if step == 1} > SHOWN
    assert pictures == [("watched pictures", (132, 262, 3), step, "HWC") for step in (0, 1)]


def test_a_log_is_flat_in_the_file_and_nested_in_memory():
    """A line that an earlier version wrote is read as well."""
    line = {"step": 4, "sgp": 0.5, "watch": {"sgp a.b": 0.25, "alignment": None}, "drift": {"redness": -1.0},
            "hacking": ["redness drifted", "the reward rises"]}
    flat = log.flat(line)
    assert flat.pop("timestamp") > 1e9 and flat == {
        "step": 4, "sgp": 0.5, "watch.sgp a.b": 0.25, "watch.alignment": None, "drift.redness": -1.0,
        "hacking": "redness drifted; the reward rises"}
    assert log.nested(flat) == line == log.nested(line)
    assert log.nested({"step": 1, "hacking": ""}) == {"step": 1, "hacking": []}
