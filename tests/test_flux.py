"""Claims about flux.py: what diffusers does, ours does too."""

import json

import pytest
import torch
from diffusers import FluxPipeline

import flow
import flux
from engine.model.folder import Model

PROMPTS = ["a red circle left of a blue square", "realistic photo. a white triangle"]


@pytest.fixture(scope="module")
def pipe():
    flow.quiet()
    pipe = FluxPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_our_samples_are_fluxpipelines(miniature, pipe):
    """Same prompts, noise, steps and guidance: the same pictures to 1e-3, half a grey level of 256."""
    grid = miniature.grid(64, 64)
    txt, pooled, *_ = flow.encode_prompts(Model("miniature"), PROMPTS)
    eps = flow.noise(miniature, grid, [3, 4])
    ours = flow.sample(miniature, txt, pooled, eps, grid, steps=4, guidance=3.5)
    theirs = pipe(PROMPTS, height=64, width=64, num_inference_steps=4, guidance_scale=3.5, latents=eps,
                  output_type="pt", max_sequence_length=16).images
    assert (ours - theirs).abs().max() < 1e-3


def test_pack_and_unpack_are_inverse_and_fluxpipelines(pipe):
    z = torch.randn(2, 16, 8, 12)
    packed = flow.pack(z)
    assert packed.shape == (2, 24, 64) and torch.equal(flow.unpack(packed, (4, 6)), z)
    assert torch.equal(packed, pipe._pack_latents(z, 2, 16, 8, 12))


def test_pictures_need_not_be_square(miniature):
    grid = miniature.grid(32, 96)
    txt, pooled, *_ = flow.encode_prompts(Model("miniature"), PROMPTS[:1])
    images = flow.sample(miniature, txt, pooled, flow.noise(miniature, grid, [0]), grid,
                         steps=1, guidance=1.0)
    assert images.shape == (1, 3, 32, 96)


def test_bf16_does_not_round_the_timestep(miniature):
    """diffusers alone would pass 832 and 3504 for sigma 0.83129555 and guidance 3.5; velocity passes them
    exactly."""
    transformer = type(miniature.transformer).from_config(miniature.transformer.config).bfloat16()
    seen = []
    transformer.time_text_embed.time_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].tolist()))
    x, txt, pooled = (torch.zeros(1, *shape, dtype=torch.bfloat16) for shape in ((16, 64), (16, 64), (64,)))
    net = flux.Flux(transformer, None, {}, torch.device("cpu"), torch.bfloat16)
    net.velocity(x, 0.83129555, flow.Condition(txt, pooled, (4, 4)), 3.5)
    assert seen == [[pytest.approx(831.29555, abs=1e-3)], [3500.0]]
    flat = dict(txt_ids=torch.zeros(16, 3), img_ids=torch.zeros(16, 3), timestep=torch.tensor([0.83129555]),
                guidance=torch.tensor([3.5]), encoder_hidden_states=txt, pooled_projections=pooled)
    transformer(x, **flat)
    assert seen[2:] == [[832.0], [3504.0]]


def test_noise_does_not_depend_on_the_batch_it_is_made_in(miniature):
    assert torch.equal(flow.noise(miniature, (4, 4), [5, 6])[1], flow.noise(miniature, (4, 4), [6])[0])


def test_the_constants_are_the_models_own(miniature):
    assert Model("miniature").unit == 16 and miniature.grid(64, 64) == (4, 4)
    config = json.load(open("miniature/vae/config.json"))
    assert miniature.vae.config.scaling_factor == config["scaling_factor"] != 0.3611
