"""Claims about the rewards: each in its real checkpoint layout with tiny random weights, the metrics'
constants, and pictures prepared in two ways that agree."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (CLIPConfig, CLIPModel, CLIPTokenizerFast, SiglipConfig, SiglipModel,
                          SiglipVisionModel)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import evaluate
from engine import old_flags as room
from evaluation import metrics
from engine import plan
from rewards import pictures as preprocess
import srpo_reward as sr
from evaluation import tables
import train

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
PROMPTS = ["a red circle", "a blue square above a white circle"]


def photo(width, height, seed=0):
    """A picture with smooth and fine parts, as PIL."""
    g = np.random.default_rng(seed)
    small = Image.fromarray(g.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = g.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8))


def tensors(picture):
    return preprocess.pixels(picture)[None]


def make_pickscore(folder):
    """Fill a folder in PickScore v1's layout, with the tokenizer of its processor."""
    shutil.copytree("miniature/tokenizer", folder, dirs_exist_ok=True)
    words = len(CLIPTokenizerFast.from_pretrained(folder))
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    CLIPModel(CLIPConfig(text_config=dict(small, vocab_size=words, max_position_embeddings=16,
                                          eos_token_id=words - 1),
                         vision_config=dict(small, image_size=224, patch_size=32), projection_dim=16,
                         logit_scale_init_value=4.6)).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")  # as transformers of 2023 wrote it: position tables too
    state |= {f"{side}_model.embeddings.position_ids": torch.arange(n)[None] for side, n in (("text", 16),
                                                                                             ("vision", 50))}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_aesthetic(folder):
    """Fill a folder: a whole SigLIP, as the hub's, and the predictor's head beside it."""
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    SiglipModel(SiglipConfig(vision_config=dict(small, image_size=56, patch_size=14),
                             text_config=dict(small, vocab_size=50))).save_pretrained(folder)
    sizes = [32, 1024, 128, 64, 16, 1]
    head = {f"scoring_head.{2 * i}.{k}": torch.randn(*(sizes[i + 1], sizes[i])[:2 if k == "weight" else 1])
            * sizes[i] ** -0.5 for i in range(5) for k in ("weight", "bias")}
    torch.save(head, folder / "aesthetic_predictor_v2_5.pth")
    return folder


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory):
    return make_pickscore(tmp_path_factory.mktemp("pickscore"))


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory):
    return make_aesthetic(tmp_path_factory.mktemp("aesthetic"))


# ------------------------------------------------------------------------------------------ the same pictures
@pytest.mark.parametrize("size", [(720, 720), (301, 224), (333, 512), (227, 224), (64, 64), (5, 400),
                                  (1, 1)], ids=str)
def test_a_picture_is_prepared_as_the_authors_libraries_do(size):
    """open_clip's own transform, transformers' own processors, to float rounding."""
    picture = photo(*size)
    clip = CLIPImageProcessorPil()(picture, return_tensors="pt")["pixel_values"][0]
    siglip = SiglipImageProcessorPil(size=dict(height=56, width=56))(picture, return_tensors="pt")
    cropped = open_clip.image_transform(224, is_train=False, mean=MEAN, std=STD)(picture)
    close = dict(atol=2e-6, rtol=0)
    torch.testing.assert_close(preprocess.exact(picture, 224, MEAN, STD, "crop-floor"), clip, **close)
    torch.testing.assert_close(preprocess.exact(picture, 224, MEAN, STD, "crop"), cropped, **close)
    torch.testing.assert_close(preprocess.exact(picture, 56, [0.5] * 3, [0.5] * 3, "stretch"),
                               siglip["pixel_values"][0], **close)


def test_hpsv2_letterboxes_in_black():
    """224 x 112 white: its middle half stays white, above and below is black; a side of 74.4 is 74."""
    white = preprocess.exact(Image.new("RGB", (224, 112), "white"), 224, [0] * 3, [1] * 3, "letterbox")
    assert white[:, 56:168].min() == 1 and white[:, :56].max() == 0 and white[:, 168:].max() == 0
    wide = preprocess.exact(Image.new("RGB", (301, 100), "white"), 224, [0] * 3, [1] * 3, "letterbox")
    assert (wide[0, :, 0] == 1).nonzero().flatten().tolist() == list(range(75, 149))  # 74 of 224 rows


@pytest.mark.parametrize("fit", ["crop", "crop-floor", "letterbox", "stretch"])
def test_training_sees_what_evaluation_sees(fit):
    """Tensors with antialias against PIL in 8 bits: at most a grey level in the mean; without antialias ten
    times as far and more."""
    picture = photo(720, 500)
    exact = preprocess.exact(picture, 224, [0] * 3, [1] * 3, fit)
    ours = preprocess.differentiable(tensors(picture), 224, [0] * 3, [1] * 3, fit)[0]
    naive = preprocess.fitted(tensors(picture), 224, fit, antialias=False)[0]
    assert (ours - exact).abs().mean() < 1 / 255
    assert (naive - exact).abs().mean() > 10 * (ours - exact).abs().mean()


def test_the_two_ways_agree_in_score():
    """Cosines of the miniature's reward, eight pictures of 720 pixels down to 64: PIL rounds to 8 bits, which
    moves them by less than 3e-3 (measured: 7.6e-4 in the mean, 2.2e-3 at most); without antialias it is
    twenty times as much and more (measured: 33 times)."""
    reward = sr.load_reward("miniature/reward")
    C = reward.text_features(PROMPTS[:1])
    apart = {True: [], False: []}
    for seed in range(8):
        picture = photo(720, 720, seed)
        true = sr.preference(reward.picture_features([picture]), C)
        for antialias in apart:
            x = preprocess.fitted(tensors(picture), reward.size, "crop", antialias)
            x = (x - torch.tensor(reward.mean).view(3, 1, 1)) / torch.tensor(reward.std).view(3, 1, 1)
            apart[antialias].append((sr.preference(reward.features(x), C) - true).abs().item())
        ours = sr.preference(reward.image_features(tensors(picture)), C)
        assert abs((ours - true).item()) == pytest.approx(apart[True][-1], abs=1e-6)
    assert max(apart[True]) < 3e-3 and sum(apart[False]) > 20 * sum(apart[True])


@pytest.mark.parametrize("mode, size", [("RGB", (300, 40)), ("L", (50, 50)), ("RGBA", (33, 70)),
                                        ("P", (9, 9)), ("1", (1, 1)), ("CMYK", (20, 20)), ("LA", (2, 7))],
                         ids=str)
def test_any_picture_gets_a_finite_score_from_every_reward(mode, size, tmp_path, pickscore, aesthetic):
    suffix = "jpg" if mode == "CMYK" else "png"
    photo(*size).convert("RGB").convert(mode).save(tmp_path / f"a.{suffix}")
    picture = preprocess.read_picture(tmp_path / f"a.{suffix}")
    assert picture.mode == "RGB" and picture.size == size
    for reward in (sr.load_reward("miniature/reward"), sr.load_reward("pickscore", where=pickscore),
                   sr.load_reward("aesthetic", where=aesthetic)):
        C0, C1, C2 = reward.conditions(["a red circle " * 99], "realistic photo", "CG render")
        assert sr.preference(reward.picture_features([picture]), C0).isfinite().all()


# ------------------------------------------------------------------------------------------- the rewards
def test_pickscore_is_its_authors_metric(pickscore):
    """exp(logit_scale) cos of transformers' CLIPModel, processor as published; a twentieth of it in training;
    a prompt longer than the encoder is cut."""
    reward = sr.load_reward("pickscore", where=str(pickscore))
    model, tokenizer = CLIPModel.from_pretrained(pickscore), CLIPTokenizerFast.from_pretrained(pickscore)
    prompts, picture = [*PROMPTS, "a red circle left of " * 20], photo(300, 227)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pixels = CLIPImageProcessorPil()(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = model(**tokens, pixel_values=pixels).logits_per_image[0]
        C0, C1, C2 = reward.conditions(prompts, "realistic photo", "CG render")
        r = sr.preference(reward.picture_features([picture]), C0)
    torch.testing.assert_close(20 * r, theirs, atol=1e-4, rtol=0)
    assert model.logit_scale.exp().item() == pytest.approx(99.48, abs=0.01)  # 4.6: PickScore's is about 100
    column = metrics.METRICS["pickscore"][2](pickscore, room.parser("").parse_args([]), "cpu")(
        [picture] * 3, prompts)["pickscore"]
    torch.testing.assert_close(column, theirs, atol=1e-4, rtol=0)


def test_aesthetic_is_its_authors_metric_and_s1_relates_clean_to_noised(aesthetic):
    """A(x) = the head's five linear layers on SigLIP's normalised pooled output; r = A / 10; the relative
    reward is A(x) - A(x + noise), whatever the words; both sides have a gradient."""
    reward = sr.load_reward("aesthetic", where=str(aesthetic))
    siglip, picture = SiglipVisionModel.from_pretrained(aesthetic), photo(80, 56)
    state = torch.load(aesthetic / "aesthetic_predictor_v2_5.pth", weights_only=True)

    def A(pixels):
        h = F.normalize(siglip(pixels).pooler_output, dim=-1)
        for i in range(0, 10, 2):
            h = h @ state[f"scoring_head.{i}.weight"].T + state[f"scoring_head.{i}.bias"]
        return h[:, 0]

    processor = SiglipImageProcessorPil(size=dict(height=56, width=56))
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    noise = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(0)) * 0.1 / 0.5
    C0, C1, C2 = reward.conditions(PROMPTS[:1], "realistic photo", "CG render")
    with torch.no_grad():
        f, clean, noised = reward.picture_features([picture]), A(pixels), A(pixels + noise)
    torch.testing.assert_close(10 * sr.preference(f, C0), clean, atol=1e-4, rtol=0)
    torch.testing.assert_close(10 * sr.relative(f, C1, C2), clean - noised, atol=1e-4, rtol=0)
    assert all(map(torch.equal, reward.conditions(PROMPTS, "a", "b"), reward.conditions(PROMPTS, "c", "d")))
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    for column in (0, 1):
        assert torch.autograd.grad(reward.image_features(x)[0, column], x)[0].abs().sum() > 0


def test_every_reward_serves_every_form_in_both_branches(pickscore, aesthetic):
    """A finite reward with a gradient in the picture that is not 0."""
    spec = f"miniature/reward:0.5,pickscore={pickscore},aesthetic={aesthetic}:2"
    single = [f"pickscore={pickscore}", f"aesthetic={aesthetic}"]
    for rewards in map(sr.load_rewards, [spec, *single]):
        conditions = rewards.conditions(PROMPTS, "realistic photo", "CG render")
        for form in sr.FORMS:
            for branch in ("denoise", "invert"):
                x = torch.rand(2, 3, 64, 64, requires_grad=True)
                r = sr.branch_reward(form, branch, rewards.image_features(x), *conditions, 0.1, 1.5)
                gradient, = torch.autograd.grad(sr.loss(r).sum(), x)
                assert r.shape == (2,) and r.isfinite().all()
                assert gradient.isfinite().all() and gradient.abs().sum() > 0


def damage(folder, to, key, change):
    """A copy of a safetensors folder with one tensor taken out or put in."""
    shutil.copytree(folder, to)
    state = load_file(to / "model.safetensors")
    if change == "missing":
        del state[key]
    else:
        state["another.weight"] = torch.zeros(2)
    save_file(state, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("change", ["missing", "another"])
@pytest.mark.parametrize("name, key", [("pickscore", "text_projection.weight"),
                                       ("aesthetic", "vision_model.post_layernorm.weight")])
def test_a_checkpoint_that_lacks_a_tensor_or_has_one_too_many(name, key, change, request, tmp_path):
    folder = damage(request.getfixturevalue(name), tmp_path / "c", key, change)
    words = f"{name}: not a reward model, in .*1 tensors are missing or not its own"
    with pytest.raises(ValueError, match=words):
        sr.load_reward(name, where=str(folder))


def test_the_head_is_read_strictly(aesthetic, tmp_path):
    shutil.copytree(aesthetic, tmp_path / "a")
    state = torch.load(aesthetic / "aesthetic_predictor_v2_5.pth", weights_only=True)
    state["scoring_head.9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "a" / "aesthetic_predictor_v2_5.pth")
    with pytest.raises(ValueError, match="aesthetic: not a reward model"):
        sr.load_reward("aesthetic", where=str(tmp_path / "a"))


def test_what_the_hub_does_not_give_says_where_to_put_it(monkeypatch):
    monkeypatch.setattr("engine.files.snapshot_download", lambda *_, **__: 1 / 0)
    for name, (repository, _) in sr.HUB.items():
        with pytest.raises(ValueError, match=f"{name}: {repository}: not on this machine.*give {name}=PATH"):
            sr.load_reward(name)


# -------------------------------------------------------------------------------------------- several at once
def test_a_weighted_sum_of_rewards_obeys_every_equation():
    """r of `a:0.7,b:0.3` is 0.7 r_a + 0.3 r_b, for every form and branch."""
    names = ["miniature/reward", "miniature/reward_unbiased"]
    both, one, two = sr.load_rewards(f"{names[0]}:0.7,{names[1]}:0.3"), *map(sr.load_reward, names)
    images, d = torch.rand(2, 3, 64, 64), torch.tensor([0.1, 0.2])
    for form in sr.FORMS:
        for branch in ("denoise", "invert"):
            r = [sr.branch_reward(form, branch, reward.image_features(images),
                                  *reward.conditions(PROMPTS, "dark", "bright"), d, 1.5)
                 for reward in (both, one, two)]
            torch.testing.assert_close(r[0], 0.7 * r[1] + 0.3 * r[2], atol=1e-6, rtol=0)


def test_a_held_out_reward_is_watched_and_never_trained_on(monkeypatch, tmp_path):
    """The same weights, byte for byte, with and without it; its scores in every line of the log."""
    small = ["--model", "miniature", "--steps", "2", "--batch", "1", "--rollout-steps", "2",
             "--eval-steps", "1", "--watch", "2", "--eval", "0"]
    for name, spec in (("a", "miniature/reward"), ("b", "miniature/reward,miniature/reward_unbiased:0")):
        monkeypatch.setattr("sys.argv", ["train.py", *small, "--reward", spec, "--out", str(tmp_path / name)])
        train.main()
    a, b = ((tmp_path / n / "weights" / "diffusion_pytorch_model.safetensors").read_bytes() for n in "ab")
    assert a == b
    for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines():
        watched = json.loads(line)["watch"]
        assert {"reward miniature/reward_unbiased", "sgp miniature/reward_unbiased"} < set(watched)
        assert watched["reward"] == watched["reward miniature/reward"]


@pytest.mark.parametrize("spec, words", [
    ("hpsv3", "no such file or folder, and not one of hpsv2.1, pickscore, clip, aesthetic"),
    ("miniature/reward:x", "give NAME, NAME=PATH"), ("miniature/reward:-1", "0 .held out. or above"),
    ("miniature/reward:nan", "0 .held out. or above"), ("miniature/reward:0", "every weight is 0"),
    ("miniature/reward,miniature/reward", "named twice"), ("", "a weight must be"),
    ("pickscore=nowhere", "nowhere: no such"),
    ("pickscore=miniature/reward", "pickscore: not a reward model")])
def test_a_reward_that_is_none_is_one_line(spec, words):
    with pytest.raises(ValueError, match="--reward .*" + words) as error:
        sr.load_rewards(spec)
    assert "\n" not in str(error.value)


def test_the_plan_counts_every_reward():
    """ViT-H/14 is 986 M parameters, SigLIP's vision side 428 M, both float32; a held-out one is only held."""
    of = lambda spec: plan.predict(room.parser("").parse_args(
        ["--model", "miniature", "--size", "64", "--reward", spec]), 8, torch.bfloat16)
    one, two, held, aesthetic = (of(s) for s in ("hpsv2.1", "hpsv2.1,pickscore:0.3", "hpsv2.1,pickscore:0",
                                                 "aesthetic"))
    assert two["reward"] == 2 * one["reward"] == 2 * held["reward"]
    assert two["frozen"] == held["frozen"] and two["reward path"] > held["reward path"] == one["reward path"]
    assert (two["frozen"] - one["frozen"]) / 4e6 == pytest.approx(986, abs=1)
    assert (one["frozen"] - aesthetic["frozen"]) / 4e6 == pytest.approx(986 - 428, abs=1)


# ----------------------------------------------------------------------------------------------- the columns
def test_sgp_is_shown_raw_and_on_the_authors_scale():
    args = evaluate.flags().parse_args([])
    assert (args.control, args.neg) == ("Realistic photo", "CG Render")
    scores = metrics.METRICS["hpsv2.1"][2](sr.fetch("hpsv2.1", "miniature/reward"), args, "cpu")(
        [photo(64, 64)], PROMPTS[:1])
    assert list(scores) == ["hps", "sgp_hps", "sgp_hps_shown"]
    assert scores["sgp_hps_shown"].item() == pytest.approx(100 * (scores["sgp_hps"].item() + 0.01), abs=1e-4)


def test_table_1_is_in_the_papers_order_and_absent_scores_are_dashes():
    columns = [k for k, (_, _, at) in tables.COLUMNS.items() if at is not None]
    assert columns == ["aesthetic", "pickscore", "imagereward", "hps", "sgp_hps_shown", "geneval", "deqa"]
    scores = {"base": {"hps": {"mean": 0.29, "se": 0.001, "n": 4}}}
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in
             tables.table(scores, columns=columns).splitlines()]
    assert lines[2] == ["FLUX [paper]", "5.867", "22.671", "1.115", "0.289", "0.463", "0.678", "4.292"]
    assert lines[7] == ["SRPO [paper]", "6.194", "23.040", "1.118", "0.289", "0.505", "0.665", "4.275"]
    assert lines[8] == ["base", "-", "-", "-", "0.2900 ± 0.0010", "-", "-", "-"]


def test_the_mean_over_groups_and_its_error():
    values = torch.tensor([0.0, 1, 1, 1, float("nan"), 0])
    told = tables.mean(values, list("aabbbb"))
    assert told["mean"] == pytest.approx((1 / 2 + 2 / 3) / 2) and told["n"] == 5
    assert told["se"] == pytest.approx(((0.5 / 2 + (1 / 3) / 3) / 4) ** 0.5)
    assert tables.mean(torch.tensor([float("nan"), float("inf")])) is None
    assert tables.mean(torch.tensor([1.0, 5]), ["a", "b"])["se"] is None  # one picture tells no spread
    assert tables.cell("reward", tables.mean(torch.tensor([1.0]))) == "+1.000 ± -"
