"""Claims about flux.py and the reward loader: what diffusers and open_clip do, ours does too."""

import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from torchvision.transforms.functional import to_tensor

import flux
import srpo_reward as sr

PROMPTS = ["a red circle left of a blue square", "realistic photo. a white triangle"]


@pytest.fixture(scope="module")
def pipe():
    flux.quiet()
    pipe = FluxPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_our_samples_are_fluxpipelines(miniature, pipe):
    """Same prompts, noise, steps and guidance: the same pictures to 1e-3, half a grey level of 256."""
    grid = miniature.grid(64, 64)
    txt, pooled, _ = flux.encode_prompts("miniature", PROMPTS)
    eps = flux.noise(miniature, grid, [3, 4])
    ours = flux.sample(miniature, txt, pooled, eps, grid, steps=4, guidance=3.5)
    theirs = pipe(PROMPTS, height=64, width=64, num_inference_steps=4, guidance_scale=3.5, latents=eps,
                  output_type="pt", max_sequence_length=16).images
    assert (ours - theirs).abs().max() < 1e-3


def test_pack_and_unpack_are_inverse_and_fluxpipelines(pipe):
    z = torch.randn(2, 16, 8, 12)
    packed = flux.pack(z)
    assert packed.shape == (2, 24, 64) and torch.equal(flux.unpack(packed, (4, 6)), z)
    assert torch.equal(packed, pipe._pack_latents(z, 2, 16, 8, 12))


def test_pictures_need_not_be_square(miniature):
    grid = miniature.grid(32, 96)
    txt, pooled, _ = flux.encode_prompts("miniature", PROMPTS[:1])
    images = flux.sample(miniature, txt, pooled, flux.noise(miniature, grid, [0]), grid,
                         steps=1, guidance=1.0)
    assert images.shape == (1, 3, 32, 96)


def test_bf16_does_not_round_the_timestep(miniature):
    """diffusers alone would pass 832 and 3504 for sigma 0.83129555 and guidance 3.5; velocity passes them
    exactly."""
    transformer = copy.deepcopy(miniature.transformer).bfloat16()
    seen = []
    transformer.time_text_embed.time_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].tolist()))
    x, txt, pooled = (torch.zeros(1, *shape, dtype=torch.bfloat16) for shape in ((16, 64), (16, 64), (64,)))
    flux.velocity(transformer, x, 0.83129555, txt, pooled, 3.5, (4, 4))
    assert seen == [[pytest.approx(831.29555, abs=1e-3)], [3500.0]]
    flat = dict(txt_ids=torch.zeros(16, 3), img_ids=torch.zeros(16, 3), timestep=torch.tensor([0.83129555]),
                guidance=torch.tensor([3.5]), encoder_hidden_states=txt, pooled_projections=pooled)
    transformer(x, **flat)
    assert seen[2:] == [[832.0], [3504.0]]


def test_noise_does_not_depend_on_the_batch_it_is_made_in(miniature):
    assert torch.equal(flux.noise(miniature, (4, 4), [5, 6])[1], flux.noise(miniature, (4, 4), [6])[0])


def test_the_constants_are_the_models_own(miniature):
    assert flux.pixels_per_token(miniature.vae.config) == 16 and miniature.grid(64, 64) == (4, 4)
    config = json.load(open("miniature/vae/config.json"))
    assert miniature.vae.config.scaling_factor == config["scaling_factor"] != 0.3611


def test_an_hpsv2_checkpoint_loads_strictly_and_scores_as_open_clip(tmp_path):
    """The file layout of HPS_v2.1_compressed.pt, {"state_dict": ...}, with random weights of a small
    architecture."""
    torch.manual_seed(0)
    model = open_clip.create_model("RN50-quickgelu", pretrained=None).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS.pt")
    reward = sr.load_reward(str(tmp_path / "HPS.pt"), arch="RN50-quickgelu")
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
    with pytest.raises(ValueError, match="not a reward model"):
        sr.load_reward(str(tmp_path / "HPS.pt"), arch="RN50-quickgelu")


def test_the_reward_gives_the_image_a_gradient_and_the_text_none():
    reward = sr.load_reward("miniature/reward")
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    C = reward.text_features(["a red circle"])
    sr.preference(reward.image_features(images), C).sum().backward()
    assert images.grad.abs().sum() > 0 and not C.requires_grad
