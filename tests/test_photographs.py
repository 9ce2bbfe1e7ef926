"""Claims about offline SRPO: engine/photographs.py, and runs of train.py with --images."""

import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from builders import backward, make_photographs, photo, write_lines
from PIL import Image
from safetensors.torch import load_file
from scripts import call

import command
import direct_align as da
import flow
import prepare
import train
from engine.data import photographs, pictures
from engine.data.cache import Cache
from engine.errors import UserError
from engine.memory import counts, parallel, plan, work
from engine.model.folder import Model

SMALL = ["train.py", "--model", "miniature", "--eval-steps", "2", "--watch", "2", "--eval", "0"]
UNIT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures of three shapes."""
    return make_photographs(tmp_path_factory.mktemp("photographs") / "six")


def read(folder):
    return photographs.read(str(folder), 64, UNIT, parallel.World())


def skipped(capsys):
    """{file: why} of what was told."""
    lines = [line for line in capsys.readouterr().out.splitlines() if " is skipped: " in line]
    return dict(line.removeprefix("--images: ").split(" is skipped: ") for line in lines)


def weights(out):
    return load_file(out / "weights" / "diffusion_pytorch_model.safetensors")


def largest_difference(out, other):
    theirs = weights(other)
    return max((theirs[name] - w).abs().max().item() for name, w in weights(out).items())


# ---------------------------------------------------------------------------------------- what is in a folder
def test_captions_stand_beside_the_pictures_or_in_metadata(tmp_path):
    for name in ("a.png", "b.JPG", "deep/c.webp", "deep/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo(64, 64).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa fox\n  in two lines\n")
    write_lines(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "not this"},
                                              {"file_name": "b.JPG", "caption": "a dog", "id": 1},
                                              {"file_name": "./deep/../deep/d.png", "prompt": "a cat"}])
    write_lines(tmp_path / "deep" / "metadata.jsonl", [{"file_name": "c.webp", "text": "a bird"}])
    found = {p.file.name: p.caption for p in read(tmp_path)}
    assert found == {"a.png": "a fox in two lines", "b.JPG": "a dog", "c.webp": "a bird", "d.png": "a cat"}


def test_captions_as_other_programs_write_them(tmp_path, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / "deep").mkdir(exist_ok=True)
        photo(64, 64).save(tmp_path / "deep" / f"{name}.png")
    (tmp_path / "deep" / "a.caption").write_text("a fox\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "deep\\\\b.png", "prompt": "a dog"}\n')
    (tmp_path / "deep" / "metadata.json").write_text('[{"file_name": "c.png", "caption": "a cat"}]')
    photo(64, 64).save(tmp_path / "d.jfif", "JPEG")
    (tmp_path / "metadata.csv").write_text("file_name,text\nd.jfif,a bird\n")
    assert {p.file.name: p.caption for p in read(tmp_path)} == {"a.png": "a fox", "b.png": "a dog", "c.png": "a cat",
                                                                "d.jfif": "a bird"}
    (tmp_path / "lost.txt").write_text("a fox")
    (tmp_path / "drawn.svg").write_text("<svg/>")
    read(tmp_path)
    assert skipped(capsys) == {"lost.txt": "a caption, and there is no picture of this name",
                               "drawn.svg": "a picture in another format; save it as .jpg or .png"}


class NotRead(NamedTuple):
    """A picture's array or bytes, the file that it is in, and why it is not read."""
    content: object
    name: str
    words: str


GREY = np.full((8, 8), 7)
NOT_READ = [
    NotRead(GREY.astype(np.float32), "float.tif", "its pixels are 32-bit numbers, for which no white is known"),
    NotRead(GREY.astype(np.int32), "whole.tif", "its pixels are 32-bit numbers"),
    NotRead(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "eps.jpg", "cannot identify image file"),
    NotRead(b"P5 8 8 255\n" + bytes(64), "pgm.png", "cannot identify image file"),
    NotRead(b"", "empty.png", "cannot identify image file")]


@pytest.mark.parametrize("case", NOT_READ, ids=lambda case: case.name)
def test_a_picture_is_read_right_or_refused_by_name(tmp_path, case):
    """A file that is really an EPS would start Ghostscript."""
    file = tmp_path / case.name
    if isinstance(case.content, bytes):
        file.write_bytes(case.content)
    else:
        Image.fromarray(case.content).save(file)
    for read_it in (pictures.read_picture, pictures.size_of):
        with pytest.raises(UserError, match=f"{case.name}: cannot be read as a picture: {case.words}"):
            read_it(file)


def test_what_cannot_be_trained_on_is_skipped_and_named_once(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "all")
    here = tmp_path / "all"
    whole = (here / "0.png").read_bytes()
    photo(200, 200).save(here / "cut.jpg")
    (here / "cut.jpg").write_bytes((here / "cut.jpg").read_bytes()[:-2000])
    (here / "half.png").write_bytes(whole[:len(whole) // 2])
    (here / "text.jpg").write_text("no picture")
    photo(31, 31).save(here / "small.png")
    photo(32, 32).save(here / "enough.png")
    photo(500, 100).save(here / "long.png")
    photo(64, 64).save(here / "silent.png")
    photo(64, 64).save(here / "odd.png")
    (here / "odd.txt").write_bytes(b"caf\xe9")
    for name in ("cut", "half", "text", "small", "enough", "long"):
        (here / f"{name}.txt").write_text("a fox")
    (here / "album").symlink_to(folder)
    (here / "silent.txt").write_text("\u200b")
    write_lines(here / "metadata.jsonl", [{"file_name": "gone.png", "text": "a fox"}])
    found = read(here)
    assert [p.file.name for p in found] == [*(f"{n}.png" for n in range(6)), "enough.png"]
    told = skipped(capsys)
    assert told.keys() == {"cut.jpg", "half.png", "text.jpg", "small.png", "long.png", "silent.png",
                           "odd.png", "gone.png", "album"}
    for name in ("cut.jpg", "half.png", "text.jpg"):
        assert told[name].startswith("cannot be read as a picture: ")
    assert told["small.png"] == "31 x 31 pixels: too small, it would be enlarged 2.1 times; at most 2 times are allowed"
    assert told["long.png"] == "500 x 100 pixels: too long, only 40% of it would be left after cropping to 96 x 48"
    assert "no caption" in told["silent.png"] and "not UTF-8" in told["odd.png"]
    assert told["gone.png"] == "named in metadata.jsonl, and there is no such picture"
    assert told["album"] == "a link to a folder, which is not followed; give that folder, or copy it"


def test_of_many_that_are_skipped_ten_are_named(tmp_path, capsys):
    make_photographs(tmp_path / "p", [(64, 64)] + [(8, 8)] * 13)
    assert len(read(tmp_path / "p")) == 1
    said = capsys.readouterr().out
    assert said.count(" is skipped: ") == 10 and "--images: 3 more are skipped" in said


@pytest.mark.parametrize("tokens", [4, 32, 45, 64])
def test_shapes_have_about_the_same_area_and_reach_from_1_2_to_2_1(tokens):
    shapes = photographs.shapes_of(tokens)
    assert (tokens, tokens) in shapes and {(c, r) for r, c in shapes} == set(shapes)
    assert all(abs(r * c / tokens**2 - 1) < (0.15 if tokens == 4 else 0.02) for r, c in shapes)
    assert photographs.nearest(1.0, shapes) == (tokens, tokens)
    assert photographs.nearest(9.0, shapes) == max(shapes, key=lambda shape: shape[1] / shape[0])


def test_a_picture_is_cut_around_its_middle_and_not_squeezed(tmp_path):
    """A disc in the middle of a wide picture is a disc in its shape."""
    y, x = np.mgrid[:120, :200]
    disc = ((x - 99.5)**2 + (y - 59.5)**2 < 50**2)[..., None] * np.full(3, 255)
    Image.fromarray(disc.astype(np.uint8)).save(tmp_path / "disc.png")
    image = photographs.pixels(photographs.Photograph(tmp_path / "disc.png", "", (48, 80)), 1)[0, 0]
    assert image.shape == (48, 80)
    high, wide = (image.max(side).values.gt(0.5).sum().item() for side in (1, 0))
    assert (high, wide) == (40, 40)


def test_a_picture_stands_as_its_camera_was_held_and_any_mode_becomes_rgb(tmp_path):
    picture = photo(64, 32)
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6  # turned by 90 degrees
    for name in ("turned.png", "turned.tif", "turned.webp"):
        picture.save(tmp_path / name, exif=exif, lossless=True)
        assert pictures.size_of(tmp_path / name) == (32, 64)
        upright = pictures.read_picture(tmp_path / name)
        assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(picture), -1))

    exif[pictures.ORIENTATION] = 77  # none of EXIF's values
    picture.save(tmp_path / "odd.png", exif=exif)
    assert pictures.size_of(tmp_path / "odd.png") == pictures.read_picture(tmp_path / "odd.png").size == (64, 32)

    clear = photo(8, 8).convert("RGBA")
    clear.putalpha(0)
    deep = Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16))
    grey = Image.new("L", (8, 8), 7)
    palette = Image.new("P", (8, 8), 0)
    for picture, value in ((clear, 255), (deep, 0x80), (grey, 7), (palette, 0)):
        picture.save(tmp_path / "picture.png")
        found = np.asarray(pictures.read_picture(tmp_path / "picture.png"))
        assert found.shape == (8, 8, 3) and (found == value).all(), picture.mode


# ---------------------------------------------------------------------------------------------------- latents
@torch.no_grad()
def test_encode_is_the_inverse_of_decode(miniature):
    """On pictures of the model's own: decoded, encoded and decoded again they are near, and so are the
    latents."""
    c = flow.encode_prompts(Model("miniature"), ["a red circle", "a blue square"]).condition([0, 1], (4, 4), "cpu")
    x0 = miniature.rollout(flow.noise(miniature, (4, 4), [0, 1]), c, da.sigma_steps(8, 3.0), 3.5)
    image = miniature.decode(x0, (4, 4))
    again = miniature.encode(image)
    assert again.shape == x0.shape and again.dtype == torch.float32
    assert (miniature.decode(again, (4, 4)) - image).abs().mean() < 0.02
    assert (again - x0).norm() / x0.norm() < 0.25


@torch.no_grad()
def test_encode_is_scaled_as_the_transformer_knows_it(miniature):
    image = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    config = miniature.vae.config
    mean = miniature.vae.encode(2 * image - 1).latent_dist.mean
    z = flow.unpack(miniature.encode(image), (3, 5))
    assert (z / config.scaling_factor + config.shift_factor - mean).abs().max() < 1e-5


def test_latents_are_encoded_once_for_all_runs(folder, miniature, tmp_path):
    kept = Cache(tmp_path / "cache")
    times = []

    def encode(image):
        times.append(1)
        return miniature.encode(image)

    def encoded(made_by):
        album = photographs.Album(read(folder), UNIT, 4, 3, slice(0, 3), 0)
        album.encode(encode, made_by, kept, parallel.World())
        return album

    first = encoded("vae")
    met = len(first.photographs)
    again = encoded("vae")
    assert len(times) == met
    assert all(torch.equal(a, b) for a, b in zip(first.encoded, again.encoded, strict=True))
    encoded("another vae")
    assert len(times) == 2 * met
    for step, rows in first.rows.items():
        rows_of_tokens, columns = first.grid(step)
        assert first.latents(rows).shape == (3, rows_of_tokens * columns, 64)


# ------------------------------------------------------------------------------------------------------ order
def made_up(numbers):
    """Photographs of shapes (1, 1), (1, 2) ..., so many of each."""
    found = []
    for shape, number in enumerate(numbers, 1):
        found += [photographs.Photograph(f"{shape} {n}", f"{shape} {n}", (1, shape)) for n in range(number)]
    return found


def captions(album, step):
    return [album.prompts[row] for row in album.rows[step]]


def test_an_update_is_of_one_shape_and_the_same_however_it_is_divided():
    everyone = photographs.Album(made_up([7, 20, 1]), 16, 30, 6, slice(0, 6), 3)
    halves = [photographs.Album(made_up([7, 20, 1]), 16, 30, 6, part, 3)
              for part in (slice(0, 3), slice(3, 6))]
    longer = photographs.Album(made_up([7, 20, 1]), 16, 40, 6, slice(0, 6), 3)
    for step in range(1, 31):
        assert captions(everyone, step) == [c for half in halves for c in captions(half, step)]
        assert captions(everyone, step) == captions(longer, step)
        assert {caption[0] for caption in captions(everyone, step)} == {str(everyone.grid(step)[1])}
    assert halves[0].grids == halves[1].grids == everyone.grids
    other = photographs.Album(made_up([7, 20, 1]), 16, 30, 6, slice(0, 6), 4)
    assert [captions(other, s) for s in other.rows] != [captions(everyone, s) for s in everyone.rows]


def test_every_shape_comes_as_often_as_its_photographs_are_many():
    album = photographs.Album(made_up([10, 25, 5]), 16, 400, 4, slice(0, 4), 0)
    shapes = [grid[1] for grid in album.grids.values()]
    assert [shapes.count(n) for n in (1, 2, 3)] == [100, 250, 50]
    seen = [caption for step in album.rows for caption in captions(album, step)]
    assert {seen.count(photograph.caption) for photograph in made_up([10, 25, 5])} == {40}


# ------------------------------------------------------------------------------------------------------ a run
def run_of(folder, *argv):
    a = command.flags(["--model", "miniature", "--watch", "1", "--eval", "0", "--steps", "3", "--global-batch", "2",
                     "--images", str(folder), *argv])
    return a, prepare.set_up(a, Model(a.model), parallel.World())


def test_some_photographs_are_held_out_and_their_captions_watched(tmp_path, capsys):
    """A tenth at most; with a file of prompts to watch, none. They are shown beside the pictures of their captions."""
    folder = make_photographs(tmp_path / "many")
    for i in range(20):
        shutil.copy(folder / "0.png", folder / f"more{i}.png")
        (folder / f"more{i}.txt").write_text(f"fox {i}")
    a, run = run_of(folder, "--watch", "3")
    assert "--watch-prompts own: 2 of --images are watched and not trained on, a tenth" in capsys.readouterr().out
    assert len(run.watched.watched.texts) == 3 and len(run.watched.photographs) == 2
    assert [title.endswith(" (of --eval-prompts)") for title in run.watched.titles] == [False, False, True]
    assert "0.png" not in {file.name for file in run.curriculum.places["--images"]}
    assert len(run.curriculum.texts["the captions of --images"]) == 24
    a, run = run_of(folder, "--watch-prompts", "miniature/prompts_select.txt")
    assert len(run.curriculum.texts["the captions of --images"]) == 26 and run.watched.photographs == []
    assert run.watched.titles == run.watched.watched.texts


def test_an_update_is_srpo_with_x0_given_and_fresh_noise_two_calls_an_image(folder, monkeypatch):
    a, run = run_of(folder, "--noise", "shared")
    calls = []
    velocity = flow.Flow.velocity
    monkeypatch.setattr(flow.Flow, "velocity", lambda *args: calls.append(1) or velocity(*args))
    batch = run.batch(a, 1, 0)
    terms = backward(a, run.net, run.reward, batch)
    assert len(calls) == 2 and all(torch.equal(term.x0, batch.x0) for term in terms)
    album = run.curriculum
    for row, x0 in zip(album.rows[1], batch.x0, strict=True):
        own = photographs.pixels(album.photographs[row], UNIT)
        assert torch.equal(run.net.encode(own)[0], x0) and batch.c.grid == album.photographs[row].grid
    assert not torch.equal(batch.eps[0], batch.eps[1]) and batch.eps.shape == batch.x0.shape
    assert not torch.equal(run.batch(a, 2, 0).eps[0, 0], batch.eps[0, 0])


def test_the_plan_counts_no_rollout(folder):
    plain = prepare.job(*command.read(["--model", "miniature"]))
    offline = prepare.job(*command.read(["--model", "miniature", "--images", str(folder)]))
    counted = counts.count(plain, torch.bfloat16)
    both, without = (plan.divide(job, counted, 2, torch.bfloat16) for job in (plain, offline))
    assert without.rollout == 0 < both.rollout
    assert (without.update, without.decode, without.reward) == (both.update, both.decode, both.reward)
    assert without.received < both.received
    assert work.update_flop(offline, 2) == without.update


@pytest.fixture
def trained(monkeypatch):
    """trained(flag, ...) runs train.py in this process."""
    def run(*argv):
        monkeypatch.setattr("sys.argv", [*SMALL, *map(str, argv)])
        train.main()
    return run


@pytest.mark.slow
def test_two_ranks_and_four_batches_train_as_one_process(folder, tmp_path, trained):
    """Two ranks x batch 2 = one process x batch 4 = four batches of one. A picture that is skipped is named
    by one rank."""
    here = tmp_path / "photographs"
    shutil.copytree(folder, here)
    (here / "broken.png").write_bytes(b"no")
    (here / "broken.txt").write_text("a fox")
    flags = ["--images", here, "--steps", 2, "--watch-every", 2, "--out"]
    said = call(tmp_path / "printed", *SMALL, *flags, tmp_path / "two", "--global-batch", 4, ranks=2)
    assert said.count("broken.png is skipped: cannot be read as a picture") == 1
    trained(*flags, tmp_path / "one", "--global-batch", 4)
    trained(*flags, tmp_path / "four", "--global-batch", 4, "--batch", 1)
    for name in ("two", "four"):
        assert largest_difference(tmp_path / "one", tmp_path / name) < 1e-6


def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, trained, capsys):
    """Bit for bit, wherever the photographs lie now; with others it is refused."""
    here = tmp_path / "photographs"
    shutil.copytree(folder, here)
    flags = ["--global-batch", 2, "--out"]
    trained("--images", here, "--steps", 2, "--cache", tmp_path / "cache", *flags, tmp_path / "whole")
    trained("--images", here, "--steps", 1, *flags, tmp_path / "parts")
    shutil.move(here, tmp_path / "elsewhere")
    again = ["--steps", 2, *flags, tmp_path / "parts", "--resume"]
    trained("--images", tmp_path / "elsewhere", *again)
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") == 0

    (tmp_path / "elsewhere" / "0.txt").write_text("a dog")
    with pytest.raises(SystemExit) as stop:
        trained("--images", tmp_path / "elsewhere", *again)
    assert stop.value.code == 2
    assert "the captions of --images is not what it was when the run began" in capsys.readouterr().err


def test_explain_tells_where_the_latents_come_from(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", [*SMALL, "--images", str(folder), "--explain", "--out", str(tmp_path)])
    train.main()
    told = capsys.readouterr().out
    assert "flux.Flux.encode(" in told and "flow.Flow.rollout(" not in told
