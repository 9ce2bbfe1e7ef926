"""Claims about the rewards: each in its real checkpoint layout with tiny random weights, the metrics'
constants, pictures prepared in two ways that agree, and a folder where adding a file adds a reward."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from builders import make_aesthetic, make_imagereward, make_pickscore, photo
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms.functional import to_tensor
from transformers import CLIPModel, CLIPTokenizerFast, SiglipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import command
import evaluate
import prepare
import recipe
import rewards
import srpo_reward as sr
import train
from engine.data.pictures import read_picture
from engine.errors import UserError
from engine.memory import counts, parallel
from engine.model.folder import Model
from evaluation import metrics, table_formats, tables
from evaluation.report.curves import read_log
from rewards import pictures
from rewards.base import Column

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
PROMPTS = ["a red circle", "a blue square above a white circle"]


def tensors(picture):
    return pictures.pixels(picture)[None]


def edit_json(path, change):
    """Let change(value) alter what a JSON file holds."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


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
    torch.testing.assert_close(pictures.exact(picture, 224, MEAN, STD, "crop-floor"), clip, **close)
    torch.testing.assert_close(pictures.exact(picture, 224, MEAN, STD, "crop"), cropped, **close)
    torch.testing.assert_close(pictures.exact(picture, 56, [0.5] * 3, [0.5] * 3, "stretch"),
                               siglip["pixel_values"][0], **close)


def test_hpsv2_letterboxes_in_black():
    """224 x 112 white: its middle half stays white, above and below is black; a side of 74.4 is 74."""
    white = pictures.exact(Image.new("RGB", (224, 112), "white"), 224, [0] * 3, [1] * 3, "letterbox")
    assert white[:, 56:168].min() == 1 and white[:, :56].max() == 0 and white[:, 168:].max() == 0
    wide = pictures.exact(Image.new("RGB", (301, 100), "white"), 224, [0] * 3, [1] * 3, "letterbox")
    assert (wide[0, :, 0] == 1).nonzero().flatten().tolist() == list(range(75, 149))  # 74 of 224 rows


@pytest.mark.parametrize("fit", ["crop", "crop-floor", "letterbox", "stretch"])
def test_training_sees_what_evaluation_sees(fit):
    """Tensors with antialias against PIL in 8 bits: at most a grey level in the mean; without antialias ten
    times as far and more."""
    picture = photo(720, 500)
    exact = pictures.exact(picture, 224, [0] * 3, [1] * 3, fit)
    ours = pictures.differentiable(tensors(picture), 224, [0] * 3, [1] * 3, fit)[0]
    naive = pictures.fitted(tensors(picture), 224, fit, antialias=False)[0]
    assert (ours - exact).abs().mean() < 1 / 255
    assert (naive - exact).abs().mean() > 10 * (ours - exact).abs().mean()


def test_the_two_ways_agree_in_score():
    """Cosines of the miniature's reward, eight pictures of 720 pixels down to 64: PIL rounds to 8 bits, which
    moves them by less than 3e-3 (measured: 7.6e-4 in the mean, 2.2e-3 at most); without antialias it is
    twenty times as much and more (measured: 33 times)."""
    reward = rewards.load_reward("miniature/reward")
    C = reward.text_features(PROMPTS[:1])
    apart = {True: [], False: []}
    for seed in range(8):
        picture = photo(720, 720, seed)
        true = sr.preference(reward.picture_features([picture]), C)
        for antialias in apart:
            x = pictures.fitted(tensors(picture), reward.size, "crop", antialias)
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
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert picture.mode == "RGB" and picture.size == size
    for reward in (rewards.load_reward("miniature/reward"), rewards.load_reward("pickscore", where=pickscore),
                   rewards.load_reward("aesthetic", where=aesthetic)):
        C0, C1, C2 = reward.conditions(["a red circle " * 99], "realistic photo", "CG render")
        assert sr.preference(reward.picture_features([picture]), C0).isfinite().all()


# ------------------------------------------------------------------------------------------- the rewards
def test_pickscore_is_planned_by_its_folder(pickscore):
    """A GPU's plan asks for it before training; the folder is transformers', not open_clip's."""
    network, = rewards.image_networks(f"pickscore={pickscore}")
    assert network.times == 1


def test_pickscore_is_its_authors_metric(pickscore):
    """exp(logit_scale) cos of transformers' CLIPModel, processor as published; a twentieth of it in training;
    a prompt longer than the encoder is cut."""
    reward = rewards.load_reward("pickscore", where=str(pickscore))
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
    scorer = metrics.find("pickscore").load(pickscore, evaluate.flags().parse_args([]), "cpu")
    column = scorer([picture] * 3, prompts)["pickscore"]
    torch.testing.assert_close(column, theirs, atol=1e-4, rtol=0)


def test_aesthetic_is_its_authors_metric_and_s1_relates_clean_to_noised(aesthetic):
    """A(x) = the head's five linear layers on SigLIP's normalised pooled output; r = A / 10; the relative
    reward is A(x) - A(x + noise), whatever the words; both sides have a gradient."""
    reward = rewards.load_reward("aesthetic", where=str(aesthetic))
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
    torch.testing.assert_close(10 * sr.preference(f, C1 - C2), clean - noised, atol=1e-4, rtol=0)
    assert all(map(torch.equal, reward.conditions(PROMPTS, "a", "b"), reward.conditions(PROMPTS, "c", "d")))
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    for column in (0, 1):
        assert torch.autograd.grad(reward.image_features(x)[0, column], x)[0].abs().sum() > 0


def test_every_reward_serves_every_form_in_both_branches(pickscore, aesthetic):
    """A finite reward with a gradient in the picture that is not 0."""
    spec = f"miniature/reward:0.5,pickscore={pickscore},aesthetic={aesthetic}:2"
    single = [f"pickscore={pickscore}", f"aesthetic={aesthetic}"]
    for one_spec in (spec, *single):
        reward = rewards.load_rewards(one_spec)
        texts = sr.texts_of(PROMPTS, "realistic photo", "CG render")
        for form in recipe.FORMS:
            for branch in ("denoise", "invert"):
                x = torch.rand(2, 3, 64, 64, requires_grad=True)
                r = sr.branch_reward(form, branch, *reward.of(x, texts), 0.1, 1.5).value()
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
    with pytest.raises(UserError, match=words):
        rewards.load_reward(name, where=str(folder))


def test_the_head_is_read_strictly(aesthetic, tmp_path):
    shutil.copytree(aesthetic, tmp_path / "a")
    state = torch.load(aesthetic / "aesthetic_predictor_v2_5.pth", weights_only=True)
    state["scoring_head.9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "a" / "aesthetic_predictor_v2_5.pth")
    with pytest.raises(UserError, match="aesthetic: not a reward model"):
        rewards.load_reward("aesthetic", where=str(tmp_path / "a"))


@pytest.mark.slow
def test_an_hpsv2_checkpoint_loads_strictly_and_scores_as_open_clip(tmp_path):
    """The file layout of HPS_v2.1_compressed.pt, {"state_dict": ...}, with random weights of a small
    architecture."""
    torch.manual_seed(0)
    model = open_clip.create_model("RN50-quickgelu", pretrained=None).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS.pt")
    reward = rewards.load_reward(str(tmp_path / "HPS.pt"), arch="RN50-quickgelu")
    picture = Image.new("RGB", (300, 300), (200, 80, 40))
    picture.paste((10, 60, 200), (0, 0, 150, 100))
    transform = open_clip.image_transform(224, is_train=False, mean=model.visual.image_mean,
                                          std=model.visual.image_std)
    with torch.no_grad():
        f = F.normalize(model.encode_image(transform(picture)[None]), dim=-1)
        C = F.normalize(model.encode_text(open_clip.get_tokenizer("RN50-quickgelu")(PROMPTS[:1])), dim=-1)
        ours = sr.preference(reward.image_features(to_tensor(picture)[None]),
                             reward.text_features(PROMPTS[:1]))
    assert ours.item() == pytest.approx((f @ C.T).item(), abs=2e-4)
    broken = model.state_dict()
    broken.pop("logit_scale")
    torch.save({"state_dict": broken}, tmp_path / "HPS.pt")
    with pytest.raises(UserError, match="not a reward model"):
        rewards.load_reward(str(tmp_path / "HPS.pt"), arch="RN50-quickgelu")


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_an_open_clip_folder_says_how_its_pictures_are_prepared(mode, tmp_path):
    """As open_clip's own transform of that resize_mode does, to float rounding."""
    shutil.copytree("miniature/reward", tmp_path / "reward")
    config = tmp_path / "reward" / "open_clip_config.json"
    edit_json(config, lambda config: config["preprocess_cfg"].update(resize_mode=mode))
    reward = rewards.load_reward(str(tmp_path / "reward"))
    transform = open_clip.image_transform(64, is_train=False, resize_mode=mode, mean=reward.mean,
                                          std=reward.std)
    theirs = reward.features(transform(photo(301, 100))[None])
    torch.testing.assert_close(reward.picture_features([photo(301, 100)]), theirs, atol=1e-5, rtol=0)
    edit_json(config, lambda config: config["preprocess_cfg"].update(interpolation="bilinear"))
    with pytest.raises(UserError, match="bilinear"):
        rewards.load_reward(str(tmp_path / "reward"))


def test_the_reward_gives_the_image_a_gradient_and_the_text_none():
    reward = rewards.load_reward("miniature/reward")
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    C = reward.text_features(["a red circle"])
    sr.preference(reward.image_features(images), C).sum().backward()
    assert images.grad.abs().sum() > 0 and not C.requires_grad


def test_what_the_hub_does_not_give_says_where_to_put_it(monkeypatch):
    monkeypatch.setattr("engine.hub.snapshot_download", lambda *_, **__: 1 / 0)
    repositories = {"hpsv2.1": "xswu/HPSv2", "pickscore": "yuvalkirstain/PickScore_v1",
                    "clip": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
                    "aesthetic": "google/siglip-so400m-patch14-384", "imagereward": "THUDM/ImageReward",
                    "hpsv3": "MizzenAI/HPSv3"}
    assert set(repositories) == set(rewards.names())
    for name, repository in repositories.items():
        with pytest.raises(UserError, match=f"{name}: {repository}: not on this machine.*give {name}=PATH"):
            rewards.load_reward(name)


def test_pickscores_tokenizer_and_the_aesthetic_head_fail_before_anything_is_loaded(
        monkeypatch, pickscore, aesthetic, tmp_path):
    monkeypatch.setattr("engine.hub.snapshot_download", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: 1 / 0)
    for name, folder, lacks in (("pickscore", pickscore, "tokenizer_config.json"),
                                ("aesthetic", aesthetic, "aesthetic_predictor_v2_5.pth")):
        shutil.copytree(folder, tmp_path / name)
        assert rewards.fetch(name, tmp_path / name) == tmp_path / name
        (tmp_path / name / lacks).unlink()
        words = "(not on this machine|cannot be had)"
        with pytest.raises(UserError, match=f"{name}: .*{words}.*give {name}=PATH"):
            rewards.fetch(name, tmp_path / name)


# --------------------------------------------------------------------------------- rewards that read the picture
CROSS = "imagereward=miniature/reward_cross"


def test_eq9_of_a_reward_that_is_no_dot_product():
    """r1 - r2 is the difference of two scores, with one graph; each text that is read is scored once, and no other."""
    reward = rewards.load_rewards(CROSS)
    (part, _), = reward.trained
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    texts = sr.texts_of(PROMPTS, "realistic photo", "CG render")
    scored = []
    score = part.score
    part.score = lambda f, read: scored.append(read) or score(f, read)
    r0, r1, r2 = reward.of(images, texts)
    r = sr.branch_reward("released", "denoise", r0, r1, r2, torch.tensor([0.1, 0.2]), 1.5).value()
    assert sr.relative(r1, r2).known() is not None and scored == [texts.p1, texts.p2] and r0.known() is None
    gradient, = torch.autograd.grad(r.sum(), images)
    f = part.image_features(images)
    literal = torch.tensor([1.1, 1.2]) * score(f, texts.p1) - score(f, texts.p2)
    assert torch.equal(r, literal)
    torch.testing.assert_close(gradient, torch.autograd.grad(literal.sum(), images)[0], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("form, k, texts", [("released", 1.5, 2), ("srp", 1.5, 2), ("cfg", 1.5, 2), ("cfg", 1.0, 1),
                                            ("branches", 1.5, 1), ("sgp", 1.5, 1), ("plain", 1.5, 1)])
def test_a_form_says_how_many_texts_are_scored(form, k, texts):
    assert sr.texts_read(form, k) == texts


def test_a_mixture_of_both_kinds_is_the_weighted_sum():
    both = rewards.load_rewards(f"miniature/reward:0.7,{CROSS}:0.3")
    parts = [part for part, _ in both.trained]
    images, texts = torch.rand(2, 3, 64, 64), sr.texts_of(PROMPTS, "realistic photo", "CG render")
    for form in recipe.FORMS:
        for branch in ("denoise", "invert"):
            r = [sr.branch_reward(form, branch, *reward.of(images, texts), torch.tensor([0.1, 0.2]), 1.5).value()
                 for reward in (both, *parts)]
            torch.testing.assert_close(r[0], 0.7 * r[1] + 0.3 * r[2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("spec, form", [(CROSS, "released"), (f"miniature/reward,{CROSS}:0", "srp"),
                                        (f"miniature/reward:0.5,{CROSS}:2", "plain"), (CROSS, "plain")])
def test_a_run_watches_and_reports_every_kind(spec, form, monkeypatch, tmp_path):
    """The log's scores, the drift warning's, the report's and the table's; the update has an SGP gap if it is free."""
    small = ["--model", "miniature", "--steps", "1", "--global-batch", "1", "--rollout-steps", "2", "--eval-steps", "1",
             "--watch", "2", "--watch-every", "1", "--eval", "2"]
    monkeypatch.setattr("sys.argv", ["train.py", *small, "--reward", spec, "--form", form, "--out", str(tmp_path)])
    train.main()
    line, = read_log(tmp_path / "log.jsonl")
    labels = [part.label for part in rewards.parse_rewards(spec)]
    names = [f"{name} {label}" for label in labels for name in ("reward", "sgp")] if len(labels) > 1 else []
    assert {"reward", "sgp", *names} < set(line["watch"]) and "reward_denoise" in line
    assert ("sgp" in line) == (form != "plain" or f"{CROSS}:0" in spec)
    assert {"reward", "sgp", *names} < set(json.loads((tmp_path / "summary.json").read_text())["after"])


def test_a_reward_on_a_device_of_its_own(monkeypatch):
    """Tensors without values on two GPUs that are not there, where an operation of both devices is an error: pictures
    are copied to the reward, and r comes back."""
    for module in (rewards.module("imagereward"), rewards.module("hpsv2.1").clip_model):
        monkeypatch.setattr(module, "moved", lambda tensor, device: tensor.to(device))
    parts = {name: (rewards.load_reward(*where), 0.5) for name, where in
             (("dot", ("miniature/reward",)), ("cross", ("imagereward", "cpu", "miniature/reward_cross")))}
    texts = sr.texts_of(PROMPTS, "realistic photo", "CG render")
    with FakeTensorMode():
        for part, _ in parts.values():
            part.device = torch.device("cuda:1")
            for module in part.model.modules():
                for kept in (module._parameters, module._buffers):
                    there = {name: tensor for name, tensor in kept.items() if tensor is not None}
                    kept.update({name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:1")
                                 for name, tensor in there.items()})
        images = torch.zeros(2, 3, 64, 64, device="cuda:0")
        d = torch.zeros(2, device="cuda:0")
        r = sr.branch_reward("released", "denoise", *sr.Rewards(parts).of(images, texts), d, 1.5).value()
        assert r.device == torch.device("cuda:0") and r.shape == (2,)


@pytest.mark.parametrize("name, gpus, processes, local, taken", [
    (None, 1, 1, 0, None), ("cpu", 1, 1, 0, "cpu"), ("cuda:1", 2, 1, 0, "cuda:1"), ("cuda:4", 8, 4, 3, "cuda:7"),
    ("cuda:0", 2, 1, 0, "the first free one is cuda:1"), ("cuda:1", 1, 1, 0, "there are 1 GPUs"),
    ("cuda:6", 8, 4, 0, "GPUs 6 to 9")])
def test_each_process_takes_its_own_reward_device(monkeypatch, name, gpus, processes, local, taken):
    world = parallel.World()
    world.neighbours, world.local = processes, local
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if taken is None or ":" in taken[:5] or taken == "cpu":
        assert world.beside(name) == (taken and torch.device(taken))
    else:
        with pytest.raises(UserError, match=f"--reward-device {name}: .*{taken}"):
            world.beside(name)


# ------------------------------------------------------------------------------------------ weights are data
PLANTED = """
import pathlib
pathlib.Path({marker!r}).write_text("this code was run")
from transformers import CLIPTokenizerFast

class Planted(CLIPTokenizerFast):
    pass
"""


@pytest.fixture
def planted(tmp_path):
    """An open_clip folder whose tokenizer is a class of its own, in a file that leaves a mark when it is run;
    and that mark."""
    folder = tmp_path / "reward"
    marker = tmp_path / "mark"
    shutil.copytree("miniature/reward", folder)
    (folder / "planted.py").write_text(PLANTED.format(marker=str(marker)))
    own_class = {"tokenizer_class": "Planted", "auto_map": {"AutoTokenizer": [None, "planted.Planted"]}}
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(own_class))
    return folder, marker


def trust(folder):
    """Make open_clip's config of a folder say that its code may be run."""
    option = {"tokenizer_kwargs": {"trust_remote_code": True}}
    edit_json(folder / "open_clip_config.json", lambda config: config["model_cfg"]["text_cfg"].update(option))


def test_the_planted_code_is_live(planted, monkeypatch, tmp_path):
    """open_clip by itself runs it, without a question: what the tests below refuse is no straw man."""
    folder, marker = planted
    trust(folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    open_clip.get_tokenizer(f"local-dir:{folder}")
    assert marker.exists()


@pytest.mark.parametrize("trusted, words", [(True, "open_clip_config.json .*trust_remote_code"),
                                            (False, "tokenizer_config.json .*auto_map")])
def test_a_folder_that_asks_for_code_to_be_run_is_refused(planted, trusted, words):
    folder, marker = planted
    if trusted:
        trust(folder)
    for use in (rewards.load_rewards, rewards.image_networks):
        for spec in (str(folder), f"clip={folder}", f"hpsv2.1={folder}"):
            with pytest.raises(UserError, match=f"--reward .*{words}") as error:
                use(spec)
            assert "\n" not in str(error.value)
    assert not marker.exists()


def test_a_text_model_outside_the_folder_is_refused(planted, tmp_path):
    """hf_model_name may be a folder too, whose config.json names code."""
    folder, marker = planted
    outside = folder.rename(tmp_path / "outside")
    own_class = {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Planted"}}
    (outside / "config.json").write_text(json.dumps(own_class))
    shutil.copytree("miniature/reward", folder)
    named = {"hf_model_name": str(outside)}
    edit_json(folder / "open_clip_config.json", lambda config: config["model_cfg"]["text_cfg"].update(named))
    for use in (rewards.load_rewards, rewards.image_networks):
        with pytest.raises(UserError, match="--reward .*hf_model_name"):
            use(str(folder))
    assert not marker.exists()


class Pickled:
    """An object that runs code when it is unpickled: it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("layout", ["hpsv2.1", "open_clip", "pickscore", "aesthetic", "head"])
def test_pickled_weights_run_no_code(layout, pickscore, aesthetic, tmp_path):
    folder = tmp_path / "weights"
    marker = tmp_path / "mark"
    name = {"open_clip": "clip", "head": "aesthetic"}.get(layout, layout)
    if layout == "hpsv2.1":
        folder.mkdir()
        file = "HPS_v2.1_compressed.pt"
    elif layout == "open_clip":
        shutil.copytree("miniature/reward", folder)
        (folder / "open_clip_model.safetensors").unlink()
        file = "open_clip_pytorch_model.bin"
    elif layout == "head":
        shutil.copytree(aesthetic, folder)
        file = "aesthetic_predictor_v2_5.pth"
    else:
        shutil.copytree(pickscore if layout == "pickscore" else aesthetic, folder)
        (folder / "model.safetensors").unlink()
        file = "pytorch_model.bin"
    torch.save({"state_dict": Pickled(marker)}, folder / file)
    with pytest.raises(UserError, match=f"{name}: .*holds more than tensors") as error:
        rewards.load_reward(name, where=str(folder))
    assert not marker.exists() and "weights_only" not in str(error.value)  # torch's advice, which would run it
    torch.load(folder / file, weights_only=False)
    assert marker.exists()    # so it would have been run


def test_loading_leaves_the_root_logger_as_it_was(monkeypatch):
    """open_clip logs to the root logger, and gives it a handler if it has none."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    rewards.load_reward("miniature/reward")
    assert root.handlers == [] and root.level == level
    with pytest.raises(UserError):
        rewards.load_reward("clip", where="miniature/vae")
    assert root.handlers == [] and root.level == level


# ------------------------------------------------------------------------------------ a file is all it takes
def readme_example(number):
    """A reward that rewards/README.md shows as an example: the first is a dot product, the second is not."""
    return Path("rewards/README.md").read_text().split("```python\n")[number].split("```")[0]


OWN_NETWORK = """
import torch
from rewards.base import Column, DotProduct, ImageNetwork, on_zeros

COLUMNS = {"red": Column("Redness", "+.2f")}

class Redness(DotProduct):
    unit = 10.0

    def features(self, pixels):
        return self.model(pixels).mean((2, 3))

    def encode_text(self, texts):
        return torch.tensor([[float("red" in text)] for text in texts])

def fetch(where=None):
    return where or "nowhere"

def network():
    return torch.nn.Conv2d(3, 1, 1)

def load(path, device):
    return Redness(network().to(device), 8, [0.5] * 3, [0.5] * 3)

def image_network(where=None):
    made = network().requires_grad_(False)
    return ImageNetwork(made, on_zeros(made, 8), times=3)
"""


@pytest.fixture
def drop_in(monkeypatch, tmp_path):
    """drop_in(file name, code): one more file in rewards/, for this test."""
    def drop(file, code):
        (tmp_path / file).write_text(code)
        monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(tmp_path)])
    before = set(sys.modules)
    yield drop
    for module in set(sys.modules) - before:
        if module.startswith("rewards."):
            del sys.modules[module]


@pytest.mark.parametrize("file, name, columns, times", [
    ("clip_g.py", "clip_g", {"clip_g": Column("CLIP bigG", ".4f")}, 1),
    ("redness_v2_1.py", "redness_v2.1", {"red": Column("Redness", "+.2f")}, 3)])
def test_a_file_dropped_into_the_folder_is_a_reward_everywhere(drop_in, file, name, columns, times):
    """Found, parsed, loaded, trained on, planned, and a metric with its columns: nothing else is edited."""
    drop_in(file, OWN_NETWORK if name == "redness_v2.1" else readme_example(1))
    assert name in rewards.names() and rewards.module(name).COLUMNS == columns
    spec = f"{name}=miniature/reward:0.5,miniature/reward"
    assert rewards.parse_rewards(spec)[0] == (f"{name}=miniature/reward", name, "miniature/reward", 0.5)
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    reward = rewards.load_rewards(spec)
    r0, _, _ = reward.of(x, sr.texts_of(PROMPTS, "a", "b"))
    r0.value().sum().backward()
    assert x.grad.abs().sum() > 0
    assert [network.times for network in rewards.image_networks(spec)] == [times, 1]
    args = evaluate.flags().parse_args([])
    metric = metrics.find(name)
    scores = metric.load(metric.fetch("miniature/reward"), args, "cpu")([photo(64, 64)], PROMPTS[:1])
    assert name in metrics.names() and list(scores) == list(columns)


def test_the_readmes_reward_of_another_kind_is_one(drop_in, tmp_path):
    """Its file alone: loaded from a tiny BLIP, climbed by its two texts, planned, and a metric."""
    drop_in("blip_itm.py", readme_example(2))
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.BlipConfig(text_config=dict(small, vocab_size=40, encoder_hidden_size=64),
                                     vision_config=dict(small, image_size=32, patch_size=16))
    folder = make_imagereward(tmp_path)  # for its tokenizer
    transformers.BlipForImageTextRetrieval(config).save_pretrained(folder)
    reward = rewards.load_rewards(f"blip_itm={folder}")
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    r0, r1, r2 = reward.of(x, sr.texts_of(["w5 w6", "w7"], "w8", "w9"))
    gradient, = torch.autograd.grad(sr.relative(r1, r2).value().sum(), x)
    assert gradient.abs().sum() > 0 and r0.known() is None
    args = evaluate.flags().parse_args([])
    metric = metrics.find("blip_itm")
    assert list(metric.load(metric.fetch(folder), args, "cpu")([photo(64, 64)], ["w5"])) == ["blip_itm"]
    with FakeTensorMode():
        network, = rewards.image_networks(f"blip_itm={folder}", texts=2)
        assert network.times == 2 and counts.flop_of(network.call) > 1e9


def test_every_reward_offers_what_the_registry_says():
    """No helper file is taken for one. "_" between two digits of a file's name is "." in the reward's."""
    assert rewards.names() == ["aesthetic", "clip", "hpsv2.1", "hpsv3", "imagereward", "pickscore"]
    for name in rewards.names():
        reward = rewards.module(name)
        assert all(isinstance(column, Column) for column in reward.COLUMNS.values())
        assert callable(reward.fetch) and callable(reward.load) and callable(reward.image_network)


@pytest.mark.slow
def test_a_reward_is_imported_only_when_it_is_named():
    """`train.py -h` waits for torch and diffusers, not for models; the mathematics imports torch alone."""
    code = """if True:
        import sys
        import srpo_reward
        assert not {"rewards", "engine", "diffusers", "transformers", "open_clip"} & set(sys.modules)
        import rewards
        rewards.names(), rewards.parse_rewards("hpsv2.1,aesthetic:0")
        models = {"open_clip", "transformers.models.clip.modeling_clip",
                  "transformers.models.siglip.modeling_siglip"}
        assert not models & set(sys.modules)
        rewards.module("hpsv2.1")
        assert "open_clip" in sys.modules and "rewards.aesthetic" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------------- several at once
def test_a_weighted_sum_of_rewards_obeys_every_equation():
    """r of `a:0.7,b:0.3` is 0.7 r_a + 0.3 r_b, for every form and branch."""
    names = ["miniature/reward", "miniature/reward_unbiased"]
    both = rewards.load_rewards(f"{names[0]}:0.7,{names[1]}:0.3")
    one, two = (rewards.load_reward(name) for name in names)
    images, d = torch.rand(2, 3, 64, 64), torch.tensor([0.1, 0.2])
    texts = sr.texts_of(PROMPTS, "dark", "bright")
    for form in recipe.FORMS:
        for branch in ("denoise", "invert"):
            r = [sr.branch_reward(form, branch, *reward.of(images, texts), d, 1.5).value()
                 for reward in (both, one, two)]
            torch.testing.assert_close(r[0], 0.7 * r[1] + 0.3 * r[2], atol=1e-6, rtol=0)


def test_a_held_out_reward_is_watched_and_never_trained_on(monkeypatch, tmp_path):
    """The same weights, bit for bit, with and without it; its scores in every line of the log."""
    small = ["--model", "miniature", "--steps", "2", "--global-batch", "1", "--rollout-steps", "2",
             "--eval-steps", "1", "--watch", "2", "--watch-every", "1", "--eval", "0"]
    for name, spec in (("a", "miniature/reward"), ("b", "miniature/reward,miniature/reward_unbiased:0")):
        monkeypatch.setattr("sys.argv", ["train.py", *small, "--reward", spec, "--out", str(tmp_path / name)])
        train.main()
    a, b = (load_file(tmp_path / n / "weights" / "diffusion_pytorch_model.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for line in read_log(tmp_path / "b" / "log.jsonl"):
        watched = line["watch"]
        assert {"reward miniature/reward_unbiased", "sgp miniature/reward_unbiased"} < set(watched)
        assert watched["reward"] == watched["reward miniature/reward"]


@pytest.mark.parametrize("spec, words", [
    ("hpsv4", "no such file or folder, and not one of aesthetic, clip, hpsv2.1, hpsv3, imagereward, pickscore"),
    ("miniature/reward:x", "give NAME, NAME=PATH"), ("miniature/reward:-1", "0 .held out. or above"),
    ("miniature/reward:nan", "0 .held out. or above"), ("miniature/reward:0", "every weight is 0"),
    ("miniature/reward,miniature/reward", "named twice"), ("", "an empty name"),
    ("pickscore=", "give NAME, NAME=PATH"), ("miniature/reward:inf", "0 .held out. or above"),
    ("pickscore=nowhere", "nowhere: no such"),
    ("pickscore=miniature/reward", "pickscore: not a reward model"),
    ("formula=miniature", "formula: not a reward model, in miniature: its network has no parameters"),
    ("fetchless", "fetchless: its fetch returned None, and not a path")])
def test_a_reward_that_is_none_is_one_line(spec, words, drop_in):
    if spec.startswith("formula"):
        drop_in("formula.py", OWN_NETWORK.replace("network().to(device)", "torch.nn.Identity()"))
    elif spec == "fetchless":
        drop_in("fetchless.py", "def fetch(where=None):\n    pass\n")
    with pytest.raises(UserError, match="--reward .*" + words) as error:
        rewards.load_rewards(spec)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_plan_counts_every_reward():
    """ViT-H/14 is 986 M parameters, SigLIP's vision side 428 M, both float32; a held-out one is only held."""
    def of(spec):
        a = command.flags(["--model", "miniature", "--size", "64", "--memory", "masters", "--reward", spec])
        return counts.count(prepare.job(a, Model(a.model)), torch.bfloat16)

    one, two, held, aesthetic, own = map(of, ("hpsv2.1", "hpsv2.1,pickscore:0.3", "hpsv2.1,pickscore:0",
                                              "aesthetic", "miniature/reward"))
    assert two.reward == 2 * one.reward == 2 * held.reward
    assert two.frozen == held.frozen and two.reward_path > held.reward_path == one.reward_path
    assert (two.frozen - one.frozen) / 4e6 == pytest.approx(986, abs=1)
    assert (one.frozen - aesthetic.frozen) / 4e6 == pytest.approx(986 - 428, abs=1)
    assert own.reward < one.reward / 1000    # an open_clip folder's own architecture


# ----------------------------------------------------------------------------------------------- the columns
def test_sgp_is_shown_raw_and_on_the_authors_scale():
    args = evaluate.flags().parse_args([])
    assert (args.control, args.neg) == ("Realistic photo", "CG Render")
    metric = metrics.find("hpsv2.1")
    scores = metric.load(metric.fetch("miniature/reward"), args, "cpu")([photo(64, 64)], PROMPTS[:1])
    assert list(scores) == ["hps", "sgp_hps", "sgp_hps_shown"]
    assert scores["sgp_hps_shown"].item() == pytest.approx(100 * (scores["sgp_hps"].item() + 0.01), abs=1e-4)


def test_table_1_is_in_the_papers_order_and_absent_scores_are_dashes():
    of_all = tables.in_order({name: metrics.find(name).COLUMNS for name in metrics.names()})
    columns = {name: column for name, column in of_all.items() if name in tables.ORDER}
    assert list(columns) == ["aesthetic", "pickscore", "imagereward", "hps", "sgp_hps_shown", "geneval",
                             "deqa"]
    paper = table_formats.of_the_paper(columns)
    cells = {name: [line.cells[i] for line in paper.lines] for i, name in enumerate(paper.columns)}
    assert cells["FLUX"] == ["5.867", "22.671", "1.115", "0.289", "0.463", "0.678", "4.292"]
    assert cells["SRPO"] == ["6.194", "23.040", "1.118", "0.289", "0.505", "0.665", "4.275"]
    rows = {"base": {"hps": {"mean": 0.29, "se": 0.001, "n": 4}}}
    ours = table_formats.table(rows, columns)
    assert [line.cells for line in ours.lines] == [["-"], ["-"], ["-"], ["0.2900 ± 0.0010"], ["-"], ["-"], ["-"]]
    assert [line.n for line in ours.lines] == ["", "", "", "4", "", "", ""]


def test_the_mean_over_groups_and_its_error():
    values = torch.tensor([0.0, 1, 1, 1, float("nan"), 0])
    told = tables.mean(values, list("aabbbb"))
    assert told["mean"] == pytest.approx((1 / 2 + 2 / 3) / 2) and told["n"] == 5
    assert told["se"] == pytest.approx(((0.5 / 2 + (1 / 3) / 3) / 4) ** 0.5)
    assert tables.mean(torch.tensor([float("nan"), float("inf")])) is None
    assert tables.mean(torch.tensor([1.0, 5]), ["a", "b"])["se"] is None  # one picture tells no spread
    assert table_formats.cell(Column("reward", "+.3f"), tables.mean(torch.tensor([1.0]))) == "+1.000"
