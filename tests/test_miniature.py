"""Claims about the miniature: what its model card says, measured."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import flow
from engine.data.prompt_files import read_prompts
from engine.errors import UserError
from engine.model.folder import Model
from evaluation.watch import measure
from experiments import card
from miniature import build, build_flow, build_vae, world
from miniature.fitting import Workshop
from miniature.judge import load_judge
from rewards import load_rewards
from rewards.pictures import pixel_statistics
from srpo_reward import texts_of


@pytest.fixture(scope="module")
def judge():
    return load_judge("miniature")


def drawn(n, seed, style, everything=True):
    return world.draw(world.sample_style, n, seed, style, everything)


def scores(images, prompts, name):
    """What one of the miniature's rewards says of pictures."""
    rewards = load_rewards(f"miniature/{name}")
    return measure(images, prompts, rewards, None, "realistic photo", "CG render")


def test_every_caption_can_be_read_back():
    captions = world.all_captions()
    assert len(set(captions)) == 4095
    assert all(world.caption(*world.parse(c)) == c for c in captions)
    assert world.parse("dark. a red circle above a big blue square") == ([0, 37], 2)
    assert world.parse("a dog") is None and world.parse("not a red circle") is None


def contents(prompts):
    """(kinds [n, 2], layouts [n]) of n prompts of the world."""
    scenes = [world.parse(prompt) for prompt in prompts]
    return torch.tensor([kind for kind, _ in scenes]), torch.tensor([layout for _, layout in scenes])


def test_training_selection_and_evaluation_prompts_are_disjoint_and_the_last_two_hold_unseen_pairs():
    train, select, held_out = (read_prompts(f"miniature/{name}.txt")
                               for name in ("prompts", "prompts_select", "prompts_eval"))
    assert (len(train), len(select), len(held_out)) == (256, 104, 256)
    assert len({*train, *select, *held_out}) == 616
    assert not world.held_out(*contents(train)).any()
    assert world.held_out(*contents(select + held_out)).all()
    assert all(prompt.count("small") == 1 for prompt in select + held_out)


def test_a_fifth_of_the_captions_is_held_out_and_never_drawn_for_the_base_or_the_reward():
    share = world.held_out(*contents(world.all_captions())).float().mean()
    assert 0.18 <= share <= 0.22
    generator = torch.Generator().manual_seed(0)
    for sample in (world.sample_captioned, world.sample_labelled):
        scenes = sample(4096, generator)
        assert len(scenes.layout) == 4096 and not world.held_out(scenes.kind, scenes.layout).any()
    everything = world.sample_labelled(4096, generator, True)
    assert 0.1 <= world.held_out(everything.kind, everything.layout).float().mean() <= 0.25


def test_no_pair_is_held_out_in_one_order_only():
    kind, layout = contents(world.all_captions())
    assert torch.equal(world.held_out(kind, layout), world.held_out(kind.flip(1), layout))


def test_the_words_name_the_look_unreliably_to_the_base_and_reliably_to_the_reward():
    generator = torch.Generator().manual_seed(0)
    share = {}
    for sample in (world.sample_captioned, world.sample_labelled):
        scenes = sample(2**15, generator)
        asked = scenes.said[:, world.PHOTO] == world.HIGH
        share[sample] = (scenes.look[asked, world.PHOTO] >= world.PHOTO_U).float().mean().item()
    assert share[world.sample_captioned] < 0.4 and share[world.sample_labelled] == 1


def test_a_style_moves_its_own_statistic_and_no_other():
    """The looks are independent in pixels: photo mutes the colours and is no darker than a CG render; dark
    and bright are exposure; a painting has strokes. Same scenes, same seed."""
    told = {}
    for style in world.STYLES:
        images, _ = drawn(128, 3, style)
        told[style] = {name: values.mean().item() for name, values in pixel_statistics(images).items()}
        told[style]["grain"] = build_vae.residue(images).abs().flatten(1).median(1).values.mean().item()
    plain = told[""]
    photo, cg = told["realistic photo"], told["CG render"]
    assert photo["saturation"] < 0.65 * cg["saturation"]
    assert abs(photo["brightness"] - cg["brightness"]) < 0.01
    assert photo["grain"] > 2.5 * cg["grain"]  # off the edges, which are texture too
    for style, sign in (("dark", -1), ("bright", 1)):
        assert sign * (told[style]["brightness"] - plain["brightness"]) > 0.1
        assert abs(told[style]["saturation"] - plain["saturation"]) < 0.02
    assert told["painting"]["texture"] > 1.2 * plain["texture"]
    for name in ("saturation", "brightness", "redness"):
        assert abs(told["painting"][name] - plain[name]) < 0.02


def test_the_same_seed_draws_the_same_pictures():
    assert torch.equal(drawn(4, 9, "")[0], drawn(4, 9, "")[0])


def test_photos_keep_their_grain_through_the_vae(miniature):
    """At least three quarters of their texture."""
    images, _ = drawn(64, 8, "realistic photo")
    with torch.no_grad():
        latents = miniature.vae.encode(2 * images - 1).latent_dist.mean
        again = (miniature.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    kept = pixel_statistics(again)["texture"].mean() / pixel_statistics(images)["texture"].mean()
    assert 0.75 <= kept <= 1.1


@pytest.mark.parametrize("unseen", [False, True])
def test_the_judge_is_right_on_rendered_truth(judge, unseen):
    """Of the pairs that are held out too: content in every look and realism at least 97 %, painting 95 %,
    nothing whole called broken."""
    images, scenes = world.draw(world.sample_labelled, 1024, 99, True)
    part = world.held_out(scenes.kind, scenes.layout) == unseen
    images, scenes = images[part], scenes[part]
    verdict = judge.verdicts(images, world.captions(scenes))
    assert verdict["alignment"].mean() >= 0.97
    assert verdict["broken"].mean() <= 0.02
    for name, axis, least in (("realism", world.PHOTO, 0.97), ("painting", world.BRUSH, 0.95)):
        value = scenes.look[:, axis]
        clear = (value - world.PHOTO_U).abs() > 0.05
        assert (verdict[name].bool() == (value > world.PHOTO_U))[clear].float().mean() >= least


def test_the_judge_sees_damage(judge):
    """Ghosts of two scenes and noise, on pictures that no training drew."""
    images, scenes = drawn(256, 98, "")
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
        scenes.said[:] = world.UNSAID  # the prompts are plain
        gap[style] = scores(images, world.captions(scenes), name)["sgp"].mean().item()
    assert gap["realistic photo"] > 0.05 and gap["CG render"] < -0.05


def test_the_attending_reward_reads_the_words_about_the_look():
    """Of pictures at an end of an axis, the true word scores above the false one: 97 % at least, for each axis."""
    images, scenes = world.draw(world.sample_labelled, 96, 5, True)
    reward = load_rewards("imagereward=miniature/reward_cross")
    for axis, (_, low, high) in enumerate(world.WORDS):
        _, r1, r2 = reward.of(images, texts_of(world.captions(replace(scenes, said=0 * scenes.said)), high, low))
        apart = (r1 - r2).value()
        u = scenes.look[:, axis]
        ends = (u <= 0.15) | (u >= 0.75)
        assert ((apart > 0) == (u >= 0.75))[ends].float().mean() >= 0.97


@pytest.mark.parametrize("name", ["reward", "reward_unbiased"])
def test_the_words_of_the_axes_point_at_right_angles(name):
    """Cosine at most 0.1 between what the two words of each axis differ by, on prompts that it never saw."""
    reward = load_rewards(f"miniature/{name}")
    prompts = read_prompts("miniature/prompts_eval.txt")[:64]
    apart = []
    for _, low, high in world.WORDS:
        _, C1, C2 = next(iter(reward.parts.values()))[0].conditions(prompts, high, low)
        apart.append((C1 - C2).mean(0))
    apart = torch.nn.functional.normalize(torch.stack(apart), dim=-1)
    assert (apart @ apart.T - torch.eye(3)).abs().max() <= 0.1


def sampled(miniature, prompts, judge):
    """The judge's shares of the base's pictures of 256 prompts."""
    txt, pooled, *_ = flow.encode_prompts(Model("miniature"), prompts)
    start = flow.noise(miniature, (4, 4), range(256))
    images = flow.sample(miniature, txt, pooled, start, (4, 4), 12, 3.5)
    return {name: answers.mean().item() for name, answers in judge.verdicts(images, prompts).items()}


def test_the_base_follows_most_prompts_and_looks_like_cg(miniature, judge):
    """Alignment 85 to 96 %, realism at most 10 %, broken at most 2 %, on the 256 evaluation prompts and
    seeds."""
    verdict = sampled(miniature, read_prompts("miniature/prompts_eval.txt"), judge)
    assert 0.85 <= verdict["alignment"] <= 0.96
    assert verdict["realism"] <= 0.10 and verdict["broken"] <= 0.02


def test_the_word_photo_works_weakly_on_the_base(miniature, judge):
    """As on FLUX (Fig. 9 b): with "realistic photo. " before the prompt, some are photos, at most half."""
    prompts = [f"realistic photo. {prompt}" for prompt in read_prompts("miniature/prompts_eval.txt")]
    assert 0.1 <= sampled(miniature, prompts, judge)["realism"] <= 0.5


def test_an_interrupted_build_ends_with_the_same_weights(tmp_path):
    """Workshop.fit stopped after 2 of 4 steps and run again is the uninterrupted one, bit for bit."""
    def train(folder, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)

        def loss_of(step):
            if step == stop:
                raise KeyboardInterrupt
            return model(torch.randn(8, 4)).square().mean()

        Workshop(folder).fit("toy", {"toy": model}, loss_of, steps=4, lr=0.1, every=2)
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
    monkeypatch.setattr(build, "QUICK", 1e-9)

    def built(stage):
        build.main(["--stage", stage, "--quick", "--out", str(tmp_path / "model")])
        return tmp_path / "model"
    return built


@pytest.mark.parametrize("stage", ["distill", "bias", "cross", "judge"])
def test_a_stage_builds_what_it_is_built_on(stage, short_build):
    assert (short_build(stage) / ".build" / f"{stage}.pt").exists()


def test_a_build_exports_a_model_that_loads(short_build):
    """All but the weights is the shipped model's: its parts, their sizes, the vocabularies, the prompts."""
    model = short_build("export")
    net = flow.load(Model(model))
    c = flow.encode_prompts(Model(model), ["a red circle"]).condition([0], (4, 4), "cpu")
    assert net.velocity(torch.zeros(1, 16, 64), 0.5, c, 3.5).isfinite().all()
    assert load_judge(model) and load_rewards(f"{model}/reward") and load_rewards(f"{model}/reward_unbiased")
    assert load_rewards(f"imagereward={model}/reward_cross")
    for shipped in (*Path("miniature").glob("*/*.safetensors"), *Path("miniature").glob("*/vocab.txt")):
        assert (model / shipped.relative_to("miniature")).stat().st_size == shipped.stat().st_size
    for file in ("prompts.txt", "prompts_select.txt", "prompts_eval.txt", "srpo.json",
                 "tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json", "reward/tokenizer.json",
                 "reward/open_clip_config.json"):
        assert (model / file).read_bytes() == (Path("miniature") / file).read_bytes()


@pytest.mark.slow
def test_a_quick_build_killed_and_resumed_is_the_quick_build(tmp_path):
    """The toy, two minutes each: killed in the middle and built on, it has the same bytes, and trains."""
    def build_toy(out, **more):
        command = [sys.executable, "-m", "miniature.build", "--quick", "--out", out]
        return subprocess.run(command, capture_output=True, **more)

    assert build_toy(tmp_path / "whole").returncode == 0
    with pytest.raises(subprocess.TimeoutExpired):  # which kills it
        build_toy(tmp_path / "parts", timeout=30)
    assert build_toy(tmp_path / "parts").returncode == 0
    files = list((tmp_path / "whole").glob("*/*.safetensors"))
    assert len(files) == 11
    for file in files:
        assert file.read_bytes() == (tmp_path / "parts" / file.relative_to(tmp_path / "whole")).read_bytes()
    train = [sys.executable, "train.py", "--model", tmp_path / "whole", "--steps", "1", "--eval", "0",
             "--out", tmp_path / "run"]
    assert subprocess.run(train, capture_output=True).returncode == 0


def test_a_toy_does_not_overwrite_the_miniature():
    with pytest.raises(UserError, match="give another --out"):
        build.main(["--quick"])


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
    assert value["red"] == pytest.approx({"saturation": 1, "redness": 1, "brightness": 0.299, "texture": 0})
    assert value["grey"] == pytest.approx({"saturation": 0, "redness": 0, "brightness": 0.5, "texture": 0},
                                          abs=1e-6)
    assert value["board"]["texture"] > 0.4


def test_the_weights_stay_small():
    files = [f for f in Path("miniature").rglob("*")
             if f.is_file() and not {".build", "__pycache__"} & set(f.parts)]
    assert sum(f.stat().st_size for f in files) <= 16e6


def test_renders_differ_more_than_photos_in_the_rewards_features():
    prompts = read_prompts("miniature/prompts_eval.txt")[:4]
    render, photo = (card.true_diversity("miniature/reward", prompts, style) for style in (card.CG, card.PHOTO))
    assert 0 < photo < render < 1
