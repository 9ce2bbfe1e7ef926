"""Claims about bench.py: its code for full size, at a tiny one."""

import json
import sys

import open_clip
import pytest

from experiments import bench
from engine import parallel
from engine import plan

TINY_CLIP = {"embed_dim": 32,
             "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
             "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}}


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model", "miniature", "--batch", "2",
                                      "--rollout-steps", "2", "--repeats", "1", *argv])
    bench.main()


def test_random_weights_of_flux_1_devs_classes(monkeypatch, capsys):
    read = lambda part: json.load(open(f"miniature/{part}/config.json"))
    monkeypatch.setattr(plan, "FLUX_DEV", (read("transformer"), read("vae"), 16))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: TINY_CLIP)
    model, _, text_tokens = bench.random_models(parallel.World())
    assert text_tokens == 16 and all(p.isfinite().all() for p in model.transformer.parameters())
    run(monkeypatch, "--random-init")
    assert "this project" in capsys.readouterr().out


def test_the_released_habits_are_compared_on_the_same_work(monkeypatch, capsys):
    run(monkeypatch, "--released")
    told = capsys.readouterr().out
    habits = ["this project", "+ one image at a time", "+ text features four times", "+ VAE not frozen",
              "+ anomaly detection"]
    assert [told.index(h) for h in habits] == sorted(told.index(h) for h in habits)


def test_full_size_without_a_gpu_is_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--model", "black-forest-labs/FLUX.1-dev")
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
