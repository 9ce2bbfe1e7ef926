"""Claims about experiments/bench.py: its code for full size, at a tiny one."""

import sys

import open_clip
import pytest

import command
import prepare
import train
from engine.memory import parallel
from engine.model.folder import Model
from experiments import bench

TINY_CLIP = {"embed_dim": 32,
             "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
             "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}}
SMALL = ["--model", "miniature", "--global-batch", "2", "--rollout-steps", "2"]


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["bench.py", *SMALL, "--repeats", "1", *argv])
    bench.main()


@pytest.fixture
def tiny_clip(monkeypatch):
    """The architecture of every reward that is made by its name."""
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: {**TINY_CLIP})


def test_random_weights_of_flux_1_devs_classes(monkeypatch, capsys, tiny_clip, miniature):
    """As large as --model, every tensor finite, and the same update runs on them."""
    made = bench.random_run(*command.read([*SMALL, "--memory", "masters"]), parallel.World())
    shapes = {name: p.shape for name, p in miniature.transformer.named_parameters()}
    assert {name: p.shape for name, p in made.net.transformer.named_parameters()} == shapes
    assert all(p.isfinite().all() for p in made.net.transformer.parameters())
    assert made.embeddings.txt.shape == (2, 16, miniature.transformer.config.joint_attention_dim)
    run(monkeypatch, "--random-init")
    assert "this project" in capsys.readouterr().out


def test_it_is_train_pys_update_that_is_timed(monkeypatch, capsys):
    """Its terms, from its batch: one a branch, of both repeats."""
    heard = []
    srpo = train.srpo

    def listened(*arguments):
        for loss, term in srpo(*arguments):
            heard.append((term.branch, len(term.reward)))
            yield loss, term

    monkeypatch.setattr(train, "srpo", listened)
    run(monkeypatch)
    assert heard == [("denoise", 2), ("invert", 2)] * 2
    assert "median of 1" in capsys.readouterr().out


@pytest.mark.slow
def test_the_released_habits_are_compared_on_the_same_work(monkeypatch, capsys):
    run(monkeypatch, "--released")
    told = capsys.readouterr().out
    habits = ["this project", "+ one image at a time", "+ text features four times", "+ VAE not frozen",
              "+ anomaly detection"]
    assert [told.index(h) for h in habits] == sorted(told.index(h) for h in habits)


def test_image_by_image_is_the_same_work(monkeypatch):
    """The gradient of a batch is the mean of its images' gradients."""
    a = command.flags([*SMALL, "--noise", "independent"])
    made = prepare.set_up(a, Model(a.model), parallel.World())
    batch = made.batch(a, 1, 0)
    for loss, _ in train.srpo(a, made.net, made.reward, batch):
        loss.backward()
    whole = [p.grad.clone() for p in made.net.transformer.parameters()]
    made.optimizer.zero_grad()
    for one in bench.one_by_one(batch):
        for loss, _ in train.srpo(a, made.net, made.reward, one):
            (loss / 2).backward()
    for together, p in zip(whole, made.net.transformer.parameters(), strict=True):
        assert (together - p.grad).abs().max() <= 1e-4 * together.abs().max() + 1e-9


@pytest.mark.parametrize("argv, words", [
    (["--model", "black-forest-labs/FLUX.1-dev"], "needs a GPU"),
    (["--model", "black-forest-labs/FLUX.1-dev", "--random-init"], "needs a GPU"),
    (["--repeats", "0"], "--repeats"), (["--no-such-flag"], "unrecognized arguments")],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_what_cannot_be_is_one_line(monkeypatch, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *argv)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1
    assert told.startswith("bench: ") and words in told
