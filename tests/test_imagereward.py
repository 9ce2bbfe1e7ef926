"""Claims about rewards/imagereward.py: what the authors' code scores, ours does too."""

from types import SimpleNamespace

import pytest
import torch
from builders import make_imagereward
from PIL import Image

from engine.errors import UserError
from evaluation import metrics
from rewards import base
from rewards import imagereward as ir
from rewards.base import Files

# Of the authors' code (its own BLIP, transformers 4.30) with the weights, pictures and tokens below.
GOLDEN = [0.5534543991088867, -0.2969665825366974, 0.14237727224826813]
GOLDEN_NEXT = [-0.4632948637008667, 0.1986493319272995, 0.6947442889213562]  # each prompt, the next picture


def picture(i):
    w, h = [(48, 48), (90, 60), (31, 77)][i]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    pixels = torch.stack([x * (5 + i) % 256, y * (7 + i) % 256, (x * y + 40 * i) % 256], -1)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def prompt(i, words):
    return " ".join(f"w{5 + (3 * j + i) % 30}" for j in range(words))


PICTURES, PROMPTS = [picture(i) for i in range(3)], [prompt(0, 2), prompt(1, 7), prompt(2, 33)]


def scorer(files):
    """The metric imagereward, of `ir.Files`."""
    args = SimpleNamespace(control="realistic photo", neg="CG render")
    return metrics.find("imagereward").load(files, args, "cpu")


@pytest.fixture
def folder(tmp_path):
    return make_imagereward(tmp_path)


def test_our_rewards_are_the_authors(folder):
    score = scorer(ir.fetch(folder))
    ours = score(PICTURES, PROMPTS)
    assert list(ours) == list(ir.COLUMNS) and ours["imagereward"].dtype == torch.float32
    assert (ours["imagereward"] - torch.tensor(GOLDEN)).abs().max() < 1e-5
    ours = score(PICTURES[1:] + PICTURES[:1], PROMPTS)["imagereward"]
    assert (ours - torch.tensor(GOLDEN_NEXT)).abs().max() < 1e-5


def test_the_tokenizer_is_the_one_beside_or_berts(folder, monkeypatch):
    assert ir.fetch(folder) == ir.fetch(folder / ir.FILE) == Files(folder / ir.FILE, folder)
    monkeypatch.setattr(base, "fetched", lambda at, files: folder if at == ir.HUB else (at, files))
    (folder / "vocab.txt").unlink()
    assert ir.fetch() == (folder / ir.FILE, (ir.TOKENIZER, ir.TOKENIZER_FILES))


def test_a_prompt_is_cut_at_35_tokens_and_a_batch_changes_nothing(folder):
    score = scorer(ir.fetch(folder / ir.FILE))
    cut = score([PICTURES[2]], [prompt(2, 60)])["imagereward"]
    assert (cut - GOLDEN[2]).abs().max() < 1e-5


def test_one_pixel_pictures_and_no_words(folder):
    pictures = [Image.new("RGB", size, "red") for size in ((1, 1), (1, 40), (70, 1))]
    rewards = scorer(ir.fetch(folder))(pictures, ["", "W5, w6!", "unheard of"])["imagereward"]
    assert rewards.shape == (3,) and rewards.isfinite().all()


@pytest.mark.parametrize("change, what", [
    (lambda s: s.pop("blip.visual_encoder.blocks.1.norm2.bias"), "layer_norm2.bias"),
    (lambda s: s.pop("mlp.layers.7.bias"), "mlp.7.bias"),
    (lambda s: [s.pop(f"mlp.layers.6.{part}") for part in ("weight", "bias")], "mlp.6.weight"),
    (lambda s: s.pop("blip.visual_encoder.pos_embed"), "position_embedding"),
    (lambda s: s.update({"blip.itm_head.weight": torch.zeros(2)}), "blip.itm_head.weight"),
    (lambda s: s.update({"blip.visual_encoder.norm.weight": torch.zeros(2)}), "size mismatch"),
    (lambda s: s.clear(), "imagereward: not a reward model"),
])
def test_no_tensor_is_missing_or_unread(folder, change, what):
    state = torch.load(folder / ir.FILE, weights_only=True)
    change(state)
    torch.save(state, folder / ir.FILE)
    with pytest.raises(UserError, match=what) as told:
        scorer(ir.fetch(folder))
    assert "\n" not in str(told.value)


def test_wrong_files_are_told_in_one_line(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="holds no ImageReward.pt"):
        ir.fetch(empty)
    with pytest.raises(UserError, match="no such file or folder"):
        ir.fetch(empty / "none")
    (empty / ir.FILE).write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="imagereward: not a reward model") as told:
        scorer(Files(empty / ir.FILE, folder))
    assert "\n" not in str(told.value)
    for text, what in (("w40\n", "41 words"), ("", "5 words")):  # transformers takes no words for a tokenizer
        (empty / "vocab.txt").write_text(text and (folder / "vocab.txt").read_text() + text)
        with pytest.raises(UserError, match=f"a tokenizer of {what}"):
            scorer(Files(folder / ir.FILE, empty))


def test_the_published_sizes():
    """What the recipe fixes, where a tiny checkpoint could hide an error."""
    assert (ir.REWARD_MEAN, ir.REWARD_STD) == (0.16717362830052426, 1.0333394966054072)
    assert (ir.TOKENS, ir.HEAD) == (35, 64)
