"""Claims about the Frechet distance to true photos: the metric that is a number of a set."""

import json
import sys

import pytest
import torch
from PIL import Image

import evaluate
from engine.data.prompt_files import read_prompts
from evaluation.metrics import frechet
from miniature import world

PROMPTS = read_prompts("miniature/prompts_eval.txt")[:96]


def drawn(style, seed=1):
    """Pictures [96, 3, 64, 64] of PROMPTS in a style, of other positions and grain than the reference's."""
    scenes = [world.parse(prompt) for prompt in PROMPTS]
    kind = torch.tensor([kind for kind, _ in scenes])
    layout = torch.tensor([layout for _, layout in scenes])
    return world.draw(world.scenes_of, len(PROMPTS), seed, kind, layout, style)[0]


def test_the_distance_of_two_gaussians_is_the_closed_form():
    """Of one shifted by c it is |c|^2; of one k times as wide, (k - 1)^2 times its variance, each axis."""
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)).double()
    shift = torch.arange(12) / 10
    assert frechet.distance(x, x).item() == pytest.approx(0, abs=1e-8)
    assert frechet.distance(x + shift, x).item() == pytest.approx(shift.square().sum().item())
    apart = x - x.mean(0)
    assert frechet.distance(3 * apart, apart).item() == pytest.approx(4 * apart.var(0).sum().item())


def test_true_photos_are_near_and_every_other_style_is_far():
    near = frechet.of_pictures(drawn("realistic photo"), PROMPTS)["frechet"]
    assert near["mean"] < 1 and near["n"] == 96
    for style in world.STYLES:
        if style != "realistic photo":
            assert frechet.of_pictures(drawn(style), PROMPTS)["frechet"]["mean"] > 10


def test_its_standard_error_is_the_spread_between_sets():
    """Bootstrap against eight sets of pictures of their own, within a factor of two."""
    sets = [frechet.of_pictures(drawn("CG render", seed), PROMPTS)["frechet"] for seed in range(8)]
    spread = torch.tensor([found["mean"] for found in sets]).std().item()
    # The sets share their prompts, which the bootstrap draws anew: it may only be the larger one.
    assert 0.5 * spread < sets[0]["se"] < 4 * spread


def test_prompts_of_another_world_and_small_sets_have_none():
    images = drawn("")
    assert frechet.of_pictures(images, ["a dog"] * 96) == {"frechet": None}
    few = frechet.FEWEST - 1
    assert frechet.of_pictures(images[:few], PROMPTS[:few]) == {"frechet": None}
    some = frechet.of_pictures(images, ["a dog"] * 48 + PROMPTS[48:])["frechet"]
    assert some == frechet.of_pictures(images[48:], PROMPTS[48:])["frechet"]


def test_evaluate_shows_one_number_of_a_row_and_keeps_twelve_of_a_picture(monkeypatch, tmp_path):
    for row, style in (("photo", "realistic photo"), ("cg", "CG render")):
        (tmp_path / row).mkdir()
        for i, image in enumerate(drawn(style)):
            array = (image * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(array).save(tmp_path / row / f"{i:05d}.png")
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    monkeypatch.setattr(sys, "argv", [
        "evaluate.py", "--images", f"photo={tmp_path}/photo", f"cg={tmp_path}/cg", "--prompts",
        f"{tmp_path}/p.txt", "--metrics", "frechet", "--out", f"{tmp_path}/out"])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    photo, cg = (rows[name]["overall"]["frechet"] for name in ("photo", "cg"))
    assert photo["mean"] < 1 < 10 < cg["mean"] and photo["n"] == cg["n"] == 96
    in_memory = frechet.of_pictures(drawn("CG render"), PROMPTS)["frechet"]
    assert cg["mean"] == pytest.approx(in_memory["mean"], rel=0.02)
    rows = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["Frechet"]
    line = json.loads((tmp_path / "out" / "scores" / "cg" / "frechet.0.jsonl").read_text().splitlines()[0])
    assert len(line["scores"]) == 12
