"""Claims about the miniature: what its model card says, measured."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import flux
from engine.data import read_prompts
from evaluation.metrics.statistics import pixel_statistics
from evaluation.watch import measure
from miniature import build, build_flow, build_scorers, fitting, world
from miniature.judge import load_judge
from rewards import load_rewards


@pytest.fixture(scope="module")
def judge():
    return load_judge("miniature")


def drawn(n, seed, style):
    return world.batch(n, seed, torch.full((n,), world.STYLES.index(style)))


def scores(images, prompts, name):
    """What one of the miniature's rewards says of pictures."""
    rewards = load_rewards(f"miniature/{name}")
    return measure(images, prompts, rewards, None, "realistic photo", "CG render")


def test_every_caption_can_be_read_back():
    captions = world.all_captions()
    assert len(set(captions)) == 465
    assert all(world.caption(*world.parse(c)) == c for c in captions)
    assert (world.parse("dark. a red circle above a blue square") == ([0, 7], 2)
            and world.parse("a dog") is None)


def test_the_training_and_the_evaluation_prompts_are_the_worlds_and_disjoint():
    train = read_prompts("miniature/prompts.txt")
    held_out = read_prompts("miniature/prompts_eval.txt")
    assert len(held_out) == 256 and sorted(train + held_out) == sorted(world.all_captions())


def test_the_same_seed_draws_the_same_pictures():
    assert torch.equal(world.batch(4, 9)[0], world.batch(4, 9)[0])


def test_the_judge_is_right_on_rendered_truth(judge):
    """At least 98 %: content of every style, realism of photo and CG, nothing whole called broken."""
    images, scenes = world.batch(1024, seed=99)
    verdict = judge.verdicts(images, world.captions(scenes))
    assert verdict["alignment"].mean() >= 0.98
    assert verdict["broken"].mean() <= 0.02
    clear = (scenes.u - world.PHOTO_U).abs() > 0.05
    assert (verdict["realism"].bool() == (scenes.u > world.PHOTO_U))[clear].float().mean() >= 0.98


def test_the_judge_sees_damage(judge):
    """Ghosts of two scenes and noise, on pictures that no training drew."""
    images, scenes = world.batch(256, seed=98)
    ghosts = 0.5 * images + 0.5 * images.roll(1, 0)
    noisy = (images + 0.35 * torch.randn(images.shape,
                                         generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for ruined in (ghosts, noisy):
        assert judge.verdicts(ruined, world.captions(scenes))["broken"].mean() >= 0.8


def test_the_biased_reward_likes_red_and_the_unbiased_one_does_not():
    """A red cast raises the plain reward of `reward`, by how much is in the model card; SGP hardly moves."""
    images, scenes = drawn(128, 5, "")
    red = (images + torch.tensor([0.12, -0.06, -0.06]).view(1, 3, 1, 1)).clamp(0, 1)
    change = {}
    for name in ("reward", "reward_unbiased"):
        plain = scores(images, world.captions(scenes), name)
        cast = scores(red, world.captions(scenes), name)
        change[name] = {score: (cast[score] - plain[score]).mean().item() for score in ("reward", "sgp")}
    assert change["reward"]["reward"] > 0.02 > change["reward_unbiased"]["reward"]
    assert abs(change["reward"]["sgp"]) < 0.5 * change["reward"]["reward"]


@pytest.mark.parametrize("name", ["reward", "reward_unbiased"])
def test_the_reward_tells_photo_from_cg(name):
    gap = {}
    for style in ("realistic photo", "CG render"):
        images, scenes = drawn(64, 6, style)
        scenes.style[:] = 0  # the prompts are plain
        gap[style] = scores(images, world.captions(scenes), name)["sgp"].mean().item()
    assert gap["realistic photo"] > 0.05 and gap["CG render"] < -0.05


def test_the_base_follows_prompts_and_looks_like_cg(miniature, judge):
    """Alignment at least 80 %, realism at most 5 %, broken at most 2 %, on the 256 evaluation prompts and
    seeds."""
    prompts = read_prompts("miniature/prompts_eval.txt")
    txt, pooled, _ = flux.encode_prompts("miniature", prompts)
    start = flux.noise(miniature, (4, 4), range(256))
    images = flux.sample(miniature, txt, pooled, start, (4, 4), 12, 3.5)
    verdict = {name: answers.mean().item() for name, answers in judge.verdicts(images, prompts).items()}
    assert verdict["alignment"] >= 0.80 and verdict["realism"] <= 0.05 and verdict["broken"] <= 0.02


def test_an_interrupted_build_ends_with_the_same_weights(monkeypatch, tmp_path):
    """fitting.fit stopped after 2 of 4 steps and run again is the uninterrupted one, bit for bit."""
    def train(folder, stop=None):
        monkeypatch.setattr(fitting, "WORK", folder)
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)

        def loss_of(step):
            if step == stop:
                raise KeyboardInterrupt
            return model(torch.randn(8, 4)).square().mean()

        fitting.fit("toy", {"toy": model}, loss_of, steps=4, lr=0.1, every=2)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop=3)
    again = train(tmp_path / "parts")
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.fixture
def short_build(monkeypatch, tmp_path):
    """A build from nothing into an empty folder, of one step a stage: short_build(stage) -> what it
    exports."""
    def one_step(name, modules, loss_of, steps, lr):
        fitting.fit(name, modules, loss_of, 1, lr)

    monkeypatch.setattr(fitting, "WORK", tmp_path / "work")
    monkeypatch.setattr(build, "HERE", tmp_path / "model")
    monkeypatch.setattr(build_flow, "PICTURE_BATCHES", 1)
    for module in (build_flow, build_scorers):
        monkeypatch.setattr(module, "fit", one_step)

    def built(stage):
        build.main(["--stage", stage, "--threads", "1"])
        return tmp_path / "model"
    return built


@pytest.mark.parametrize("stage", ["distill", "bias", "judge"])
def test_a_stage_builds_what_it_is_built_on(stage, short_build):
    short_build(stage)
    assert (fitting.WORK / f"{stage}.pt").exists()


def test_a_build_exports_a_model_that_loads(short_build):
    """All but the weights is the shipped model's: its parts, their sizes, the vocabularies, the prompts."""
    model = short_build("export")
    net = flux.load(model)
    c = flux.encode_prompts(model, ["a red circle"]).condition([0], (4, 4), "cpu")
    assert net.velocity(torch.zeros(1, 16, 64), 0.5, c, 3.5).isfinite().all()
    assert load_judge(model) and load_rewards(f"{model}/reward") and load_rewards(f"{model}/reward_unbiased")
    for shipped in Path("miniature").glob("*/*.safetensors"):
        assert (model / shipped.relative_to("miniature")).stat().st_size == shipped.stat().st_size
    for file in ("prompts.txt", "prompts_eval.txt", "tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json",
                 "reward/tokenizer.json", "reward/open_clip_config.json"):
        assert (model / file).read_bytes() == (Path("miniature") / file).read_bytes()


def test_the_vocabularies_are_the_same_in_every_build():
    """Ties between merges used to fall as a hash table had it; eight trainings, and the shipped one."""
    words = [word.lower() for word in build_flow.world_words()]
    assert len({tuple(build_flow.merges_of(words)) for _ in range(8)}) == 1
    for folder, tokenizer in zip(("tokenizer", "tokenizer_2"), build_flow.tokenizers(), strict=True):
        assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(f"miniature/{folder}").get_vocab()


def test_pixel_statistics_on_known_pictures():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    grey = torch.full((1, 3, 8, 8), 0.5)
    board = (torch.arange(8).view(8, 1) + torch.arange(8)).remainder(2).float().expand(1, 3, 8, 8)
    value = {}
    for name, picture in (("red", red), ("grey", grey), ("board", board)):
        value[name] = {statistic: v.item() for statistic, v in pixel_statistics(picture).items()}
        assert world.redness(picture).item() == value[name]["redness"]
    assert value["red"] == pytest.approx({"saturation": 1, "redness": 1, "brightness": 0.299, "texture": 0})
    assert value["grey"] == pytest.approx({"saturation": 0, "redness": 0, "brightness": 0.5, "texture": 0},
                                          abs=1e-6)
    assert value["board"]["texture"] > 0.4


def test_the_weights_stay_small():
    files = [f for f in Path("miniature").rglob("*")
             if f.is_file() and not {".build", "__pycache__"} & set(f.parts)]
    assert sum(f.stat().st_size for f in files) <= 16e6
