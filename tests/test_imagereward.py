"""Claims about metrics/imagereward.py: what the authors' code scores, ours does too."""

import zlib

import pytest
import torch
from PIL import Image

from evaluation.metrics import imagereward as ir

WIDTH, TEXT, DEPTH, PATCH, SIDE, VOCAB, POSITIONS = 128, 64, 2, 16, 3, 40, 40
HEAD = [TEXT, 1024, 128, 64, 16, 1]
# Of the authors' code (its own BLIP, transformers 4.30) with the weights, pictures and tokens below.
GOLDEN = [0.5534543991088867, -0.2969665825366974, 0.14237727224826813]
GOLDEN_NEXT = [-0.4632948637008667, 0.1986493319272995, 0.6947442889213562]  # each prompt, the next picture


def layout():
    """{name: shape} of ImageReward.pt, at a tiny size."""
    out = {}

    def linear(name, i, o):
        out.update({f"{name}.weight": (o, i), f"{name}.bias": (o,)})

    def norm(name, n):
        out.update({f"{name}.weight": (n,), f"{name}.bias": (n,)})

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    out.update({f"{eye}.cls_token": (1, 1, WIDTH), f"{eye}.pos_embed": (1, SIDE ** 2 + 1, WIDTH),
                f"{eye}.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
                f"{eye}.patch_embed.proj.bias": (WIDTH,),
                f"{text}.embeddings.word_embeddings.weight": (VOCAB, TEXT),
                f"{text}.embeddings.position_embeddings.weight": (POSITIONS, TEXT)})
    norm(f"{eye}.norm", WIDTH)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for i in range(DEPTH):
        block, layer = f"{eye}.blocks.{i}", f"{text}.encoder.layer.{i}"
        norm(f"{block}.norm1", WIDTH), norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH), linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH), linear(f"{block}.mlp.fc2", 4 * WIDTH, WIDTH)
        for part, source in (("attention", TEXT), ("crossattention", WIDTH)):
            linear(f"{layer}.{part}.self.query", TEXT, TEXT)
            linear(f"{layer}.{part}.self.key", source, TEXT)
            linear(f"{layer}.{part}.self.value", source, TEXT)
            linear(f"{layer}.{part}.output.dense", TEXT, TEXT), norm(f"{layer}.{part}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", TEXT, 4 * TEXT), linear(f"{layer}.output.dense", 4 * TEXT, TEXT)
        norm(f"{layer}.output.LayerNorm", TEXT)
    for n, i, o in zip((0, 2, 4, 6, 7), HEAD, HEAD[1:]):
        linear(f"mlp.layers.{n}", i, o)
    linear("blip.vision_proj", WIDTH, 256), linear("blip.text_proj", TEXT, 256)
    return out


def weight(name, shape):
    """Small noise that the name alone decides; norms are around 1."""
    noise = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return noise + 1 if len(shape) == 1 and name.endswith("weight") else noise


def picture(i):
    w, h = [(48, 48), (90, 60), (31, 77)][i]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    pixels = torch.stack([x * (5 + i) % 256, y * (7 + i) % 256, (x * y + 40 * i) % 256], -1)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def prompt(i, words):
    return " ".join(f"w{5 + (3 * j + i) % 30}" for j in range(words))


PICTURES, PROMPTS = [picture(i) for i in range(3)], [prompt(0, 2), prompt(1, 7), prompt(2, 33)]


def make_imagereward(folder):
    """Fill a folder: a tiny ImageReward.pt and a tokenizer beside it."""
    state = {name: weight(name, shape) for name, shape in layout().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    torch.save(state, folder / ir.FILE)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{n}" for n in range(5, VOCAB)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_imagereward(tmp_path)


def test_our_rewards_are_the_authors(folder):
    score = ir.ImageReward(ir.fetch(folder))
    ours = score(PICTURES, PROMPTS)
    assert tuple(ours) == ir.COLUMNS and ours["imagereward"].dtype == torch.float32
    assert (ours["imagereward"] - torch.tensor(GOLDEN)).abs().max() < 1e-5
    ours = score(PICTURES[1:] + PICTURES[:1], PROMPTS)["imagereward"]
    assert (ours - torch.tensor(GOLDEN_NEXT)).abs().max() < 1e-5


def test_the_tokenizer_is_the_one_beside_or_berts(folder, monkeypatch):
    assert ir.fetch(folder) == ir.fetch(folder / ir.FILE) == (folder / ir.FILE, folder)
    monkeypatch.setattr(ir.weights, "fetched", lambda at, files: folder if at == ir.HUB else (at, files))
    (folder / "vocab.txt").unlink()
    assert ir.fetch() == (folder / ir.FILE, (ir.TOKENIZER, ir.TOKENIZER_FILES))


def test_a_prompt_is_cut_at_35_tokens_and_a_batch_changes_nothing(folder):
    score = ir.ImageReward(ir.fetch(folder / ir.FILE))
    cut = score([PICTURES[2]], [prompt(2, 60)])["imagereward"]
    assert (cut - GOLDEN[2]).abs().max() < 1e-5


def test_one_pixel_pictures_and_no_words(folder):
    pictures = [Image.new("RGB", size, "red") for size in ((1, 1), (1, 40), (70, 1))]
    rewards = ir.ImageReward(ir.fetch(folder))(pictures, ["", "W5, w6!", "unheard of"])["imagereward"]
    assert rewards.shape == (3,) and rewards.isfinite().all()


@pytest.mark.parametrize("change, what", [
    (lambda s: s.pop("blip.visual_encoder.blocks.1.norm2.bias"), "layer_norm2.bias"),
    (lambda s: s.pop("mlp.layers.7.bias"), "mlp.7.bias"),
    (lambda s: [s.pop(f"mlp.layers.6.{part}") for part in ("weight", "bias")], "mlp.6.weight"),
    (lambda s: s.pop("blip.visual_encoder.pos_embed"), "position_embedding"),
    (lambda s: s.update({"blip.itm_head.weight": torch.zeros(2)}), "blip.itm_head.weight"),
    (lambda s: s.update({"blip.visual_encoder.norm.weight": torch.zeros(2)}), "size mismatch"),
    (lambda s: s.clear(), "not an ImageReward"),
])
def test_no_tensor_is_missing_or_unread(folder, change, what):
    state = torch.load(folder / ir.FILE, weights_only=True)
    change(state)
    torch.save(state, folder / ir.FILE)
    with pytest.raises(ValueError, match=what) as told:
        ir.ImageReward(ir.fetch(folder))
    assert "\n" not in str(told.value)


def test_wrong_files_are_told_in_one_line(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="holds no ImageReward.pt"):
        ir.fetch(empty)
    with pytest.raises(ValueError, match="no such file or folder"):
        ir.fetch(empty / "none")
    (empty / ir.FILE).write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="not an ImageReward") as told:
        ir.ImageReward((empty / ir.FILE, folder))
    assert "\n" not in str(told.value)
    for text, what in (("w40\n", "41 words"), ("", "5 words")):  # transformers takes no words for a tokenizer
        (empty / "vocab.txt").write_text(text and (folder / "vocab.txt").read_text() + text)
        with pytest.raises(ValueError, match=f"a tokenizer of {what}"):
            ir.ImageReward((folder / ir.FILE, empty))


def test_the_published_sizes():
    """What the recipe fixes, where a tiny checkpoint could hide an error."""
    assert (ir.REWARD_MEAN, ir.REWARD_STD) == (0.16717362830052426, 1.0333394966054072)
    assert (ir.TOKENS, ir.HEAD) == (35, 64)
