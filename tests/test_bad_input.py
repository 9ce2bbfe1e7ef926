"""Claim: a user's mistake ends in one clear line and exit status 2, before anything is written."""

import json
import shutil
import sys

import pytest
import torch
from scripts import call

import evaluate
import sample
import train
from engine import data

SMALL = ["--model", "miniature", "--steps", "1", "--batch", "1", "--rollout-steps", "1", "--eval-steps", "1",
         "--watch", "1", "--eval", "0"]


def one_line(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: ")
    return lines[0]


@pytest.mark.parametrize("argv, words", [
    (["--model", "no/such/folder"], "no such folder"),
    (["--model", "tests"], "not a FLUX.1 folder, it has no model_index.json, transformer"),
    (["--model", "black-forest-labs/FLUX.1-dev"],
     "needs a GPU and there is none; what works here: --model miniature"),
    (["--size", "60"], "60 x 60: both sides must be multiples of 16"),
    (["--size", "0"], "--size 0: must be a whole number, at least 1"),
    (["--prompts", "no.txt"], "--prompts no.txt: no such file"),
    (["--eval-prompts", "no.txt"], "--eval-prompts no.txt: no such file"),
    (["--control", ""], "--control"), (["--neg", "CG render, "], "must be words, none of them empty"),
    (["--steps", "0"], "--steps 0: must be a whole number, at least 1"), (["--batch", "-1"], "--batch -1"),
    (["--lr", "0"], "--lr 0: must be a finite number, above 0"), (["--lr", "nan"], "--lr nan: must be"),
    (["--steps", "many"], "--steps many: must be a whole number"),
    (["--no-such-flag"], "unrecognized arguments"),
    (["--sigma-range", "0.5", "0.9"], "give MAX then MIN"),
    (["--sigma-range", "1.0", "0.5"], "--sigma-range 1.0: must be a finite number, at least 0 and below 1"),
    (["--branches", "sideways"], "must be denoise, invert"),
    (["--groundtruth-ratio", "1.5"], "--groundtruth-ratio 1.5: must be a finite number"),
    (["--reward", "no.pt"], "--reward no.pt: no such file"),
    (["--reward", "README.md"], "not a reward model"),
    (["--reward", "tests"], "not a reward model"),
    (["--resume", "--out", "tests"], "--out tests is not a run's folder, and not empty"),
    (["--plan", "--card", "B7"], "--card B7: its peak is not known here; known are H200"),
    (["--out", "README.md/run"], "--out README.md/run: cannot be written: Not a directory"),
    (["--replicas", "2"], "does not divide"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_one_line_and_status_2(monkeypatch, capsys, tmp_path, argv, words):
    out = tmp_path / "run"
    assert words in one_line(monkeypatch, capsys, "--out", out, *argv)
    assert not out.exists()


@pytest.mark.parametrize("content, words", [(b"", "every line is blank"), (b" \n\n", "every line is blank"),
                                            (b"caf\xe9\n", "not UTF-8 text (byte 3)")])
def test_prompt_files(monkeypatch, capsys, tmp_path, content, words):
    (tmp_path / "p.txt").write_bytes(content)
    assert words in one_line(monkeypatch, capsys, "--out", tmp_path / "run", "--prompts", tmp_path / "p.txt")


def test_the_papers_prompts_come_from_the_hub_each_once(monkeypatch, tmp_path):
    """HPDv2's two layouts: pairs with a field `prompt`, and flat lists; no hub is one line that says what to
    give."""
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "a fox"}, {"prompt": "a dog"},
                                                     {"prompt": "a fox"}]))
    (tmp_path / "list.json").write_text(json.dumps(["a street", "a fox"]))
    monkeypatch.setattr(data, "hf_hub_download", lambda dataset, name, repo_type: tmp_path / (
        "train.json" if name == "train.json" else "list.json"))
    assert data.read_prompts("hpdv2") == ["a fox", "a dog"]
    assert data.read_prompts("hpdv2-benchmark") == ["a street", "a fox"]
    monkeypatch.setattr(data, "hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="ymhao/HPDv2 cannot be fetched .*; give a text file"):
        data.read_prompts("hpdv2")


def test_a_model_folder_says_what_it_lacks(monkeypatch, capsys, tmp_path):
    shutil.copytree("miniature", tmp_path / "m", ignore=shutil.ignore_patterns(".build", "*.py"))
    shutil.rmtree(tmp_path / "m" / "vae")
    assert "it has no vae" in one_line(monkeypatch, capsys, "--model", tmp_path / "m")
    (tmp_path / "m" / "vae").mkdir()
    (tmp_path / "m" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert "says StableDiffusionPipeline, not FluxPipeline" in one_line(monkeypatch, capsys,
                                                                        "--model", tmp_path / "m")


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json",
                                  "text_encoder_2/model.safetensors"])
def test_a_damaged_model_file_is_one_line(monkeypatch, capsys, tmp_path, part):
    shutil.copytree("miniature", tmp_path / "m", ignore=shutil.ignore_patterns(".build", "*.py"))
    (tmp_path / "m" / part).write_bytes(b"not what it should be")
    said = one_line(monkeypatch, capsys, "--model", tmp_path / "m", "--out", tmp_path / "run")
    assert ("not JSON" if part.endswith(".json") else "cannot be loaded as FLUX.1") in said
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_a_reward(monkeypatch, capsys, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "r.pt")
    assert "not a reward model" in one_line(monkeypatch, capsys, "--reward", tmp_path / "r.pt",
                                            "--out", tmp_path / "run")


def test_a_run_is_not_overwritten_by_accident(monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out", str(out)])
    train.main()
    capsys.readouterr()
    log = (out / "log.jsonl").read_bytes()
    assert "already holds a run; --resume continues it, --overwrite deletes it" in one_line(
        monkeypatch, capsys, "--out", out)
    assert "--lr 2.5e-05, now 0.1" in one_line(monkeypatch, capsys, "--out", out, "--resume", "--lr", "0.1")
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out", str(out), "--resume", "--steps", "2"])
    train.main()
    capsys.readouterr()
    assert "is past it, at step_00002" in one_line(monkeypatch, capsys, "--out", out, "--resume")
    log = (out / "log.jsonl").read_bytes()
    assert "--form released, now plain" in one_line(monkeypatch, capsys, "--out", out, "--resume",
                                                    "--form", "plain")
    assert (out / "log.jsonl").read_bytes() == log


def test_long_prompts_are_counted_once(monkeypatch, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n" + "a red circle left of " * 20 + "\n")
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--steps", "2",
                                      "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "run")])
    train.main()
    assert "1 of 3 prompts are longer than the text encoder takes" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["evaluate.py", "sample.py"])
def test_the_other_scripts_too(script, tmp_path):
    """With no flag at all they are for FLUX.1-dev."""
    said = call(tmp_path / "printed", script, status=2)
    assert said.strip().count("\n") == 0 and "what works here: --model miniature" in said


@pytest.mark.parametrize("room", [sample, evaluate], ids=["sample.py", "evaluate.py"])
@pytest.mark.parametrize("argv, words", [(["--first", "0"], "--first 0: must be a whole number, at least 1"),
                                         (["--eval-steps", "0"], "--eval-steps 0: must be a whole number"),
                                         (["--seed", "-1"], "--seed -1: must be a whole number"),
                                         (["--out", "README.md/x"], "cannot be written: Not a directory"),
                                         (["--size", "60"], "must be multiples of 16")])
def test_sampling_says_what_is_wrong_before_it_works(monkeypatch, capsys, tmp_path, room, argv, words):
    monkeypatch.setattr(sys, "argv", ["script", "--model", "miniature", "--out", str(tmp_path / "o"), *argv])
    with pytest.raises(SystemExit) as stop:
        room.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and words in said[0]
