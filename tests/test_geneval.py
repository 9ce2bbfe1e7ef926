"""Claims about metrics/geneval.py: GenEval's rules on hand-made boxes, and its two models at a tiny size."""

import json
import shutil

import pytest
import torch
from builders import geneval_metadata, make_geneval, write_lines
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.errors import UserError
from evaluation import tables
from evaluation.metrics import geneval as g

RED, BLUE = (255, 0, 0), (0, 0, 255)


def thing(x0=0, y0=0, x1=10, y1=10, score=0.95):
    return g.Thing(score, (x0, y0, x1, y1), None)


@pytest.mark.parametrize("a, relations", [
    ((0, 40, 10, 50), {"left of"}), ((90, 40, 100, 50), {"right of"}),
    ((40, 0, 50, 10), {"above"}), ((40, 90, 50, 100), {"below"}),
    ((0, 0, 10, 10), {"left of", "above"}), ((90, 0, 100, 10), {"right of", "above"}),
    ((40, 40, 50, 50), set()),                      # the same box
    ((42, 40, 52, 50), set()),                      # an offset of 2 = 0.1 * (10 + 10) is none
    ((43, 40, 53, 50), set()),                      # 1 left of 3: below a half
    ((45, 40, 55, 50), {"right of"}),               # 3 left of 5
    ((20, 32, 30, 42), {"left of"}),                # 20 to the left and 8 up: (18, 6) of 21.5
])
def test_relative_position(a, relations):
    assert g.relative_position(a, (40, 40, 50, 50)) == relations


def count(n):
    return {"tag": "counting", "include": [{"class": "dog", "count": n}],
            "exclude": [{"class": "dog", "count": n + 1}]}


DOG, TWO = {"class": "dog", "count": 1}, {"dog": [thing()], "cat": [thing(50, 0, 60, 10)]}
CAT_RIGHT = {"include": [DOG, {"class": "cat", "count": 1, "position": ["right of", 0]}]}
RED_DOG = {"include": [DOG | {"color": "red"}]}
RED_DOG_BLUE_CAT = {"include": [DOG | {"color": "red"}, {"class": "cat", "count": 1, "color": "blue"}]}


@pytest.mark.parametrize("entry, objects, colors, right", [
    ({"include": [DOG]}, {}, {}, False),
    ({"include": [DOG]}, {"dog": [thing()] * 3, "cat": [thing()]}, {}, True),   # more are not wrong
    ({"include": [DOG, DOG | {"class": "cat"}]}, TWO, {}, True),
    ({"include": [DOG, DOG | {"class": "cow"}]}, TWO, {}, False),
    (count(2), {"dog": [thing()]}, {}, False),
    (count(2), {"dog": [thing()] * 2, "cat": [thing()] * 5}, {}, True),
    (count(2), {"dog": [thing()] * 3}, {}, False),                              # too many
    (RED_DOG, {"dog": [thing()] * 2}, {"dog": ["red", "blue"]}, True),          # the surest is asked
    (RED_DOG, {"dog": [thing()] * 2}, {"dog": ["blue", "red"]}, False),
    (RED_DOG_BLUE_CAT, TWO, {"dog": ["red"], "cat": ["blue"]}, True),
    (RED_DOG_BLUE_CAT, TWO, {"dog": ["blue"], "cat": ["red"]}, False),
    (CAT_RIGHT, TWO, {}, True),
    (CAT_RIGHT, {"dog": TWO["cat"], "cat": TWO["dog"]}, {}, False),
    (CAT_RIGHT, {"cat": TWO["cat"]}, {}, False),                                # nothing to be right of
    (CAT_RIGHT, TWO | {"cat": [thing(), thing(50, 0, 60, 10)]}, {}, False),     # the surest cat is not there
])
def test_judge(entry, objects, colors, right):
    assert g.judge(entry, objects, lambda name, things: colors[name][:len(things)]) is right


def logits(*queries, classes=80):
    """({class index: probability} of each query) -> class_logits [Q, classes + 1]; the rest is "nothing"."""
    out = torch.full((len(queries), classes + 1), 1e-9)
    for q, known in enumerate(queries):
        for c, p in known.items():
            out[q, c] = p
        out[q, -1] = 1 - sum(known.values()) + 1e-9
    return out.log()


def masks(*boxes, size=(16, 16), sure=20.0):
    """Mask logits [Q, *size], +sure in the box and -sure outside."""
    out = torch.full((len(boxes), *size), -sure)
    for q, (x0, y0, x1, y1) in enumerate(boxes):
        out[q, y0:y1, x0:x1] = sure
    return out


def test_instances_are_mmdetections():
    """Score = class x mask, boxes with an excluded end, one query may be two classes, the surest first."""
    found = g.instances(logits({16: 0.5}, {16: 0.6, 15: 0.35}, {17: 0.29}),
                        masks((2, 3, 5, 9), (0, 0, 16, 16), (1, 1, 2, 2)), (16, 16), (16, 16), (16, 16), 0.3)
    assert [(t.box, round(t.score, 3)) for t in found["dog"]] == [((0, 0, 16, 16), 0.6), ((2, 3, 5, 9), 0.5)]
    assert set(found) == {"dog", "cat"} and found["dog"][1].mask.sum() == 18
    half_sure = masks((0, 0, 16, 16), sure=0.1)  # sigmoid 0.525: 0.5 falls below the confidence
    assert g.instances(logits({16: 0.5}), half_sure, (16, 16), (16, 16), (16, 16), 0.3) == {}
    assert g.instances(logits({16: 0.9}), masks((0, 0, 0, 0)), (16, 16), (16, 16), (16, 16), 0.3) == {}


def test_instances_lose_the_padding_and_return_to_the_pictures_size():
    """Of a 64 x 64 input with a picture of 32 x 48 in it: its right half, in the picture's own 16 x 96."""
    found = g.instances(logits({16: 0.9}), masks((6, 0, 16, 16)), (64, 64), (32, 48), (16, 96), 0.3)["dog"]
    assert found[0].mask.shape == (16, 96) and found[0].box == (48, 0, 96, 16)


def test_at_most_16_of_a_class_and_100_in_all():
    def number(queries):
        found = g.instances(logits(*queries), masks(*[(0, 0, 8, 8)] * len(queries)), *[(16, 16)] * 3, 0.3)
        return {name: len(things) for name, things in found.items()}

    assert number([{16: 0.9}] * 20 + [{15: 0.4}]) == {"dog": 16, "cat": 1}
    assert number([{16: 0.9}] * 100 + [{15: 0.4}]) == {"dog": 16}


def test_the_detectors_input():
    """The short side is 800 unless the long one is 1333; grey padding at the right and below."""
    def sizes(w, h):
        pixels, inner = g.detector_input(Image.new("RGB", (w, h), RED))
        return tuple(pixels.shape[-2:]), inner, pixels

    assert sizes(512, 512)[:2] == ((800, 800), (800, 800))
    assert sizes(1024, 256)[:2] == ((352, 1344), (333, 1333))
    shape, inner, pixels = sizes(1, 40)
    assert (shape, inner) == ((1344, 64), (1333, 33))
    assert torch.allclose(pixels[0, :, 1332, 32], torch.tensor([(255 - 123.675) / 58.395, -116.28 / 57.12,
                                                                -103.53 / 57.375]))
    assert torch.allclose(pixels[0, 0, 1333:], torch.tensor((128 - 123.675) / 58.395))


def test_the_recipe():
    assert (g.CONFIDENCE, g.CONFIDENCE_COUNTING, g.MOST, g.POSITION, g.GREY) == (0.3, 0.9, 16, 0.1, "#999")
    assert len(g.CLASSES) == len(set(g.CLASSES)) == 80 and g.CLASSES[64:66] == ("computer mouse", "tv remote")
    assert sum(g.TASKS.values()) == 553 and len(g.TASKS) == 6 and g.PICTURES == 4
    assert len(g.COLORS) == 10 and len(g.TEMPLATES) == 3
    of_tasks = tables.mean(torch.tensor([1.0, 0, 1, 1]), ["colors", "colors", "colors", "position"])
    assert of_tasks["mean"] == pytest.approx((2 / 3 + 1) / 2)  # of the tasks, not of the pictures


# -------------------------------------------------------------------------------------------------- metadata
def test_metadata_is_read(tmp_path):
    write_lines(tmp_path / g.METADATA, geneval_metadata())
    assert g.read_metadata(tmp_path) == g.read_metadata(tmp_path / g.METADATA) == geneval_metadata()


@pytest.mark.parametrize("wrong", [
    {"include": [{"class": "dragon", "count": 1}]}, {"include": []}, {"include": [{"class": "dog"}]},
    {"include": [{"class": "dog", "count": 1, "color": "teal"}]}, {"include": "dog"}, {"tag": "beauty"},
    {"prompt": ""}, {"include": [{"class": "dog", "count": 0}]},
    {"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]},      # of itself
    {"exclude": [{"class": "dog", "count": "3"}]},
])
def test_other_files_are_not_the_metadata(tmp_path, wrong):
    entries = geneval_metadata()
    entries[7] |= wrong
    with pytest.raises(UserError, match="not GenEval's evaluation_metadata.jsonl") as told:
        g.read_metadata(write_lines(tmp_path / "m.jsonl", entries))
    assert "\n" not in str(told.value)


def test_a_short_file_or_none_is_not_the_metadata(tmp_path):
    with pytest.raises(UserError, match="six tasks"):
        g.read_metadata(write_lines(tmp_path / "m.jsonl", geneval_metadata()[1:]))
    (tmp_path / "m.jsonl").write_text("<html>\n")
    with pytest.raises(UserError, match="not GenEval's"):
        g.read_metadata(tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="no such file"):
        g.read_metadata(tmp_path / "none")


def test_the_metadata_is_downloaded_once_and_whole(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "source", geneval_metadata())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(g, "URL", source.as_uri())
    with pytest.raises(UserError, match="cannot be downloaded: invalid hash"):
        g.read_metadata()
    assert not list((tmp_path / "hub").iterdir())
    monkeypatch.setattr(g, "SHA256", "")
    assert g.read_metadata() == geneval_metadata()
    source.unlink()
    assert g.read_metadata() == geneval_metadata()


# ------------------------------------------------------------------------------------------------ the models
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_geneval(tmp_path_factory.mktemp("geneval"))


def test_pictures_of_any_size_are_scored(folder, monkeypatch):
    """With no confidence asked, everything is found, and the surest dog has some colour."""
    for name, value in dict(SHORT=64, LONG=107, CONFIDENCE=0, CONFIDENCE_COUNTING=1, CANDIDATES=999).items():
        monkeypatch.setattr(g, name, value)
    files = g.fetch(folder)
    assert files == g.Files(metadata=folder / g.METADATA, mask2former=folder / "mask2former",
                            clip=folder / "clip")
    score, seen = g.GenEval(files), []
    colors, detector = score.colors, score.detector
    monkeypatch.setattr(score, "colors", lambda *a: seen.extend(colors(*a)) or seen[-1:])
    monkeypatch.setattr(score, "detector", lambda x: [out.abs() for out in detector(x)])  # no mask is empty
    pictures = [Image.effect_noise(size, 99).convert("RGB") for size in ((70, 50), (1, 1), (1, 60), (90, 1))]
    out = score(pictures + pictures[:1], [RED_DOG | {"tag": "colors"}] * 4 + [count(1)])
    assert list(out) == list(g.COLUMNS)
    assert out["geneval"].shape == (5,) and out["geneval"].dtype == torch.float32
    assert len(seen) == 4 and out["geneval"].tolist() == [float(color == "red") for color in seen] + [0.0]


def test_colour_is_of_the_thing_on_grey(folder):
    """A detector and a CLIP made by hand: a red dog at the left of a blue picture, a blue cat at the right;
    what is around a thing does not colour it."""
    score = g.GenEval(g.fetch(folder))
    picture = Image.new("RGB", (64, 32), BLUE)
    picture.paste(RED, (0, 0, 16, 16))
    picture.paste(RED, (16, 16, 32, 32))
    # The dog's mask is two red squares at a diagonal: its box is half blue, which must become grey.
    seen = masks((0, 0, 4, 4), (8, 0, 16, 8), size=(8, 16))
    seen[0, 4:, 4:8] = 20
    score.detector = lambda pixels: (logits({16: 0.8}, {15: 0.95}), seen)
    rgb = {"red": RED, "blue": BLUE, "black": (0, 0, 0), "white": (255, 255, 255)}

    class Clip:
        visual = type("", (), dict(image_size=(32, 32), image_mean=[0.6] * 3, image_std=[1.0] * 3))

        def encode_image(self, images):
            return images.mean((2, 3))

        def encode_text(self, texts):
            return torch.stack([torch.tensor(rgb.get(g.COLORS[t], (153,) * 3)) / 255 - 0.6 for t in texts])

    score.clip, score.tokenizer = Clip(), lambda texts: torch.tensor(
        [next(i for i, c in enumerate(g.COLORS) if f"a photo of a {c}" in t) for t in texts])

    def judged(tag, *include):
        return score([picture], [{"tag": tag, "include": list(include)}])["geneval"].item()

    cat = {"class": "cat", "count": 1}
    assert judged("color_attr", DOG | {"color": "red"}, cat | {"color": "blue"}) == 1
    assert judged("color_attr", DOG | {"color": "blue"}, cat | {"color": "red"}) == 0
    assert judged("position", DOG, cat | {"position": ["right of", 0]}) == 1
    assert judged("position", DOG, cat | {"position": ["left of", 0]}) == 0
    assert judged("two_object", DOG, cat) == 1 and judged("counting", DOG) == 0  # 0.8 is not above 0.9
    assert judged("counting", cat) == 1


def test_what_a_folder_lacks_is_downloaded(folder, tmp_path, monkeypatch):
    """A file of OpenAI's CLIP is of a named architecture, with the QuickGELU that the name does not tell."""
    asked = []
    model = g.open_clip.create_model(f"local-dir:{folder / 'clip'}")
    monkeypatch.setattr(g, "fetched", lambda *a: asked.append(a) or folder / "mask2former")
    monkeypatch.setattr(g.open_clip, "download_pretrained",
                        lambda cfg: asked.append(cfg) or folder / "clip" / "open_clip_model.safetensors")
    monkeypatch.setattr(g.open_clip, "create_model", lambda *a, **more: asked.append((a, more)) or model)
    files = g.fetch(write_lines(tmp_path / g.METADATA, geneval_metadata()))
    assert files.metadata == tmp_path / g.METADATA and asked[0][0] == g.DETECTOR
    assert asked[1]["quick_gelu"] and "vit_large_patch14_clip_224.openai" in asked[1]["hf_hub"]
    g.GenEval(files)
    assert asked[2] == (("ViT-L-14",), {"require_pretrained": True, "force_quick_gelu": True,
                                        "pretrained": str(files.clip)})
    monkeypatch.setattr(g.open_clip, "download_pretrained", lambda cfg: 1 / 0)
    with pytest.raises(UserError, match="ViT-L-14 openai: not on this machine"):
        g.fetch(tmp_path)


def test_a_class_in_ten_colours(folder):
    """Three templates a colour, their unit features averaged and of unit length again."""
    score = g.GenEval(g.fetch(folder))
    features = score.color_features("dog")
    assert features.shape[0] == 10 and torch.allclose(features.norm(dim=-1), torch.ones(10))
    texts = ["a photo of a pink dog", "a photo of a pink-colored dog", "a photo of a pink object"]
    units = torch.nn.functional.normalize(score.clip.encode_text(score.tokenizer(texts)), dim=-1).mean(0)
    assert torch.allclose(features[g.COLORS.index("pink")], units / units.norm(), atol=1e-6)


@pytest.mark.parametrize("change, what", [
    (lambda s: s.pop("class_predictor.bias"), "class_predictor.bias"),
    (lambda s: s.pop("model.pixel_level_module.encoder.encoder.layers.1.blocks.0.intermediate.dense.bias"),
     "mlp.fc1.bias"),
    (lambda s: s.update({"model.box_head.weight": torch.zeros(2)}), "model.box_head.weight"),
])
def test_no_tensor_of_the_detector_is_missing_or_unread(folder, tmp_path, change, what):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "mask2former" / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})
    with pytest.raises(UserError, match=what) as told:
        g.GenEval(g.fetch(tmp_path))
    assert "\n" not in str(told.value)


def test_other_models_are_told_in_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "clip" / "open_clip_model.safetensors"
    state = load_file(path)
    state.pop("text_projection")
    save_file(state, path)
    with pytest.raises(UserError, match="not a CLIP of open_clip.*text_projection") as told:
        g.GenEval(g.fetch(tmp_path))
    assert "\n" not in str(told.value)
    path.unlink()
    with pytest.raises(UserError, match="not a CLIP of open_clip"):
        g.GenEval(g.fetch(tmp_path))
    path = tmp_path / "mask2former" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"]["0"] = "wall"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not detect COCO's 80 classes"):
        g.GenEval(g.fetch(tmp_path))
