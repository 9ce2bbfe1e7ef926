"""Claims about sample.py's pictures: their sizes, the strength of a LoRA, several weights side by side, the labels."""

import json
import sys

import pytest
import torch
from PIL import Image, ImageChops, ImageFont

import evaluate
import flow
import sample
from engine.command_line import extent, sides
from engine.data.pictures import read_picture
from engine.model import lora
from engine.model.folder import Model
from evaluation import sheets
from evaluation.picture_folders import places, save_grid

PROMPTS = ["a red circle", "a blue square above a green triangle"]
SMALL = ["--model", "miniature", "--eval-steps", "2"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with a LoRA for the miniature, of which no number is 0."""
    folder = tmp_path_factory.mktemp("lora")
    net = flow.load(Model("miniature"))
    lora.add_adapters(net.transformer, 2)
    lora.start(net.transformer, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora.adapters(net.transformer).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    lora.export(net.transformer, folder, flow.parallel.World())
    return folder


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["sample.py", *SMALL, *map(str, argv)])
    sample.main()


@pytest.mark.parametrize("text, size, both", [("64", 64, (64, 64)), ("64x64", 64, (64, 64)),
                                              ("96x64", [96, 64], (64, 96)), ("64X80", [64, 80], (80, 64))])
def test_a_size_is_a_side_or_width_and_height(text, size, both):
    assert extent(text) == size and sides(size) == both


@pytest.mark.parametrize("argv, words", [
    (["--size", "64x"], "64x: must be a whole number, at least 1, or WIDTHxHEIGHT"),
    (["--size", "1x2x3"], "WIDTHxHEIGHT"),
    (["--size", "72x64"], "--size 72 x 64: both sides must be multiples of 16"),
    (["--strength", "0.5"], "none of --weights is one"),
    (["--strength", "0.5", "--weights", "miniature/transformer"], "none of --weights is one"),
    (["--weights", "grid.png=base", "--weights", "base"], "a name is used twice, or taken"),
    (["--weights", "base", "srpo=miniature/transformer", "a red circle"], "a path where a prompt is expected"),
    (["--weights", "base", "--weights", "base"], "a name is used twice")])
def test_what_cannot_be_sampled_is_one_line(monkeypatch, tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *argv, "--out", tmp_path / "out", *([] if argv[-1] == "a red circle" else ["a red circle"]))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and words in said and "\n" not in said and not (tmp_path / "out").exists()


def test_several_weights_are_lines_of_one_grid(monkeypatch, tmp_path, adapters, capsys):
    """A folder each, of pictures that are not square; run again it samples nothing anew; other weights are refused."""
    argv = [*PROMPTS, "--weights", "base", "--weights", f"mine={adapters}", "--size", "96x64",
            "--out", tmp_path / "out"]
    run(monkeypatch, *argv)
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*.png"))
    assert files == ["base/00000.png", "base/00001.png", "grid.png", "mine/00000.png", "mine/00001.png"]
    pictures = {name: read_picture(tmp_path / "out" / name) for name in files}
    assert all(pictures[name].size == (96, 64) for name in files if name != "grid.png")
    assert ImageChops.difference(pictures["base/00001.png"], pictures["mine/00001.png"]).getbbox()
    grid = pictures["grid.png"]
    for name in ("base/00000.png", "mine/00001.png"):
        assert contains(grid, pictures[name])
    made = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files if name != "grid.png"}
    run(monkeypatch, *argv)
    assert made == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in made}
    with pytest.raises(SystemExit):
        run(monkeypatch, *argv, "--weights", "third=miniature/transformer")
    assert "were made with other lines; delete that folder" in capsys.readouterr().err


def test_evaluate_samples_pictures_that_are_not_square_and_labels_its_sheet(tmp_path, adapters):
    assert evaluate.run([*SMALL, "--first", "2", "--size", "96x64", "--metrics", "statistics", "--weights",
                         f"mine={adapters}", "--out", str(tmp_path / "out")]) == 0
    picture = read_picture(tmp_path / "out" / "mine" / "00001.png")
    assert picture.size == (96, 64) and contains(read_picture(tmp_path / "out" / "sheet.png"), picture)
    assert "96 x 64 pixels, 2 steps" in (tmp_path / "out" / "table.md").read_text()


def contains(sheet, picture):
    """Whether a picture is somewhere in a sheet, pixel for pixel."""
    width, height = picture.size
    return any(not ImageChops.difference(sheet.crop((x, y, x + width, y + height)), picture).getbbox()
               for x in range(sheet.width - width + 1) for y in range(sheet.height - height + 1)
               if sheet.getpixel((x, y)) == picture.getpixel((0, 0)))


@pytest.mark.parametrize("strength", [0.5, 0.0, -1.0, 1.0])
def test_a_loras_strength_is_the_factor_of_its_change(adapters, strength):
    base, whole, some = (flow.load(Model("miniature"), weights, strength=factor).transformer.state_dict()
                         for weights, factor in ((None, 1.0), (str(adapters), 1.0), (str(adapters), strength)))
    changed = 0
    for name, tensor in base.items():
        torch.testing.assert_close(some[name], tensor + strength * (whole[name] - tensor), atol=1e-6, rtol=0)
        changed += not torch.equal(whole[name], tensor)
    assert changed > 20


def test_a_strength_is_noted_with_the_pictures(monkeypatch, tmp_path, adapters):
    run(monkeypatch, "a red circle", "--weights", adapters, "--strength", "0.5", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "made.json").read_text())["strength"] == 0.5


# ------------------------------------------------------------------------------------------------------- labels
def test_a_label_has_room_and_is_cut():
    font = ImageFont.load_default(12)
    lines = sheets.wrapped("a very long prompt " * 9 + "x" * 99 + "\nnoise seed 7", font, 100)
    assert len(lines) == sheets.MOST_LINES + 1 and lines[-1] == "noise seed 7" and "..." in lines[-2]
    assert all(font.getlength(line) <= 100 for line in lines)
    assert sheets.wrapped("x" * 99, font, 100) == ["x" * len(sheets.wrapped("x" * 99, font, 100)[0])]


def test_a_sheet_has_every_picture_and_a_label_for_each_line_and_column():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    columns = [sheets.Column(f"prompt {i}", [red, blue]) for i in range(10)]
    with_names, without = sheets.drawn(["before", "after"], columns), sheets.drawn(["", ""], columns)
    beside = with_names.width - without.width
    assert 20 < beside < 128 and with_names.height == without.height
    counts = {colour: number for number, colour in with_names.getcolors(2**24)}
    assert counts[(255, 0, 0)] == counts[(0, 0, 255)] == 10 * 128 * 128
    darkest = with_names.convert("L").crop((beside, 0, with_names.width, 20)).getextrema()[0]
    assert darkest < 80 and with_names.convert("L").crop((0, 30, beside, 200)).getextrema()[0] < 80


@pytest.mark.parametrize("n, side", [(1, 64), (3, 64), (10, 64), (2, 200)])
def test_a_grids_pictures_are_found_again(tmp_path, n, side):
    images = torch.arange(n).div(n)[:, None, None, None].expand(n, 3, side, side)
    save_grid(images, tmp_path / "grid.png")
    grid = read_picture(tmp_path / "grid.png")
    boxes = places(grid, side, n)
    cut = [grid.crop((x, y, x + w, y + h)).getcolors() for x, y, w, h in boxes]
    assert [len(colours) for colours in cut] == [1] * n
    assert [colours[0][1][0] for colours in cut] == [int(255 * i / n + 0.5) for i in range(n)]
