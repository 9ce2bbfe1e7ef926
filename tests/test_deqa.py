"""Claims about metrics/deqa.py: at tiny size it gives what DeQA-Score's released code gives
(golden/deqa.json), and it refuses weights that are not exactly its own."""

import json

import numpy as np
import pytest
import torch
from builders import DEQA as GOLDEN
from builders import deqa_state, make_deqa
from PIL import Image
from safetensors.torch import save_file

from engine.errors import UserError
from evaluation.metrics import deqa


def picture(width, height, k):
    y, x, c = np.mgrid[:height, :width, :3]
    wave = x * (3 + k) + y * (7 - k) * (c + 1) + x * y // 5 + 60 * c
    return Image.fromarray((wave % 256).astype(np.uint8))


@pytest.fixture(scope="module")
def state():
    return deqa_state()


@pytest.fixture
def folder(tmp_path):
    """folder({file name: state}, config) -> a folder with these weight files."""
    def write(files, config=GOLDEN["config"]):
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name, part in files.items():
            save = save_file if name.endswith("safetensors") else torch.save
            save(part, tmp_path / name)
        return tmp_path
    return write


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return deqa.DeQA(make_deqa(tmp_path_factory.mktemp("deqa")))


@pytest.fixture(scope="module")
def pictures():
    return [picture(w, h, k) for k, (w, h) in enumerate(GOLDEN["sizes"])]


def halves(state):
    keys = sorted(state)
    return [{k: state[k] for k in keys[i::2]} for i in (0, 1)]


def test_deqa_equals_the_authors_code_at_tiny_size(scorer, pictures):
    """Six pictures, wide, tall, square and one pixel wide, to 1e-5 in float32 (measured: 2e-6 of the scores,
    4e-6 of the logits). The scores span 3.0 to 3.8."""
    seen = []
    hook = scorer.network.register_forward_hook(lambda module, args, logits: seen.append(logits))
    scores = scorer(pictures, [""] * 6)["deqa"]
    hook.remove()
    assert scores.shape == (6,) and scores.dtype == torch.float32
    assert (seen[0] - torch.tensor(GOLDEN["logits"])).abs().max() < 1e-5
    assert (scores - torch.tensor(GOLDEN["scores"])).abs().max() < 1e-5


def test_a_batch_gives_what_one_by_one_gives_and_the_prompts_are_not_read(scorer, pictures):
    together = scorer(pictures, ["a cat"] * 6)["deqa"]
    alone = torch.cat([scorer([p], ["a dog"])["deqa"] for p in pictures])
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("names", [("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
                                   ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")])
def test_the_weights_may_be_in_shards_of_either_sort(folder, state, scorer, pictures, names):
    sharded = deqa.DeQA(deqa.fetch(folder(dict(zip(names, halves(state), strict=True)))))
    assert torch.equal(sharded(pictures[:2])["deqa"], scorer(pictures[:2])["deqa"])


def test_the_weights_become_the_dtype_that_is_asked_for(folder, state, pictures):
    half = deqa.DeQA(folder({"model.safetensors": {k: v.bfloat16() for k, v in state.items()}}),
                     dtype=torch.bfloat16)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert half(pictures)["deqa"].sub(torch.tensor(GOLDEN["scores"])).abs().max() < 0.2


def test_the_tables_of_older_transformers_are_passed_over(folder, state):
    deqa.DeQA(folder({"model.safetensors": state | {"model.layers.0.self_attn.rotary_emb.inv_freq":
                                                    torch.ones(4)}}))


ODD = {
    "missing": (lambda s: s.pop("model.visual_abstractor.vit_eos"), "vit_eos is missing"),
    "extra": (lambda s: s.update({"model.more.bias": torch.ones(2)}), r"more.bias \[2\] is not its own"),
    "shape": (lambda s: s.update({"lm_head.weight": torch.ones(9, 32)}), r"head.weight \[9, 32\] is not"),
    "none": (lambda s: s.clear(), "lm_head.weight is missing"),
}


@pytest.mark.parametrize("change, told", ODD.values(), ids=ODD)
def test_a_tensor_missing_extra_or_of_another_shape_is_refused_in_one_line(folder, state, change, told):
    changed = dict(state)
    change(changed)
    path = folder({"model.safetensors": changed})
    with pytest.raises(UserError, match=told) as error:
        deqa.DeQA(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="config.json"):
        deqa.DeQA(tmp_path)
    with pytest.raises(UserError, match="lacks 'hidden_size'"):
        deqa.DeQA(folder({}, {"vocab_size": 32000}))
    with pytest.raises(UserError, match="no model"):
        deqa.fetch(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        deqa.fetch(tmp_path / "nothing")
    path = folder({})
    (path / "model.safetensors").write_bytes(b"half of it")
    with pytest.raises(UserError, match="cannot be loaded as DeQA-Score"):
        deqa.DeQA(path)


def test_of_a_repository_the_safetensors_are_fetched_or_else_the_bins(folder, monkeypatch):
    asked, path, hub = [], folder({"pytorch_model.bin": {}}), "zhiyuanyou/DeQA-Score-Mix3"
    safe, bins = ["config.json", "model*.safetensors"], ["config.json", "pytorch_model*.bin"]
    monkeypatch.setattr(deqa, "fetched", lambda where, files: asked.append((where, files)) or path)
    assert deqa.fetch() == path and asked == [(hub, safe), (hub, bins)]
    save_file({}, path / "model.safetensors")
    assert deqa.fetch("some/other") == path and asked[2:] == [("some/other", safe)]


def test_the_question_and_the_levels_are_the_authors():
    """Ids by their tokenizer.model; -200 is where their code puts the picture."""
    assert [*deqa.BEFORE, -200, *deqa.AFTER] == GOLDEN["input_ids"]
    assert [token for token, _ in deqa.LEVELS.values()] == GOLDEN["level_ids"]
    assert [mark for _, mark in deqa.LEVELS.values()] == [5, 4, 3, 2, 1]


def test_a_picture_is_padded_to_a_square_on_clips_mean_colour():
    square = deqa.squared(Image.new("RGB", (7, 4), (1, 2, 3)))
    assert square.size == (7, 7) and square.getpixel((3, 0)) == tuple(GOLDEN["padding"]) == (122, 116, 104)
    inside = (np.asarray(square) == (1, 2, 3)).all(-1)
    assert inside.all(1).tolist() == [False, True, True, True, True, False, False] == inside.any(1).tolist()


@pytest.mark.parametrize("odd", [Image.new("RGB", (1, 1)), Image.new("RGB", (900, 1), (255, 255, 255)),
                                 Image.new("L", (5, 3), 128).convert("RGB")], ids=["1x1", "900x1", "grey"])
def test_any_picture_has_a_score_between_1_and_5(scorer, odd):
    score = scorer([odd])["deqa"]
    assert score.isfinite().all() and 1 <= score.item() <= 5
