"""Claims about the models and weights that users bring: every FLUX.1 by its name or folder, trained weights
in every form that they have, folders that know nothing of this project."""

import gc
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from builders import (
    PART,
    edit_json,
    make_foreign_flux,
    make_foreign_reward,
    make_schnell,
    released_names,
)
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

import command
import evaluate
import flow
import prepare
import rewards
import sample
import train
from engine import merge
from engine.data.pictures import read_picture
from engine.errors import UserError
from engine.model import folder as model_folder
from engine.model import lora, single_file, trained
from engine.model.folder import Model
from rewards import clip_model

SCHNELL = "black-forest-labs/FLUX.1-schnell"
SMALL = ["--model", "miniature", "--global-batch", "2", "--rollout-steps", "1", "--eval-steps", "1", "--watch", "2",
         "--watch-every", "1", "--eval", "0"]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, *flags) -> (exit status, what it said)."""
    def one(script, *argv):
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
        status = 0
        try:
            script.main()
        except SystemExit as stop:
            status = stop.code or 0
        gc.collect()  # the folder of a run that ends badly is locked until nothing knows of it
        said = capsys.readouterr()
        return status, said.out + said.err
    return one


def few_tokens(model):
    """Prompts of 16 tokens, as the miniature's, which take less time than 512."""
    edit_json(model / "tokenizer_2" / "tokenizer_config.json", model_max_length=16)


@pytest.fixture
def no_hub(monkeypatch):
    """A machine without a network."""
    monkeypatch.setattr(model_folder, "snapshot_download", lambda *_, **__: 1 / 0)


# --------------------------------------------------------------------------------------------- models by name
@pytest.mark.usefixtures("no_hub")
def test_schnell_is_planned_by_its_name_without_a_network():
    """No guidance embedding, 256 text tokens, 4 steps, its own time shift, which is none; flags go before."""
    a, model = command.read(["--model", SCHNELL])
    job = prepare.job(a, model)
    assert not job.transformer["guidance_embeds"] and job.text_tokens == 256
    assert (a.rollout_steps, a.eval_steps, a.shift, a.size) == (4, 4, None, 720)
    assert command.flags(["--model", SCHNELL, "--eval-steps", "8"]).eval_steps == 8
    assert command.notes(a, model) == [f"--rollout-steps 4: what the configs of {SCHNELL} say",
                              f"--eval-steps 4: what the configs of {SCHNELL} say",
                              f"--shift off: what the configs of {SCHNELL} say"]


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev"])
def test_krea_is_planned_as_dev(name):
    a, model = command.read(["--model", name])
    job = prepare.job(a, model)
    assert job.transformer["guidance_embeds"] and job.text_tokens == 512
    assert (a.rollout_steps, a.eval_steps, a.shift, a.size) == (25, 50, 3.0, 720)
    assert command.notes(a, model) == [] and flow.is_full_size(model)


def hub_of(monkeypatch, folder):
    """The hub gives a folder's files; a list of what it is asked for."""
    asked = []

    def some(name, allow_patterns):
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(model_folder, "snapshot_download", some)
    return asked


def test_a_hub_id_that_is_not_known_is_refused_before_anything_is_downloaded(monkeypatch, tmp_path, no_hub):
    """But for its model_index.json, which says what it is."""
    with pytest.raises(UserError, match="FLUX.2-dev: not known here, and the hub gives no model_index.json.*; known "
                                        "are black-forest-labs/FLUX.1-dev, "):
        command.read(["--plan", "--model", "black-forest-labs/FLUX.2-dev"])
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2Pipeline"}')
    asked = hub_of(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="its model_index.json says Flux2Pipeline, but only FLUX.1"):
        command.read(["--plan", "--model", "someone/flux2"])
    assert asked == ["model_index.json"]


def test_a_machine_without_a_network_says_so_at_once(monkeypatch, tmp_path, run):
    """The hub's library does not wait and try again, which takes it 24 seconds."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: 1 / 0)
    trained.on_the_hub.cache_clear()
    for flags, words in ((["--model", "some/typo"], "not known here, and the hub gives no model_index.json"),
                         (["--model", "miniature", "--weights", "some/typo"], "and the hub does not give it"),
                         (["--model", "miniature", "--prompts", "hpdv2"], "ymhao/HPDv2 cannot be fetched"),
                         (["--model", "miniature", "--reward", "clip=some/typo"], "cannot be fetched from the hub")):
        status, said = run(train, *flags, "--out", tmp_path / "run")
        assert status == 2 and words in said and "ZeroDivision" not in said, said


def test_a_hub_id_that_is_flux_1_is_planned_by_its_own_configs(monkeypatch):
    """And is as large as they say."""
    asked = hub_of(monkeypatch, Path("miniature"))
    a, model = command.read(["--model", "someone/flux", "--size", "64"])
    assert not any(pattern.endswith(("/*", "safetensors")) for pattern in asked)
    assert prepare.job(a, model).transformer["num_layers"] == 2 and not flow.is_full_size(model)
    model.fetch()
    assert "transformer/*" in asked and flow.load(model).transformer.config.num_layers == 2


def test_a_schnell_samples_as_fluxpipeline(tmp_path):
    """4 steps without a shift, whatever the guidance, to 1e-3; 256 tokens, though its tokenizer says 512."""
    model = make_schnell(tmp_path / "schnell")
    pipe = FluxPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    net = flow.load(Model(model))
    grid = net.grid(32, 32)
    assert net.shift(16) == 1.0
    embeddings = flow.encode_prompts(Model(model), ["a red circle"])
    assert embeddings.txt.shape[1] == 256
    eps = flow.noise(net, grid, [3])
    ours = flow.sample(net, embeddings.txt, embeddings.pooled, eps, grid, steps=4, guidance=3.5)
    theirs = pipe("a red circle", height=32, width=32, num_inference_steps=4, guidance_scale=0.0,
                  latents=eps, output_type="pt", max_sequence_length=256).images
    assert (ours - theirs).abs().max() < 1e-3


def test_a_schnell_trains(tmp_path, run):
    model = make_schnell(tmp_path / "schnell")
    few_tokens(model)
    status, said = run(train, "--model", model, "--reward", "miniature/reward", "--size", "32", "--steps", 1,
                       "--prompts", "miniature/prompts.txt", "--eval-prompts", "miniature/prompts_eval.txt",
                       "--threshold", "off", "--watch", "1", "--out", tmp_path / "run")
    assert status == 0 and "--rollout-steps 4: what the configs of" in said, said
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["grad_norm"] > 0


# ---------------------------------------------------------------------------------------- one file of weights
def test_a_release_is_read_row_by_row_as_diffusers_converts_it(tmp_path):
    """All rows of a FLUX.1 with one block of each kind, one column: any part of any tensor is the library's,
    to the bit."""
    D = 3072
    rows = {"img_in": D, "txt_in": D, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * D,
            "single_blocks.0.linear1": 7 * D, "single_blocks.0.linear2": D,
            "single_blocks.0.modulation.lin": 3 * D}
    for name in ("time_in", "vector_in", "guidance_in"):
        rows |= {f"{name}.in_layer": D, f"{name}.out_layer": D}
    norms = ["single_blocks.0.norm"]
    for side in ("double_blocks.0.img", "double_blocks.0.txt"):
        rows |= {f"{side}_mod.lin": 6 * D, f"{side}_attn.qkv": 3 * D, f"{side}_attn.proj": D,
                 f"{side}_mlp.0": 4 * D, f"{side}_mlp.2": D}
        norms.append(f"{side}_attn.norm")
    state = {f"{name}.{kind}_norm.scale": torch.randn(128) for name in norms for kind in ("query", "key")}
    for name, n in rows.items():
        state |= {f"{name}.weight": torch.randn(n, 1), f"{name}.bias": torch.randn(n)}
    save_file(state, tmp_path / "released.safetensors")
    ours = single_file.tensors_of(tmp_path / "released.safetensors")
    theirs = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(state)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        third = len(tensor) // 3
        assert ours[name].get_shape() == list(tensor.shape)
        parts = [ours[name][0:third], ours[name][third:third + 1], ours[name][third + 1:len(tensor)]]
        assert torch.equal(torch.cat(parts), tensor), name


@pytest.mark.parametrize("layout", ["diffusers", "released", "comfyui", "comfyui, all networks"])
def test_one_file_is_the_same_network_as_the_folder(layout, tmp_path, miniature):
    state = load_file(Path("miniature") / PART)
    if layout != "diffusers":
        state = released_names(state)
    if "comfyui" in layout:
        state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    if "all" in layout:
        state["vae.decoder.conv_in.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "one.safetensors")
    found = flow.load(Model("miniature"), str(tmp_path / "one.safetensors")).transformer.state_dict()
    for name, tensor in miniature.transformer.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_with_full_weights_the_hubs_transformer_is_not_fetched(tmp_path, monkeypatch):
    """A LoRA needs it."""
    asked = hub_of(monkeypatch, Path("miniature"))
    shutil.copy(Path("miniature") / PART, tmp_path / "one.safetensors")
    model = Model("someone/flux")
    model.fetch(trained.check(str(tmp_path / "one.safetensors"), model))
    assert "transformer/*" not in asked and "vae/*" in asked
    flow.load(model, str(tmp_path / "one.safetensors"))
    model.fetch(trained.check(None, model))
    assert "transformer/*" in asked


def test_one_file_of_another_model_is_one_line(tmp_path):
    state = released_names(load_file(Path("miniature") / PART))
    file = tmp_path / "one.safetensors"

    def said(state, rank=None):
        save_file(state, file)
        with pytest.raises(UserError) as error:
            trained.check(str(file), Model("miniature"), rank)
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    assert "1 tensors are not FLUX.1's, such as another" in said(state | {"another": torch.zeros(1)})
    part = {name: tensor for name, tensor in state.items() if not name.startswith("time_in")}
    assert "not FLUX.1's tensors: 'time_in" in said(part)
    assert "the config says [128]" in said(state | {"img_in.bias": torch.zeros(6)})
    assert "the config says" in said(state | {"img_in.bias": torch.tensor(1.0)})
    assert "which are no weights" in said(state | {"img_in.bias": torch.zeros(128).long()})
    without = {name: tensor for name, tensor in state.items() if "guidance" not in name}
    assert "4 tensors are missing or not FluxTransformer2DModel's" in said(without)
    less = {name: tensor for name, tensor in state.items() if "double_blocks.1" not in name}
    assert "tensors are missing or not FluxTransformer2DModel's" in said(less)
    assert "tensors are missing or not FluxTransformer2DModel's" in said({"a": torch.zeros(1)})
    layer = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{layer}.lora_A.weight": torch.zeros(4, 128), f"{layer}.lora_B.weight": torch.zeros(128, 4)}
    assert "has no layer double_blocks_0" in said(pair | {"lora_unet_double_blocks_0.alpha": torch.zeros(1)})
    assert "of another rank than --lora 8; --lora 4 goes on with it" in said(pair, 8)
    assert "has no layer" in said({name.replace("_blocks.0", "_blocks.7"): t for name, t in pair.items()})
    file.write_bytes(b"not what it should be")
    with pytest.raises(UserError, match="one.safetensors: cannot be read"):
        trained.check(str(file), Model("miniature"))


# ------------------------------------------------------------------------------------ training from --weights
def is_refused(run, words, *argv):
    """Whether train.py ends in one line with these words, and leaves the folder of its --out as it was."""
    def stamps():
        return sorted((path, path.stat().st_mtime_ns) for path in Path(argv[-1]).rglob("*"))

    before = stamps()
    status, said = run(train, *argv)
    return status == 2 and len(said.splitlines()) == 1 and words in said and stamps() == before


def last_picture(folder):
    return (folder / "samples" / "step_00001.png").read_bytes()


def first_picture(folder):
    return (folder / "samples" / "step_00000.png").read_bytes()


def test_a_run_starts_from_full_weights_and_resumes_with_the_same_alone(tmp_path, run):
    """The pictures before are those of the weights that it starts from. --resume takes the same weights from
    any place, and no others."""
    one, two, moved = tmp_path / "one", tmp_path / "two", tmp_path / "moved"
    assert run(train, *SMALL, "--steps", "1", "--lr", "1e-3", "--out", one)[0] == 0
    assert is_refused(run, "has --lora off, and --lora 2 is given", *SMALL, "--lr", "1e-3", "--resume", "--lora", "2",
                      "--out", one)
    flags = [*SMALL, "--lr", "1e-3", "--out", two]
    status, said = run(train, *flags, "--steps", "1", "--weights", one / "weights")
    assert status == 0, said
    assert first_picture(two) == last_picture(one) != first_picture(one)
    status, said = run(train, *flags, "--steps", "2", "--resume", "--weights", "miniature/transformer")
    assert status == 2 and said.splitlines()[-1].startswith("train.py: --resume: --"), said
    shutil.move(one / "weights", moved)
    status, said = run(train, "--resume", "--out", two)
    assert status == 2 and "no transformer there" in said, said
    status, said = run(train, *flags, "--steps", "2", "--resume", "--weights", moved)
    assert status == 0, said


def test_a_lora_goes_on_or_is_merged(tmp_path, run):
    """--lora R --weights LORA trains its adapters on; without --lora it is merged into what is trained. A
    file is as good as its folder, and both are where the run before ended."""
    one, on, merged = tmp_path / "one", tmp_path / "on", tmp_path / "merged"
    assert run(train, *SMALL, "--steps", "1", "--lora", "2", "--lr", "1e-2", "--out", one)[0] == 0
    assert is_refused(run, "has --lora 2, and --lora off is given", *SMALL, "--resume", "--lora", "off", "--out", one)
    assert is_refused(run, "has --lora 2, and --lora 4 is given", *SMALL, "--lr", "1e-2", "--resume", "--lora", "4",
                      "--out", one)
    shutil.copy(one / "weights" / lora.FILE, tmp_path / "my.safetensors")
    status, said = run(train, *SMALL, "--steps", "1", "--lora", "2", "--lr", "1e-2", "--out", on,
                       "--weights", tmp_path / "my.safetensors")
    assert status == 0, said
    assert first_picture(on) == last_picture(one) != first_picture(one)
    before = load_file(one / "weights" / lora.FILE)
    after = load_file(on / "weights" / lora.FILE)
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)

    assert run(train, *SMALL, "--steps", "1", "--lr", "1e-9", "--out", merged, "--weights",
               one / "weights")[0] == 0
    ours = load_file(merged / "weights" / "diffusion_pytorch_model.safetensors")
    theirs = flow.load(Model("miniature"), str(tmp_path / "my.safetensors")).transformer.state_dict()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-6, name


def test_a_lora_is_merged_into_full_weights_that_diffusers_loads(tmp_path, capsys):
    """python -m engine.merge: the network that flow.load makes of the LoRA, to the bit; a single file too."""
    layer = "single_transformer_blocks.1.attn.to_q"
    pair = {f"transformer.{layer}.lora_A.weight": torch.randn(2, 128),
            f"transformer.{layer}.lora_B.weight": torch.randn(128, 2)}
    save_file(pair, tmp_path / "lora.safetensors")
    save_file(released_names(load_file(Path("miniature") / PART)), tmp_path / "one.safetensors")
    for name in ("lora", "one"):
        flags = ["--model", "miniature", "--weights", f"{tmp_path}/{name}.safetensors", "--out",
                 f"{tmp_path}/{name}"]
        merge.main(flags)
        theirs = FluxTransformer2DModel.from_pretrained(tmp_path / name).state_dict()
        ours = flow.load(Model("miniature"), f"{tmp_path}/{name}.safetensors").transformer.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        with pytest.raises(SystemExit):
            merge.main(flags)
        assert "exists, and is not an empty folder" in capsys.readouterr().err


def test_a_run_saves_for_another_tool_too(tmp_path, run):
    """--save-as, of full weights and of a LoRA; --weights takes both, and --overwrite removes them."""
    out = tmp_path / "run"
    flags = [*SMALL, "--steps", "1", "--out", out]
    assert is_refused(run, "its names are a LoRA's", *SMALL, "--save-as", "kohya", "--out", out)
    assert is_refused(run, "python -m engine.merge --save-as comfyui", *SMALL, "--lora", "2", "--save-as", "comfyui",
                      "--out", out)
    assert run(train, *flags, "--save-as", "comfyui")[0] == 0
    own = flow.load(Model("miniature"), str(out)).transformer.state_dict()
    found = flow.load(Model("miniature"), str(out / "weights" / "comfyui.safetensors")).transformer.state_dict()
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in own.items())
    assert is_refused(run, "the weights would be deleted", *SMALL, "--weights", out, "--overwrite", "--out", out)
    assert run(train, *flags, "--lora", "2", "--save-as", "kohya", "--overwrite")[0] == 0
    assert {path.name for path in (out / "weights").iterdir()} == {
        lora.FILE, "kohya.safetensors", "README.md", "before_after.png"}
    own = flow.load(Model("miniature"), str(out)).transformer.state_dict()
    found = flow.load(Model("miniature"), str(out / "weights" / "kohya.safetensors")).transformer.state_dict()
    base = flow.load(Model("miniature")).transformer.state_dict()
    assert max((own[name] - base[name]).abs().max() for name in base) > 1e-6
    assert max((own[name] - found[name]).abs().max() for name in base) < 1e-6


@pytest.mark.slow
def test_the_other_scripts_take_one_file_too(tmp_path, run):
    save_file(released_names(load_file(Path("miniature") / PART)), tmp_path / "flux.safetensors")
    few = ["--model", "miniature", "--first", "2", "--eval-steps", "1"]
    made = {}
    for name, weights in (("own", []), ("file", ["--weights", tmp_path / "flux.safetensors"])):
        assert run(sample, *few, "--out", tmp_path / name, *weights)[0] == 0
        made[name] = read_picture(tmp_path / name / "grid.png").tobytes()
    assert made["own"] == made["file"]
    status, said = run(evaluate, *few, "--metrics", "statistics", "--out", tmp_path / "e", "--weights",
                       f"file={tmp_path}/flux.safetensors")
    assert status == 0, said
    made = [read_picture(tmp_path / "e" / name / "00001.png").tobytes() for name in ("base", "file")]
    assert made[0] == made[1]


# ---------------------------------------------------------------------------- folders that know nothing of us
def test_a_foreign_folder_says_its_size_in_a_line(tmp_path):
    """32 pixels, and not 720: what its VAE was made for; srpo.json and flags go before."""
    model = make_foreign_flux(tmp_path / "theirs")
    for parser in (sample.flags(), evaluate.flags(), command.parser()):
        a, opened = command.of_script(parser, ["--model", str(model)])
        assert a.size == 32
        assert opened.notes(vars(a)) == [f"--size 32: what the configs of {model} say"]
    assert command.flags(["--model", str(model), "--size", "48"]).size == 48
    edit_json(model / "vae" / "config.json", sample_size=1024)  # FLUX.1-dev's
    assert command.flags(["--model", str(model)]).size == 720
    edit_json(model / "vae" / "config.json", sample_size=None)
    assert command.flags(["--model", str(model)]).size == 720
    edit_json(model / "vae" / "config.json", sample_size=100)   # to whole tokens
    assert command.flags(["--model", str(model)]).size == 96
    (model / "srpo.json").write_text('{"size": 64}')
    a = command.flags(["--model", str(model)])
    assert a.size == 64 and command.notes(a, Model(a.model)) == []


def test_what_a_foreign_folder_leaves_out_is_the_libraries_own(tmp_path, miniature):
    """A VAE without a shift has none; a tokenizer without a limit has its encoder's: CLIP's positions, T5's
    512."""
    model = make_foreign_flux(tmp_path / "theirs")
    embeddings = flow.encode_prompts(Model(model), ["a red circle left of a blue square"])
    assert embeddings.txt.shape[1] == Model(model).configs.text_tokens == 512
    ours = flow.encode_prompts(Model("miniature"), ["a red circle left of a blue square"])
    assert torch.allclose(embeddings.pooled, ours.pooled, atol=1e-5)
    net = flow.load(Model(model))
    x = torch.randn(1, 4, 64)
    z = flow.unpack(x, (2, 2)) / net.vae.config.scaling_factor
    with torch.no_grad():
        wanted = (net.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
        assert torch.equal(net.decode(x, (2, 2)), wanted)


def test_my_own_flux_and_my_own_reward(tmp_path, run, monkeypatch):
    """The README's block, in folders whose names have all that is special to the flags."""
    model = make_foreign_flux(tmp_path / "a=b, c:0.5" / "my_flux")
    reward = make_foreign_reward(tmp_path / "a=b, c:0.5" / "my,reward:1")
    few_tokens(model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_prompts.txt").write_text("a red circle\na blue square\n")
    small = ["--eval-steps", "1"]
    both = ["--model", model, "--reward", f"{reward}:0.7,{reward}/../my,reward:1:0"]
    flags = [*both, "--prompts", "my_prompts.txt", "--eval-prompts", "my_prompts.txt", "--control",
             "realistic photo", "--neg", "CG render", *small, "--rollout-steps", "1"]
    status, said = run(train, *flags, "--steps", "1")
    assert status == 0 and f"--size 32: what the configs of {model} say" in said, said
    weights = Path("runs") / "my_flux" / "weights"
    status, said = run(sample, "--model", model, "--weights", weights, *small, "a red circle")
    assert status == 0, said
    weights.rename("w=1")
    status, said = run(evaluate, *both, "--weights", "w=1", "--prompts", "my_prompts.txt", "--metrics",
                       "reward,statistics", *small)
    assert status == 0, said
    assert "w=1" in json.loads(Path("runs/evaluate_my_flux/results.json").read_text())["rows"]


def test_a_pt_may_be_the_tensors_alone(tmp_path):
    """As HPSv2.1's under the word state_dict, or without it, or with what a trainer on many GPUs puts
    before."""
    state = {"visual.conv1.weight": torch.ones(2, 3, 4, 4)}
    for held in ({"state_dict": state, "epoch": 3}, state, {f"module.{k}": v for k, v in state.items()}):
        torch.save(held, tmp_path / "it.pt")
        found = clip_model.state_of(tmp_path / "it.pt")
        assert found.keys() == state.keys() and torch.equal(*found.values(), *state.values())


def test_an_open_clip_folder_reads_with_the_tokenizer_beside_it(tmp_path):
    """Whether its config names it or not, and with tokenizer.json alone. Without it, OpenAI's 49408 words do
    not fit this text tower, which is one line."""
    folder = make_foreign_reward(tmp_path / "theirs")
    texts = ["a red circle", "realistic photo. a blue square left of a white triangle"]
    ours = rewards.load_reward("miniature/reward").text_features(texts)
    assert torch.equal(rewards.load_reward(str(folder)).text_features(texts), ours)
    (folder / "tokenizer_config.json").unlink()
    assert torch.equal(rewards.load_reward(str(folder)).text_features(texts), ours)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="49408 words, and its text tower knows 591.*put the right"):
        rewards.load_reward(str(folder))
