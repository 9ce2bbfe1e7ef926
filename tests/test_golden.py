"""Claim: one update of this project is one update of the released code, number by number.

golden/ holds two updates of the released training function, its arithmetic unchanged, run in float32 on tiny
random models. Here they go through train.srpo and the rooms it calls; the only difference is the timestep,
which the released code truncates to whole thousandths (ledger D12).
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import a_batch, backward, fixed
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file

import direct_align as da
import flow
import flux
import srpo_reward as sr
from rewards.pictures import differentiable

HERE = Path(__file__).parent / "golden"
META = json.loads((HERE / "golden.json").read_text())
INPUTS, EXPECTED = load_file(HERE / "inputs.safetensors"), load_file(HERE / "expected.safetensors")
GRID = (4, 4)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Truncating(flux.Flux):
    """The released code's one habit that ours does not have."""

    def velocity(self, x_t, sigma, c, guidance):
        return super().velocity(x_t, (torch.as_tensor(sigma) * 1000).floor() / 1000, c, guidance)


def weights(prefix):
    return {k.removeprefix(prefix): v for k, v in INPUTS.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def net():
    transformer = FluxTransformer2DModel(**META["meta"]["transformer_config"])
    vae = AutoencoderKL(**META["meta"]["vae_config"]).requires_grad_(False)
    transformer.load_state_dict(weights("transformer."))
    vae.load_state_dict(weights("vae."))
    return Truncating(transformer, vae, {}, torch.device("cpu"), torch.float32)


def image_features(images):
    """The golden reward's image tower: a patch convolution and two linear layers."""
    w = weights("reward.")
    x = differentiable(images, 224, CLIP_MEAN, CLIP_STD)
    y = F.conv2d(x, w["patch_embed.weight"], w["patch_embed.bias"], stride=32)
    y = F.gelu(3 * y + w["img_pos"]).flatten(2).transpose(1, 2)
    y = F.gelu(F.linear(y, w["img_fc.weight"], w["img_fc.bias"])).mean(1)
    return F.normalize(F.linear(y, w["img_out.weight"], w["img_out.bias"]), dim=-1)


CONDITION = flow.Condition(INPUTS["text.0.tokens"], INPUTS["text.0.pooled"], GRID)
EPS = flow.pack(INPUTS["noise.64x64.0"])


def test_the_schedules_are_the_released_ones():
    meta = META["meta"]
    fifty = da.sigma_steps(50, 3.0)
    assert [fifty[5].item(), fifty[25].item()] == pytest.approx(list(meta["sigma_schedule50"].values()),
                                                                abs=1e-7)
    assert da.sigma_steps(25, 3.0).tolist() == pytest.approx(meta["rollout25_sigmas"], abs=1e-7)
    grid = da.training_grid(27 / 28, 0.75, 1000)
    for index, sigma in meta["train_grid"].items():
        assert grid[int(index)].item() == pytest.approx(sigma, abs=1e-6)


def test_the_rollout_is_the_released_one(net):
    x0 = net.rollout(EPS, CONDITION, da.sigma_steps(25, 3.0), 1.0)
    assert (x0 - INPUTS["x0.64x64.0.text0.steps25.g1"]).abs().max() < 1e-5


@pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["id"])
def test_one_update_is_the_released_one(net, flags, case):
    """Scores to 1e-6, the accumulated gradient to 1e-4 relative, both branches, the rollout included."""
    ratio = case["args_changed"].get("groundtruth_ratio", 0.92)
    a = flags("--groundtruth-ratio", str(ratio))
    prompt, step = META["meta"]["captions"][case["caption"]], case["step"]
    control, neg = a.control[step % len(a.control)], a.neg[step % len(a.neg)]
    C1, C2 = (INPUTS[f"reward_text_feature.{text}"].view(1, -1) for text in
              (*sr.with_words(control, [prompt]), *sr.with_words(neg, [prompt])))
    net.transformer.zero_grad()
    batch = a_batch([prompt], CONDITION, None, EPS, [[case["mid_timestep"]]], start=EPS)
    terms = backward(a, net, fixed(image_features, C1, C1, C2), batch)
    for branch, term in zip(case["branches"], terms, strict=True):
        assert term.branch == {"denoise": "denoise", "inversion": "invert"}[branch["branch"]]
        assert term.reward.item() == pytest.approx(branch["score"], abs=1e-6)
        assert term.image.norm().item() == pytest.approx(branch["image"]["l2"], rel=1e-5)
    parameters = dict(net.transformer.named_parameters())
    grad = torch.cat([parameters[n].grad.flatten() for n in META["meta"]["param_order"]])
    expected = EXPECTED[f"{case['id']}.grad_flat"]
    assert (grad - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("case", META["cases"], ids=lambda c: c["id"])
def test_the_branches_are_placed_as_released(case):
    grid = da.training_grid(27 / 28, 0.75, 1000)
    reach = da.reach_of(case["args_changed"].get("groundtruth_ratio", 0.92), 1000)
    for expected in case["branches"]:
        name = {"denoise": "denoise", "inversion": "invert"}[expected["branch"]]
        at = da.place(name, torch.tensor([case["mid_timestep"]]), grid, reach)
        assert at.sigma.item() == pytest.approx(expected["sigma_call"], abs=1e-6)
        assert at.sigma_to.item() == pytest.approx(expected["sigma_recover"], abs=1e-6)
        first, last = {"denoise": (0.1, 0.25), "invert": (0.3, 0.01)}[name]
        assert da.discount(at.cell, first, last, 1000).item() == pytest.approx(expected["discount"], abs=1e-6)
