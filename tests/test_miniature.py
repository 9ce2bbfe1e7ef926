"""Claims about the miniature: what its model card says, measured."""

from pathlib import Path

import pytest
import torch

import flux
import srpo_reward as sr
from evaluation import metrics
from evaluation.metrics import pixel_statistics
from miniature import build_flow, world
from miniature.judge import load_judge


@pytest.fixture(scope="module")
def judge():
    return load_judge("miniature")


def drawn(n, seed, style):
    return world.batch(n, seed, torch.full((n,), world.STYLES.index(style)))


def test_every_caption_can_be_read_back():
    captions = world.all_captions()
    assert len(set(captions)) == 465
    assert all(world.caption(*world.parse(c)) == c for c in captions)
    assert (world.parse("dark. a red circle above a blue square") == ([0, 7], 2)
            and world.parse("a dog") is None)


def test_the_training_and_the_evaluation_prompts_are_the_worlds_and_disjoint():
    train, held_out = (flux.read_prompts(f"miniature/{f}.txt") for f in ("prompts", "prompts_eval"))
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
        reward = sr.load_rewards(f"miniature/{name}")
        scores = [metrics.measure(x, world.captions(scenes), reward, None, "realistic photo", "CG render")
                  for x in (images, red)]
        change[name] = {k: (scores[1][k] - scores[0][k]).mean().item() for k in ("reward", "sgp")}
    assert change["reward"]["reward"] > 0.02 > change["reward_unbiased"]["reward"]
    assert abs(change["reward"]["sgp"]) < 0.5 * change["reward"]["reward"]


@pytest.mark.parametrize("name", ["reward", "reward_unbiased"])
def test_the_reward_tells_photo_from_cg(name):
    reward = sr.load_rewards(f"miniature/{name}")
    gap = {}
    for style in ("realistic photo", "CG render"):
        images, scenes = drawn(64, 6, style)
        prompts = [world.caption(k, l) for k, l in zip(scenes.kind.tolist(), scenes.layout.tolist())]
        gap[style] = metrics.measure(images, prompts, reward, None,
                                      "realistic photo", "CG render")["sgp"].mean().item()
    assert gap["realistic photo"] > 0.05 and gap["CG render"] < -0.05


def test_the_base_follows_prompts_and_looks_like_cg(miniature, judge):
    """Alignment at least 80 %, realism at most 5 %, broken at most 2 %, on the 256 evaluation prompts and
    seeds."""
    prompts = flux.read_prompts("miniature/prompts_eval.txt")
    txt, pooled, _ = flux.encode_prompts("miniature", prompts)
    images = flux.sample(miniature, txt, pooled, flux.noise(miniature, (4, 4), range(256)), (4, 4), 12, 3.5)
    verdict = {k: v.mean().item() for k, v in judge.verdicts(images, prompts).items()}
    assert verdict["alignment"] >= 0.80 and verdict["realism"] <= 0.05 and verdict["broken"] <= 0.02


def test_an_interrupted_build_ends_with_the_same_weights(monkeypatch, tmp_path):
    """build_flow.fit stopped after 2 of 4 steps and run again is the uninterrupted one, bit for bit."""
    def train(folder, stop=None):
        monkeypatch.setattr(build_flow, "WORK", folder)
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)

        def loss_of(step):
            if step == stop:
                raise KeyboardInterrupt
            return model(torch.randn(8, 4)).square().mean()

        build_flow.fit("toy", {"toy": model}, loss_of, steps=4, lr=0.1, every=2)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop=3)
    again = train(tmp_path / "parts")
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_pixel_statistics_on_known_pictures():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    grey = torch.full((1, 3, 8, 8), 0.5)
    board = (torch.arange(8).view(8, 1) + torch.arange(8)).remainder(2).float().expand(1, 3, 8, 8)
    value = {n: {k: v.item() for k, v in pixel_statistics(x).items()}
             for n, x in (("red", red), ("grey", grey), ("board", board))}
    assert value["red"] == pytest.approx({"saturation": 1, "redness": 1, "brightness": 0.299, "texture": 0})
    assert value["grey"] == pytest.approx({"saturation": 0, "redness": 0, "brightness": 0.5, "texture": 0},
                                          abs=1e-6)
    assert value["board"]["texture"] > 0.4


def test_the_weights_stay_small():
    files = [f for f in Path("miniature").rglob("*")
             if f.is_file() and not {".build", "__pycache__"} & set(f.parts)]
    assert sum(f.stat().st_size for f in files) <= 16e6
