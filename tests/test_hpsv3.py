"""Claims about rewards/hpsv3.py: what the authors' code scores, ours does too; and what it is given."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from builders import make_hpsv3, photo
from safetensors.torch import load_file, save_file
from test_imagereward import picture
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

import rewards
import srpo_reward as sr
from engine.errors import UserError
from engine.memory import counts
from evaluation import metrics
from rewards import base, hpsv3
from rewards.base import Files

# mu of the authors' code (their model class and pictures on transformers 4.45.2, float32), with the weights below
GOLDEN = [0.7486178278923035, 0.6092107892036438, 0.5285220146179199]
PICTURES = [picture(i).resize(size) for i, size in enumerate([(720, 720), (300, 200), (64, 97)])]
PROMPTS = ["a red circle", "W5, w6! {x}", ""]
SIZES = [(720, 720), (1024, 1024), (300, 200), (64, 97), (28, 900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(folder):
    return rewards.load_reward("hpsv3", where=str(folder))


def test_our_scores_are_the_authors(folder, reward):
    """As a column of the table, in mu; r is a tenth of it; three pictures of three sizes at once."""
    args = SimpleNamespace(control="realistic photo", neg="CG render")
    column = metrics.find("hpsv3").load(hpsv3.fetch(folder), args, "cpu")(PICTURES, PROMPTS)
    assert list(column) == ["hpsv3"]
    assert (column["hpsv3"] - torch.tensor(GOLDEN)).abs().max() < 1e-5
    r0, r1, r2 = reward.of_pictures(PICTURES, sr.texts_of(PROMPTS, "realistic photo", "CG render"))
    assert (10 * r0.value() - torch.tensor(GOLDEN)).abs().max() < 1e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_its_processors(size):
    """Tensors as transformers' processor makes them of numbers in [0, 1], PIL pictures as it makes them of 8 bits."""
    image = photo(*size)
    limits = {"shortest_edge": hpsv3.PIXELS, "longest_edge": hpsv3.PIXELS}
    x = hpsv3.pixels(image)[None]
    theirs = Qwen2VLImageProcessor(size=limits, do_rescale=False)(x, return_tensors="pt")
    ours = hpsv3.patches(hpsv3.normalised(hpsv3.fitted(x), hpsv3.MEAN, hpsv3.STD))[0]
    torch.testing.assert_close(ours, theirs.pixel_values, atol=1e-4, rtol=0)
    _, rows, columns = theirs.image_grid_thw[0].tolist()
    assert len(ours) == rows * columns
    theirs = Qwen2VLImageProcessorPil(size=limits)(image, return_tensors="pt").pixel_values
    exact = hpsv3.normalised(hpsv3.pixels(hpsv3.fitted(image))[None], hpsv3.MEAN, hpsv3.STD)
    torch.testing.assert_close(hpsv3.patches(exact)[0], theirs, atol=1e-4, rtol=0)
    # a grey level in the mean; of a picture that is blown up, 8 bits cut off what swings beyond black and white
    assert (hpsv3.patches(exact)[0] - ours).abs().mean() < 1.5 / 255 / min(hpsv3.STD)


def test_each_text_is_read_and_the_picture_gets_a_gradient(reward):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    texts = sr.texts_of(["a red circle", "a blue square"], "realistic photo", "CG render")
    r0, r1, r2 = reward.of(images, texts)
    r = sr.branch_reward("released", "denoise", r0, r1, r2, 0.2, 1.5)
    gradient, = torch.autograd.grad(r.value().sum(), images)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert set(r.seen.scores) == {(0, 1), (0, 2)}  # the bare prompt is not scored
    assert (r1.value() != r2.value()).all()


def test_two_texts_are_alike_only_if_their_tokens_are(reward):
    assert reward.reads_alike("a dog", "a dog") and not reward.reads_alike("a dog", "a cat")


def test_the_published_text_and_numbers():
    """What the authors trained with, where a tiny file could hide an error. The digest is of their text."""
    digest = hashlib.sha256(hpsv3.template().encode()).hexdigest()
    assert digest == "d2bd49bb6c77a870071f49e8dce38ce6bfc71dd2060de9a1f7a03711f3e67e45"
    assert (hpsv3.PIXELS, hpsv3.HEAD, hpsv3.EYE_HEAD, hpsv3.HPSv3.unit) == (200_704, 128, 80, 10)


@pytest.mark.parametrize("change, what", [
    (lambda s: s.pop("visual.blocks.1.norm2.bias"), "vision.blocks.1.norm2.bias"),
    (lambda s: s.pop("rm_head.5.bias"), "head.5.bias"),
    (lambda s: s.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(256)}), "o_proj.bias"),
    (lambda s: s.update({"rm_head.7.weight": torch.zeros(2)}), "head.7.weight"),
    (lambda s: s.update({"model.norm.weight": torch.zeros(3)}), "size mismatch"),
    (lambda s: s.update({"model.norm.weight": torch.zeros(256, dtype=torch.int32)}), "no weights"),
    (lambda s: s.update({"model.embed_tokens.weight": torch.zeros(300, 256)}), "a tokenizer of 263 words"),
    (lambda s: s.clear(), "hpsv3: not a reward model"),
])
def test_no_tensor_is_missing_or_unread(folder, tmp_path, change, what):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / hpsv3.FILE)
    change(state)
    save_file(state, tmp_path / hpsv3.FILE)
    with pytest.raises(UserError, match=what) as told:
        rewards.load_reward("hpsv3", where=str(tmp_path))
    assert "\n" not in str(told.value)


def test_the_tokenizer_is_the_one_beside_or_qwens(folder, tmp_path, monkeypatch):
    assert hpsv3.fetch(folder) == hpsv3.fetch(folder / hpsv3.FILE) == Files(folder / hpsv3.FILE, folder)
    (tmp_path / hpsv3.FILE).touch()
    monkeypatch.setattr(base, "fetched", lambda at, files: tmp_path if at == hpsv3.HUB else (at, files))
    assert hpsv3.fetch() == (tmp_path / hpsv3.FILE, (hpsv3.TOKENIZER, hpsv3.TOKENIZER_FILES))
    (tmp_path / hpsv3.FILE).unlink()
    with pytest.raises(UserError, match="holds no HPSv3.safetensors"):
        hpsv3.fetch()


@pytest.mark.slow
def test_its_memory_and_work():
    """7.7 billion parameters without the part that predicts words, 15.5 GB in bf16; 14 TFLOP a text."""
    with FakeTensorMode():
        network, call, times, texts = hpsv3.image_network()
        assert counts.bytes_of(network) == pytest.approx(15.5e9, rel=0.01) and (times, texts) == (1, True)
        assert counts.flop_of(call) == pytest.approx(14.3e12, rel=0.02)
        assert counts.saved_by(network.parameters(), call, grad=True) < 2 * 2**30
