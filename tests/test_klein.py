"""Claims about klein.py: what diffusers' Flux2KleinPipeline does, ours does too; and about classifier-free guidance."""

import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from builders import edit_json, make_klein, make_photographs
from diffusers import Flux2KleinPipeline
from scripts import call

import command
import flow
import klein
import prepare
import recipe
from engine.errors import UserError
from engine.memory import parallel, work
from engine.model import lora
from engine.model.folder import Model
from miniature import build

PROMPTS = ["a red circle left of a blue square", "realistic photo. a white triangle"]
READ = {"max_sequence_length": 24, "text_encoder_out_layers": (1, 2, 3)}  # of a text encoder with 4 layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_klein(tmp_path_factory.mktemp("klein") / "klein")


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = Flux2KleinPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def net(folder):
    return flow.load(Model(folder))


# -------------------------------------------------------------------------------------- as Flux2KleinPipeline
@pytest.mark.parametrize("height, width", [(64, 64), (32, 96)])
@pytest.mark.parametrize("g", [1.0, 4.0])
def test_our_samples_are_flux2kleinpipelines(net, folder, pipe, g, height, width):
    """Same prompts, noise, steps and guidance: the same pictures to 1e-4, in float32."""
    grid = net.grid(height, width)
    embeddings = flow.encode_prompts(Model(folder), PROMPTS)
    start = flow.noise(net, grid, [3, 4])
    net.guide(g, embeddings.empty)
    ours = flow.sample(net, embeddings.txt, embeddings.pooled, start, grid, steps=4, guidance=3.5)
    latents = start.transpose(1, 2).unflatten(2, grid)  # [B, C, rows, columns]
    theirs = pipe(prompt=PROMPTS, height=height, width=width, num_inference_steps=4, guidance_scale=g, latents=latents,
                  output_type="pt", **READ).images
    assert ours.std() > 0.05 and (ours - theirs).abs().max() < 1e-4


def test_our_text_is_flux2kleinpipelines(folder, pipe):
    """Three hidden states side by side, through the chat template; the empty prompt too."""
    embeddings = flow.encode_prompts(Model(folder), PROMPTS)
    for prompt, txt in (*zip(PROMPTS, embeddings.txt, strict=True), ("", embeddings.empty[0])):
        theirs, _ = pipe.encode_prompt(prompt, **READ)
        assert txt.shape == (24, 96) and torch.allclose(txt, theirs[0], atol=1e-6)
    assert embeddings.pooled.shape == (2, 0)
    assert flow.encode_prompts(Model(folder), ["a red circle " * 20]).truncated == 1


@pytest.mark.parametrize("steps", [4, 25, 50])
@pytest.mark.parametrize("tokens", [16, 1024, 4096, 4400])
def test_the_time_shift_is_flux2kleinpipelines(net, tokens, steps):
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
    mu = compute_empirical_mu(tokens, steps)
    assert klein.empirical_mu(tokens, steps) == pytest.approx(mu, abs=1e-12)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(net.scheduler)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    assert torch.allclose(flow.sigma_steps(steps, net.shift(tokens, steps)), scheduler.sigmas, atol=1e-6)


def test_a_static_scheduler_has_its_own_shift(net):
    net.scheduler = {"use_dynamic_shifting": False, "shift": 1.5}
    assert net.shift(16, 4) == net.shift(4096, 50) == 1.5


def test_encode_inverts_decode(net):
    """Of latents that are a picture's: what the VAE loses, it loses once. And the channels are normalised."""
    image = torch.rand(2, 3, 32, 64)
    x = net.encode(image)
    mean, std = net.statistics()
    z = net.vae.encode(2 * image - 1).latent_dist.mode()
    assert x.shape == (2, 8, 32) and std.min() > 0 and not torch.allclose(std, std.mean())
    assert torch.allclose(flow.unpack(x * std + mean, (2, 4)), z, atol=1e-5)
    assert torch.allclose(net.decode(x, (2, 4)), (net.vae.decode(z).sample / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_bf16_does_not_round_the_timestep(net):
    transformer = type(net.transformer).from_config(net.transformer.config).bfloat16()
    seen = []
    ours = klein.Klein(transformer, None, {}, torch.device("cpu"), torch.bfloat16)
    transformer.time_guidance_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    c = flow.Condition(torch.zeros(1, 24, 96), torch.zeros(1, 0), (2, 2))
    ours.velocity(torch.zeros(1, 4, 32), 0.83129555, c, 1.0)
    assert seen == [[pytest.approx(831.29555, abs=1e-3)]]


# -------------------------------------------------------------------------------- classifier-free guidance
def condition(folder):
    embeddings = flow.encode_prompts(Model(folder), PROMPTS)
    return embeddings, embeddings.condition([0, 1], (2, 2), "cpu")


def test_guided_is_the_line_through_both_velocities():
    """g = 1 gives the prompt's, g = 0 would give the empty prompt's; keep_norm keeps each token's length."""
    v, v_empty = torch.randn(2, 2, 4, 8)
    assert torch.allclose(flow.guided(v, v_empty, 1.0), v, atol=1e-6)
    assert torch.allclose(flow.guided(v, v_empty, 4.0), 4 * v - 3 * v_empty, atol=1e-5)
    kept = flow.guided(v, v_empty, 4.0, keep_norm=True)
    assert torch.allclose(kept.norm(dim=-1), v.norm(dim=-1), atol=1e-5)
    assert torch.allclose(torch.cosine_similarity(kept, flow.guided(v, v_empty, 4.0), dim=-1), torch.ones(2, 4))


@pytest.mark.parametrize("gradient, sizes", [("off", [2]), ("both", [4]), ("prompt", [2, 2])])
def test_what_a_call_with_a_gradient_does(net, folder, gradient, sizes, monkeypatch):
    """off: the prompt alone. both: both texts in one batch, both with a gradient. prompt: the same velocity, and the
    gradient of g times the prompt's own."""
    embeddings, c = condition(folder)
    x = torch.randn(2, 4, 32)
    seen = []
    predict = type(net).predict
    monkeypatch.setattr(type(net), "predict", lambda self, x, *rest: seen.append(len(x)) or predict(self, x, *rest))
    empty = embeddings.empty[0].expand(2, -1, -1)
    with torch.no_grad():
        v = net.predict(x, 0.5, c, 1.0)
        v_empty = net.predict(x, 0.5, flow.Condition(empty, c.pooled, c.grid), 1.0)
    wanted = flow.guided(v, v_empty, 3.0)
    net.guide(3.0, embeddings.empty, gradient)
    with torch.no_grad():
        assert torch.allclose(net.velocity(x, 0.5, c, 1.0), wanted, atol=1e-5)
    seen.clear()
    found = net.velocity(x, torch.tensor([0.5, 0.5]), c, 1.0)
    assert torch.allclose(found, v if gradient == "off" else wanted, atol=1e-5) and seen == sizes
    weight = net.transformer.proj_out.weight
    of_found, = torch.autograd.grad(found.sum(), weight)
    net.guide(None, None)
    of_prompt, = torch.autograd.grad(net.velocity(x, 0.5, c, 1.0).sum(), weight)
    of_empty, = torch.autograd.grad(net.velocity(x, 0.5, flow.Condition(empty, c.pooled, c.grid), 1.0).sum(), weight)
    expected = {"off": of_prompt, "both": 3 * of_prompt - 2 * of_empty, "prompt": 3 * of_prompt}[gradient]
    assert torch.allclose(of_found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags, words", [
    (["--model", "miniature", "--cfg", "4"], "--cfg 4: miniature is distilled"),
    (["--model", "black-forest-labs/FLUX.2-klein-4B", "--cfg", "4"], "is distilled"),
    (["--model", "KLEIN", "--method", "dancegrpo", "--group", "8", "--cfg-gradient", "off"], "compares a velocity"),
    (["--model", "KLEIN", "--online-from", "3"], "without --images every update is online"),
    (["--model", "KLEIN", "--lora", "4", "--save-as", "kohya"], "known here for FLUX.1 alone")])
def test_what_is_refused(folder, flags, words):
    with pytest.raises(UserError, match=words):
        command.read([str(folder) if flag == "KLEIN" else flag for flag in flags])


# ---------------------------------------------------------------------------------------------- by its name
@pytest.mark.parametrize("size, billions, tflop", [("4B", 3.876, 17.6), ("9B", 9.08, 38.8)])
def test_klein_is_planned_by_its_name(size, billions, tflop):
    """Its own parameters, FLOP and guidance; the distilled one takes 4 steps and no guidance."""
    a, model = command.read(["--model", f"black-forest-labs/FLUX.2-klein-base-{size}"])
    job = prepare.job(a, model)
    assert (a.cfg, a.shift, job.cfg, job.text_tokens) == (4.0, 3.0, "off", 512)
    network = flow.tensor_files.meta_network(diffusers.Flux2Transformer2DModel, job.transformer)
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert work.forward_flop(job) / 1e12 == pytest.approx(tflop, rel=5e-3)
    a, model = command.read(["--model", f"black-forest-labs/FLUX.2-klein-{size}"])
    assert (a.cfg, a.rollout_steps, a.shift) == (None, 4, None) and prepare.job(a, model).cfg is None


def test_a_distilled_folder_has_four_steps_and_no_guidance(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / "model_index.json", is_distilled=True)
    a, model = command.read(["--model", str(copy)])
    assert (a.cfg, a.rollout_steps, a.eval_steps, a.shift) == (None, 4, 4, None)
    assert flow.encode_prompts(model, PROMPTS).empty is None


@pytest.mark.parametrize("gradient, forwards", [("off", 4), ("both", 8), ("prompt", 5)])
def test_the_plan_counts_guidance(folder, gradient, forwards):
    """A step of the rollout calls the network twice; a call with a gradient is 4 forwards, and of the empty prompt 4,
    1 or none."""
    a, model = command.read(["--model", str(folder), "--cfg-gradient", gradient, "--size", "64"])
    job = prepare.job(a, model)
    once = work.forward_flop(job)
    each = 25 * 2 + 2 * forwards
    assert work.update_flop(job, 8) == pytest.approx(job.images / 8 * each * once)


def test_photographs_first_and_then_rollouts(folder, tmp_path):
    """--online-from 3 of 4 updates: the network's calls without a gradient begin with the third."""
    photographs = make_photographs(tmp_path / "photographs")
    small = [flag for flag in SMALL if flag not in ("--prompts", "miniature/prompts.txt")]
    a, model = command.read(["--model", str(folder), *small, "--images", str(photographs), "--online-from", "3",
                            "--steps", "4"])
    assert recipe.METHODS["srpo"].calls(a).without_gradient == 1  # half of the updates, 2 steps
    prepare.settle(a, model, world := parallel.World())
    run = prepare.set_up(a, model, world)
    assert [run.batch(a, step, 0).x0 is None for step in (1, 2, 3, 4)] == [False, False, True, True]
    assert run.batch(a, 3, 0).prompts[0].startswith("a ")


# --------------------------------------------------------------------------------------- through the scripts
SMALL = ["--size", "64", "--reward", "miniature/reward", "--prompts", "miniature/prompts.txt", "--eval-prompts",
         "miniature/prompts_select.txt", "--control", "realistic photo", "--neg", "CG render", "--global-batch", "4",
         "--batch", "2", "--rollout-steps", "2", "--eval-steps", "2", "--steps", "2", "--watch", "2", "--watch-every",
         "1", "--threshold", "off", "--save-every", "1"]


@pytest.mark.parametrize("more", [
    ["--memory", "masters", "--cfg-gradient", "both"], ["--memory", "split", "--method", "refl"],
    ["--memory", "offload", "--method", "draft-lv"], ["--memory", "stream"],
    ["--lora", "4", "--memory", "bf16", "--cfg-gradient", "prompt"], ["--lora", "4", "--memory", "fp8"],
    ["--lora", "4", "--memory", "fp8-offload"], ["--method", "dancegrpo", "--group", "2"]], ids=" ".join)
def test_klein_trains(folder, tmp_path, more):
    """Every --memory and method: the weights change and are written; what a LoRA's file holds, diffusers loads."""
    out = tmp_path / "run"
    call(tmp_path / "log", "train.py", "--model", folder, *SMALL, *more, "--out", out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] > 0 for line in lines if "grad_norm" in line] == [True, True]
    weights = out / "weights"
    card = (weights / "README.md").read_text()
    assert "import Flux2KleinPipeline" in card and "text_encoder_out_layers=(1, 2, 3), guidance_scale=4," in card
    if "--lora" not in more:
        trained = diffusers.Flux2Transformer2DModel.from_pretrained(weights)
        base = diffusers.Flux2Transformer2DModel.from_pretrained(folder, subfolder="transformer")
        assert not torch.equal(trained.proj_out.weight, base.proj_out.weight)
        return
    pipe = Flux2KleinPipeline.from_pretrained(folder)
    pipe.load_lora_weights(weights)
    ours = flow.load(Model(folder), weights)
    pipe.fuse_lora()
    theirs = dict(pipe.transformer.named_parameters())
    for name, parameter in ours.transformer.named_parameters():
        other = theirs.get(name, theirs.get(f"{name.removesuffix('.weight')}.base_layer.weight"))
        assert torch.allclose(parameter, other, atol=1e-6), name


def test_adapters_are_at_every_linear_layer_of_a_block(folder):
    layers = lora.layers_of(flow.load(Model(folder)).transformer)
    kinds = {name.split(".", 2)[2] for name in layers}
    assert {"attn.to_qkv_mlp_proj", "attn.to_out", "attn.to_q", "attn.add_q_proj", "ff.linear_in"} <= kinds
    assert len(layers) == 12 + 2 * 2  # one double block, and two single blocks


def test_a_stopped_run_goes_on(folder, tmp_path):
    """One update, then --resume: the weights are those of two updates, to the bit."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    flags = ["train.py", "--model", folder, *SMALL]
    call(tmp_path / "log", *flags, "--out", whole)
    call(tmp_path / "log1", *flags, "--out", parted, "--steps", "1")
    call(tmp_path / "log2", "train.py", "--model", folder, "--out", parted, "--resume", "--steps", "2")
    name = "weights/diffusion_pytorch_model.safetensors"
    assert (whole / name).read_bytes() == (parted / name).read_bytes()


def test_sample_evaluate_and_merge(folder, tmp_path):
    """Guided by the model's own default; other guidance makes other pictures."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    size = ["--size", "64", "--eval-steps", "2", "--batch", "2"]
    for name, more in (("guided", []), ("plain", ["--cfg", "off"])):
        said = call(tmp_path / name, "sample.py", "--model", folder, *size, *more, "--out", tmp_path / f"s_{name}",
                    *PROMPTS)
        assert ("--cfg 4" in said) == (name == "guided")
    assert (tmp_path / "s_guided" / "00000.png").read_bytes() != (tmp_path / "s_plain" / "00000.png").read_bytes()
    call(tmp_path / "log", "evaluate.py", "--model", folder, *size, "--prompts", prompts, "--metrics", "statistics",
         "--weights", f"same={folder}/transformer", "--out", tmp_path / "e")
    rows = json.loads((tmp_path / "e" / "results.json").read_text())["rows"]
    assert rows["same"]["overall"] == rows["base"]["overall"]
    call(tmp_path / "log2", "-m", "engine.merge", "--model", folder, "--weights", Path(folder) / "transformer", "--out",
         tmp_path / "m")
    call(tmp_path / "log3", "-m", "experiments.bench", "--model", folder, *SMALL, "--repeats", "1")


def test_a_models_flags_may_name_the_miniatures_files(folder, tmp_path):
    """As the second miniature's do: srpo.json may lead to this project's own miniature, and nowhere else."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    place = os.path.relpath("miniature", copy)
    (copy / "srpo.json").write_text(json.dumps({"prompts": f"{place}/prompts.txt", "reward": f"{place}/reward"}))
    a = command.flags(["--model", str(copy)])
    assert Path(a.prompts).samefile("miniature/prompts.txt") and Path(a.reward).samefile("miniature/reward")
    (copy / "srpo.json").write_text(json.dumps({"prompts": f"{place}/../README.md"}))
    with pytest.raises(UserError, match="leads out of the model's folder"):
        command.flags(["--model", str(copy)])


@pytest.mark.slow
def test_the_second_miniature_is_built_and_trains(tmp_path):
    """A toy of two minutes: Flux2KleinPipeline reads it, and it shares the first one's prompts, reward and judge."""
    build.main(["--second", "--quick", "--out", str(tmp_path / "model")])
    Flux2KleinPipeline.from_pretrained(tmp_path / "model")
    said = call(tmp_path / "log", "train.py", "--model", tmp_path / "model", "--steps", "1", "--eval", "4", "--watch",
                "2", "--global-batch", "2", "--rollout-steps", "1", "--eval-steps", "1", "--out", tmp_path / "run")
    assert "realism" in said and "alignment" in said
