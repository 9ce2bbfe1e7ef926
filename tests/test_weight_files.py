"""Claims about files of full weights: every place and form in which --weights takes them, and --save-as, which writes
the forms of other tools."""

import json
import pickle
import shutil
import types
from pathlib import Path

import diffusers
import pytest
import torch
from builders import PART, released_names
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine import hub, merge
from engine.errors import NotFinite, UserError, one_line
from engine.memory import parallel
from engine.model import configs, export, lora, lora_files, single_file, trained
from engine.model.folder import Model
from engine.model.tensor_files import INDEX
from rewards import clip_model

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def state():
    """The miniature's transformer, {diffusers' name: tensor}."""
    return load_file(Path("miniature") / PART)


def read(place):
    """{name: tensor} of --weights, as a process reads them."""
    model = Model("miniature")
    trained.check(str(place), model)
    source = trained.source(str(place), model)
    return {name: tensor[0:tensor.get_shape()[0]] for name, tensor in source.tensors.items()}


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(place, words):
    """Whether --weights are refused in one line with these words."""
    with pytest.raises(UserError) as error:
        trained.check(str(place), Model("miniature"))
    said = str(error.value)
    assert words in said and len(said.splitlines()) == 1, said
    return True


# ------------------------------------------------------------------------------------------------- the places
def a_lora(folder):
    pair = {f"transformer.{LAYER}.lora_A.weight": torch.randn(2, 128),
            f"transformer.{LAYER}.lora_B.weight": torch.randn(128, 2)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pair, folder / lora_files.FILE)


PLACES = {
    "a run's folder": lambda p: shutil.copytree("miniature/transformer", p / "weights"),
    "a pipeline's root": lambda p: shutil.copytree("miniature/transformer", p / "transformer"),
    "a transformer's folder": lambda p: shutil.copytree("miniature/transformer", p, dirs_exist_ok=True),
    "a folder with one file": lambda p: shutil.copy(Path("miniature") / PART, p / "any name.safetensors"),
    "a folder with one .sft": lambda p: shutil.copy(Path("miniature") / PART, p / "any.sft"),
    "a folder with another name of its file": lambda p: [
        shutil.copy("miniature/transformer/config.json", p),
        shutil.copy(Path("miniature") / PART, p / "flux.safetensors")],
    "a pipeline's root with other files": lambda p: [
        shutil.copytree("miniature/transformer", p / "transformer"),
        save_file({"x": torch.ones(1)}, p / "ae.safetensors")],
    "a run's folder, a LoRA": lambda p: a_lora(p / "weights"),
    "a LoRA's folder": a_lora,
}


@pytest.mark.parametrize("place", PLACES)
def test_weights_are_found_in(place, tmp_path, state):
    PLACES[place](tmp_path)
    model = Model("miniature")
    parts = trained.check(str(tmp_path), model)
    is_lora = "LoRA" in place
    assert trained.is_full(str(tmp_path)) is not is_lora and ("transformer" in parts) is is_lora
    if not is_lora:
        assert are_equal(read(tmp_path), state)


def test_a_sft_is_a_safetensors_file(tmp_path, state):
    save_file(released_names(state), tmp_path / "flux.sft")
    assert are_equal(read(tmp_path / "flux.sft"), state)


def two_files(folder):
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, folder / f"{name}.safetensors")


NOTHING = {
    "an empty folder": lambda p: p,
    "a folder with a.safetensors, b.safetensors": two_files,
    "a folder with args.json, run.json, samples/": lambda p: [(p / "samples").mkdir(), *map(Path.touch, (
        p / "args.json", p / "run.json"))],
    "a folder with config.json": lambda p: shutil.copy("miniature/transformer/config.json", p),
    "a folder with 0, 1, 2, 3, 4 and 2 more": lambda p: [(p / str(n)).touch() for n in range(7)],
}


@pytest.mark.parametrize("words", NOTHING)
def test_no_weights_says_what_was_found(words, tmp_path):
    NOTHING[words](tmp_path)
    assert refused(tmp_path, f"no transformer there: {words}; give ")


def test_no_weights_says_what_was_found_for_a_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert refused(tmp_path / "model.gguf", "no transformer there: a file that ends in .gguf")
    assert refused(tmp_path / "none" / "at" / "all", "no transformer there: no such file or folder")


HUB = {
    ("someone/flux", ("model_index.json", "flux1-dev.safetensors", "transformer/config.json",
                      f"{PART}")): ["transformer/config.json", PART],
    ("someone/lora", ("README.md", "my lora.safetensors")): ["my lora.safetensors"],
    ("someone/lora", ("other.safetensors", lora_files.FILE)): [lora_files.FILE],
    ("someone/peft", (lora_files.OF_PEFT, "adapter_config.json")): [lora_files.OF_PEFT, "adapter_config.json"],
    ("someone/part", ("config.json", "diffusion_pytorch_model.safetensors")):
        ["diffusion_pytorch_model.safetensors", "config.json"],
    ("someone/many/b.safetensors", ("a.safetensors", "b.safetensors")): ["b.safetensors"],
}


@pytest.fixture
def on_hub(monkeypatch, tmp_path):
    """on_hub(files): the hub has these files, which are empty; the list of what is fetched."""
    asked = []

    def some(name, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise OSError("nothing was fetched before")
        asked.extend(allow_patterns)
        for file in allow_patterns:
            place = tmp_path / file
            place.parent.mkdir(parents=True, exist_ok=True)
            pair = {f"transformer.{LAYER}.lora_A.weight": torch.ones(1, 128),
                    f"transformer.{LAYER}.lora_B.weight": torch.ones(128, 1)}
            if place.suffix == ".safetensors":
                save_file(pair, place)
            else:
                place.write_text("{}")
        return str(tmp_path)

    def ready(files):
        monkeypatch.setattr(hub, "HfApi", lambda: types.SimpleNamespace(model_info=lambda name: types.SimpleNamespace(
            siblings=[types.SimpleNamespace(rfilename=file) for file in files])))
        monkeypatch.setattr(hub, "snapshot_download", some)
        trained.on_the_hub.cache_clear()
        return asked

    yield ready
    trained.on_the_hub.cache_clear()


@pytest.mark.parametrize("case", HUB, ids=str)
def test_a_hub_id_is_asked_for_its_weights_alone(case, on_hub):
    """And not for a second copy of them, or for a VAE."""
    name, files = case
    asked = on_hub(files)
    assert trained.place_of(name).exists() and asked == HUB[case]


def test_a_hub_id_with_several_files_lists_them(on_hub):
    on_hub(("a.safetensors", "b.safetensors"))
    assert refused("someone/many", "the hub has a.safetensors, b.safetensors; give one of its files, someone/many/FILE")


@pytest.mark.parametrize("path", ["miniature/none", "runs/none/weights", "none", "./some/one", "/some/one", "some//one",
                                  "some/", "~/some.safetensors"])
def test_a_path_is_no_hub_id(path, on_hub, monkeypatch):
    """The hub is not asked."""
    on_hub(())
    monkeypatch.setattr(hub, "HfApi", lambda: 1 / 0)
    assert refused(path, "no transformer there: no such file or folder; give ")


def test_a_hub_id_without_a_network_is_what_was_fetched_before(on_hub, monkeypatch, tmp_path):
    on_hub(("it.safetensors",))
    place = trained.place_of("someone/lora")
    monkeypatch.setattr(hub, "HfApi", lambda: 1 / 0)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, local_files_only: str(tmp_path))
    trained.on_the_hub.cache_clear()
    assert trained.place_of("someone/lora") == place
    monkeypatch.setattr(hub, "snapshot_download", lambda name, local_files_only: 1 / 0)
    trained.on_the_hub.cache_clear()
    assert refused("someone/lora", "no such file or folder, and the hub does not give it (ZeroDivisionError)")


def test_what_is_left_out_of_a_lora_is_named(tmp_path):
    """The tensors of text encoders, of any tool; none, and no line, for other weights."""
    a_lora(tmp_path)
    assert trained.notes(str(tmp_path)) == trained.notes(None) == trained.notes("miniature/transformer") == []
    pair = load_file(tmp_path / lora_files.FILE)
    for name in ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "lora_te1_x.lora_down.weight",
                 "text_encoders.t5xxl.transformer.x.lora_down.weight", "bundle_emb.word.clip_l"):
        save_file(pair | {name: torch.ones(1)}, tmp_path / lora_files.FILE)
        trained.check(str(tmp_path), Model("miniature"))
        assert trained.notes(str(tmp_path)) == [
            f"--weights {tmp_path}: 1 tensors are of text encoders, such as {name}; they are left out"]


# ------------------------------------------------------------------------------------------------- ComfyUI's forms
def test_comfyuis_names_of_norms_are_read_bit_for_bit(tmp_path, state):
    """query_norm.weight where black-forest-labs has query_norm.scale; with and without ComfyUI's prefix."""
    theirs = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in released_names(state).items()}
    assert sum(name.endswith("_norm.weight") for name in theirs) > 4
    for prefix in ("", "model.diffusion_model.", "diffusion_model."):
        save_file({prefix + name: tensor for name, tensor in theirs.items()}, tmp_path / "one.safetensors")
        assert are_equal(read(tmp_path / "one.safetensors"), state)


def in_float8(state, scale_name, per_row=False, dtype=torch.float8_e4m3fn):
    """({name: tensor} with matrices of blocks in float8 and their scales, what they stand for)."""
    stored, meant = {}, {}
    for name, tensor in state.items():
        stored[name] = meant[name] = tensor
        if tensor.ndim == 2 and "_blocks." in name:
            most = tensor.abs().amax(1, keepdim=True) if per_row else tensor.abs().max()
            scale = most / torch.finfo(dtype).max
            stored[name] = (tensor / scale).to(dtype)
            stored[name.removesuffix(".weight") + scale_name] = scale
            meant[name] = stored[name].float() * scale
    return stored, meant


def noted(stored, form="float8_e4m3fn"):
    """ComfyUI's note of each layer's format, as bytes."""
    note = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    return {name.replace("weight_scale", "comfy_quant"): note.clone() for name in stored if "weight_scale" in name}


SPELLINGS = {
    "scaled_fp8": lambda s: in_float8(s, ".scale_weight")[0] | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)},
    "an empty mark": lambda s: in_float8(s, ".scale_weight")[0] | {"scaled_fp8": torch.zeros(0)},
    "with inputs": lambda s: in_float8(s, ".scale_weight")[0] | {
        "double_blocks.0.img_attn.qkv.scale_input": torch.tensor(1.0)},
    "comfy_quant": lambda s: in_float8(s, ".weight_scale")[0] | noted(in_float8(s, ".weight_scale")[0]),
    "input_scale": lambda s: in_float8(s, ".weight_scale")[0] | {
        "double_blocks.0.img_attn.qkv.input_scale": torch.tensor(3.0)},
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scaled_float8_is_read_with_its_scale(spelling, prefix, tmp_path, state):
    """To the bit of float8 times the scale, in float32."""
    released = released_names(state)
    stored = {prefix + name: tensor.contiguous() for name, tensor in SPELLINGS[spelling](released).items()}
    save_file(stored, tmp_path / "one.safetensors")
    wanted = in_float8(released, ".scale_weight")[1]
    save_file(wanted, tmp_path / "wanted.safetensors")
    found = read(tmp_path / "one.safetensors")
    assert are_equal(found, read(tmp_path / "wanted.safetensors"))
    assert max((found[name] - state[name]).abs().max().item() for name in state) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("per_row", [False, True])
def test_each_process_reads_its_own_rows_of_scaled_float8(per_row, dtype, tmp_path, state):
    """Any rows of any tensor, with diffusers' or black-forest-labs' names; a scale of a tensor, or of each row."""
    for names in (dict, released_names):
        stored, meant = in_float8(names(state), ".weight_scale", per_row, dtype)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "one.safetensors")
        save_file(meant, tmp_path / "wanted.safetensors")
        found = single_file.tensors_of(tmp_path / "one.safetensors")
        wanted = single_file.tensors_of(tmp_path / "wanted.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            n = tensor.get_shape()[0]
            for first, last in ((0, n // 3), (n // 3, n // 3 + 1), (n // 3 + 1, n), (n, n)):
                assert torch.equal(tensor[first:last].float(), wanted[name][first:last].float()), name


PROJ = "double_blocks.0.img_attn.proj.{}"
BROKEN = {
    "is a scale, and there is no": {"double_blocks.0.nothing.scale_weight": torch.tensor(1.0)},
    "has the shape [3], and its weight 384 rows": {"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(3)},
    "has the shape [1, 128], and its weight 128 rows": {PROJ.format("scale_weight"): torch.ones(1, 128)},
    "has the shape [8, 16], and its weight 128 rows": {PROJ.format("scale_weight"): torch.ones(8, 16)},
    "scale_weight holds I64, which are no scales": {PROJ.format("scale_weight"): torch.tensor(1)},
    "scale_weight holds BOOL, which are no scales": {PROJ.format("scale_weight"): torch.tensor(True)},
    "has two scales, .scale_weight and .weight_scale": {PROJ.format("scale_weight"): torch.tensor(1.0),
                                                        PROJ.format("weight_scale"): torch.tensor(1.0)},
    "proj.weight is in float8 without a scale": {PROJ.format("weight"): torch.ones(128, 128).to(torch.float8_e5m2),
                                                 "scaled_fp8": torch.zeros(0)},
    "img_attn.qkv.weight is in float8 without": {
        PROJ.format("scale_weight"): torch.tensor(1.0),
        "double_blocks.0.img_attn.qkv.weight": torch.ones(384, 128).to(torch.float8_e4m3fn)},
    "there as .weight and as .scale": {"double_blocks.0.img_attn.norm.key_norm.weight": torch.ones(32)},
    "holds two transformers, one with model.diffusion_model. before": {
        f"model.diffusion_model.{PROJ.format('weight')}": torch.ones(128, 128)},
    "tensors are not FLUX.1's, such as transformer_blocks": {"transformer_blocks.0.attn.to_q.weight": torch.ones(1)},
    "'double_blocks.2.img_mod.lin.weight' is missing": {"double_blocks.2.x.weight": torch.ones(1)},
    "scale_weight is not finite": {"double_blocks.0.img_attn.qkv.scale_weight": torch.tensor(torch.inf)},
    "is quantized as 'nvfp4'": noted({"double_blocks.0.img_attn.qkv.weight_scale": 0}, "nvfp4"),
    "its note of a quantization is damaged": {"double_blocks.0.img_attn.qkv.comfy_quant": torch.ones(3).byte()},
    "holds I8, which are no weights": {"img_in.bias": torch.ones(128).to(torch.int8)},
    "holds BOOL, which are no weights": {"img_in.bias": torch.ones(128).bool()},
}


@pytest.mark.parametrize("words", BROKEN)
def test_what_is_no_scaled_float8_is_refused_by_name(words, tmp_path, state):
    save_file(released_names(state) | BROKEN[words], tmp_path / "one.safetensors")
    assert refused(tmp_path / "one.safetensors", words)


OF_OTHERS = {  # the name of a tensor; what the file is
    "x.weight.absmax": "quantized by bitsandbytes", "x.SCB": "quantized by bitsandbytes",
    "x.weight._data": "quantized by quanto", "x.qweight": "quantized by nunchaku, GPTQ or AWQ",
    "x.weight.tensor_impl.int_data": "quantized by torchao", "x._weight_qdata": "quantized by torchao",
    "x.weight_quantizer._amax": "quantized by ModelOpt", "x.weight_scale_inv": "float8 with a scale for each block",
    "x.weight_scale_2": "quantized as nvfp4", "x.zero_point": "quantized by SDNQ",
    "distilled_guidance_layer.norms.0.scale": "Chroma, another model",
    "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": "an IP-adapter",
    "double_stream_modulation_img.lin.weight": "FLUX.2 with black-forest-labs' names"}


@pytest.mark.parametrize("name", OF_OTHERS)
@pytest.mark.parametrize("names", [dict, released_names])
def test_another_format_is_refused_by_its_name(names, name, tmp_path, state):
    """Whatever the dtype of its tensors."""
    save_file(names(state) | {name: torch.ones(4, 4)}, tmp_path / "one.safetensors")
    assert refused(tmp_path / "one.safetensors", f"{OF_OTHERS[name]}")


NOT_SAFETENSORS = {b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer, and not the file itself",
                   b"GGUF\3\0\0\0": "it is GGUF", b"PK\x03\x04....": "it is a pickle of torch.save",
                   b"<!DOCTYPE html>": "it is a page of the web", b"": "cannot be read: Error while deserializing"}


@pytest.mark.parametrize("start", NOT_SAFETENSORS)
def test_what_is_not_safetensors_is_named(start, tmp_path):
    (tmp_path / "one.safetensors").write_bytes(start)
    assert refused(tmp_path / "one.safetensors", NOT_SAFETENSORS[start])


# ----------------------------------------------------------------------------------------------- folders of shards
def shards(folder, parts, listed=None, **config):
    """Fill a folder with one safetensors file of each of the parts, and an index; listed: {name: number of its file}.
    The folder."""
    edit = json.loads((Path("miniature") / "transformer" / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(edit))
    files = [f"diffusion_pytorch_model-{n}.safetensors" for n in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, folder / file)
    listed = listed or {name: n for n, part in enumerate(parts) for name in part}
    index = {"weight_map": {name: files[n] for name, n in listed.items()}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def halves(state):
    names = sorted(state)
    return [{name: state[name] for name in some} for some in (names[:70], names[70:])]


@pytest.mark.parametrize("names", [dict, released_names])
@pytest.mark.parametrize("scale", [".scale_weight", ".weight_scale"])
def test_a_folder_of_shards_in_scaled_float8_is_read_with_its_scales(scale, names, tmp_path, state):
    stored, meant = in_float8(names(state), scale)
    save_file(meant, tmp_path / "wanted.safetensors")
    (tmp_path / "it").mkdir()
    assert are_equal(read(shards(tmp_path / "it", halves(stored))), read(tmp_path / "wanted.safetensors"))


def test_shards_and_their_index_must_agree(tmp_path, state):
    """A tensor in two files, or in a file that the index does not name; and a folder that says it is quantized."""
    one, other = halves(state)
    listed = {name: n for n, part in enumerate((one, other)) for name in part}
    name = next(iter(one))
    for extra in (name, "extra"):
        shards(tmp_path, [one, other | {extra: torch.ones(1)}], listed)
        assert refused(tmp_path, f"-1.safetensors: holds other tensors than {INDEX} says, such as {extra}")
    shards(tmp_path, [one, other], quantization_config={"quant_method": "torchao"})
    assert refused(tmp_path, "config.json: quantized by torchao, which is not read")


def test_a_quantization_noted_in_the_header_is_refused_by_name(tmp_path, state):
    note = json.dumps({"layers": {"double_blocks.0.img_attn.qkv": {"format": "int8_tensorwise"}}})
    save_file(released_names(state), tmp_path / "one.safetensors", {"_quantization_metadata": note})
    assert refused(tmp_path / "one.safetensors", "img_attn.qkv is quantized as 'int8_tensorwise'")


# ---------------------------------------------------------------------------------------------------- --save-as
def merged(*flags):
    """Run engine.merge on the miniature; its exit status."""
    try:
        merge.main(["--model", "miniature", *map(str, flags)])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("name", ["diffusers", "comfyui", "comfyui-fp8"])
def test_save_as_is_read_back(name, tmp_path, state):
    """In bf16 to the bit; in scaled float8 to 1/16 of each number, or to 1/448/2 of the largest one's share."""
    file = tmp_path / "it.safetensors"
    assert merged("--weights", "miniature/transformer", "--save-as", name, "--out", file) == 0
    found = read(file)
    with safe_open(file, "pt") as opened:
        stored = {opened.get_slice(key).get_dtype() for key in opened.keys()}
        is_released = "double_blocks.0.img_attn.qkv.weight" in opened.keys()
    assert is_released is (name != "diffusers")
    assert stored == ({"BF16", "F8_E4M3", "F32"} if "fp8" in name else {"BF16"})
    for key, tensor in state.items():
        rounded = tensor.bfloat16().float()
        if "fp8" in name and tensor.ndim == 2 and "_blocks." in key:
            assert ((found[key] - rounded).abs() <= rounded.abs() / 16 + rounded.abs().max() / 448).all(), key
            assert not torch.equal(found[key], rounded)
        else:
            assert torch.equal(found[key].float(), rounded), key


def test_diffusers_reads_save_as_diffusers(tmp_path, state):
    file = tmp_path / "it.safetensors"
    assert merged("--weights", "miniature/transformer", "--save-as", "diffusers", "--out", file) == 0
    found = diffusers.FluxTransformer2DModel.from_single_file(
        str(file), config="miniature", subfolder="transformer").state_dict()
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in state.items())


def test_diffusers_converts_save_as_comfyui_back(tmp_path):
    """At FLUX.1-dev's width, the only one that its converter knows, with one column a matrix: to the bit."""
    D = 3072
    config = dict(diffusers.FluxTransformer2DModel.load_config("miniature/transformer"), num_layers=1,
                  num_single_layers=1, attention_head_dim=128, num_attention_heads=24)
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel.from_config(config)
    parameters = {name: torch.randn([*p.shape[:1], *[1 for _ in p.shape[1:]]]).bfloat16()
                  for name, p in network.named_parameters()}
    assert parameters["transformer_blocks.0.attn.to_q.weight"].shape == (D, 1)
    stub = types.SimpleNamespace(named_parameters=parameters.items, config=config)
    export.export_as(stub, tmp_path / "it.safetensors", parallel.World(), "comfyui")
    found = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(load_file(tmp_path / "it.safetensors"))
    assert are_equal(found, parameters)


def test_a_lora_in_kohyas_names_is_the_same_for_us_and_for_diffusers(tmp_path):
    """With all layers that a LoRA of ours has: to the bit of bf16; and it is trained on with the same rank."""
    model = Model("miniature")
    network = diffusers.FluxTransformer2DModel.from_config(model.configs.transformer)
    layers = lora.layers_of(network)
    pairs = {}
    for name, layer in layers.items():
        out, wide = layer.weight.shape
        pairs[f"transformer.{name}.lora_A.weight"] = torch.randn(2, wide)
        pairs[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 2)
    save_file(pairs, tmp_path / "own.safetensors")
    file = tmp_path / "kohya.safetensors"
    assert merged("--weights", tmp_path / "own.safetensors", "--save-as", "kohya", "--out", file) == 0
    assert all(name.startswith("lora_unet_") for name in load_file(file))
    trained.check(str(file), model, rank=2)
    found = lora_files.read(file, model.configs.transformer)[1]
    assert found.keys() == set(layers)
    for name, pair in found.items():
        for side in "AB":
            assert torch.equal(getattr(pair, side), pairs[f"transformer.{name}.lora_{side}.weight"].bfloat16().float())
    # diffusers splits the first layer of a single block only at FLUX.1-dev's width
    others = {name: tensor for name, tensor in load_file(file).items() if "linear1" not in name}
    theirs = diffusers.FluxPipeline.lora_state_dict(others)
    assert len(theirs) == 2 * sum(not name.startswith("single") or name.endswith("proj_out") for name in layers)
    assert all(torch.equal(tensor, pairs[name].bfloat16()) for name, tensor in theirs.items())


def test_a_lora_of_a_few_layers_in_kohyas_names(tmp_path):
    """q without k and v, with another rank beside it: the changes are the same."""
    model = Model("miniature")
    pairs = {}
    for layer, rank, rows in ((LAYER, 3, 128), ("single_transformer_blocks.0.proj_mlp", 2, 512),
                              ("single_transformer_blocks.0.attn.to_v", 4, 128), ("norm_out.linear", 1, 256)):
        pairs[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, 128).bfloat16()
        pairs[f"transformer.{layer}.lora_B.weight"] = torch.randn(rows, rank).bfloat16()
    save_file(pairs, tmp_path / "own.safetensors")
    assert merged("--weights", tmp_path / "own.safetensors", "--save-as", "kohya", "--out", tmp_path / "k.sft") == 0
    config = model.configs.transformer
    before = lora_files.read(tmp_path / "own.safetensors", config)[1]
    after = lora_files.read(tmp_path / "k.sft", config)[1]
    assert before.keys() <= after.keys()
    for layer, pair in after.items():
        change = before[layer].B @ before[layer].A if layer in before else torch.zeros(1)
        assert (pair.B @ pair.A - change).abs().max() < 1e-6, layer


REFUSALS = {
    "its names are a LoRA's": ["kohya", "it.safetensors"],
    "give a name that ends in .safetensors": ["comfyui", "it"],
}


@pytest.mark.parametrize("words", REFUSALS)
def test_save_as_that_does_not_go_is_refused(words, tmp_path, capsys):
    name, out = REFUSALS[words]
    assert merged("--weights", "miniature/transformer", "--save-as", name, "--out", tmp_path / out) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- what is finite
@pytest.mark.parametrize("what", ["weights", "lora"])
@pytest.mark.parametrize("save_as", [[], ["--save-as", "comfyui"]])
def test_merge_refuses_what_is_not_finite(what, save_as, tmp_path, state, capsys):
    """Full weights and a LoRA; nothing is written."""
    file = tmp_path / "in" / "it.safetensors"
    file.parent.mkdir()
    if what == "weights":
        broken = state[f"{LAYER}.weight"].clone()
        broken[3, 4] = torch.nan
        save_file(state | {f"{LAYER}.weight": broken}, file)
    else:
        a_lora(file.parent)
        pair = load_file(file.parent / lora_files.FILE)
        pair[f"transformer.{LAYER}.lora_B.weight"][0] = torch.inf
        save_file(pair, file)
        (file.parent / lora_files.FILE).unlink()
    out = tmp_path / ("out.safetensors" if save_as else "out")
    assert merged("--weights", file, *save_as, "--out", out) == 2
    said = capsys.readouterr().err
    assert "not finite" in said and len(said.splitlines()) == 1
    assert not out.exists()


def test_a_folder_is_not_named_like_a_file(tmp_path, capsys):
    assert merged("--weights", "miniature/transformer", "--out", tmp_path / "out.safetensors") == 2
    assert "without --save-as it is a folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [None, "diffusers", "comfyui", "comfyui-fp8"])
def test_an_export_of_what_is_not_finite_keeps_what_was_there(name, tmp_path, state):
    network = diffusers.FluxTransformer2DModel.from_pretrained("miniature/transformer")
    with torch.no_grad():
        network.proj_out.weight[1, 1] = torch.inf
    file = tmp_path / (tensors_file := "diffusion_pytorch_model.safetensors")
    file.write_bytes(b"before")
    with pytest.raises(NotFinite, match="not finite, so it is not written"):
        if name is None:
            export.export(network, tmp_path, parallel.World())
        else:
            export.export_as(network, file, parallel.World(), name)
    assert file.read_bytes() == b"before" and [path.name for path in tmp_path.iterdir()] == [tensors_file]


def test_an_adapter_that_is_not_finite_is_not_exported(tmp_path):
    network = diffusers.FluxTransformer2DModel.from_pretrained("miniature/transformer")
    lora.add_adapters(network, 2)
    with torch.no_grad():
        next(iter(lora.adapters(network).values()))[0, 0] = torch.nan
    for write in (lambda: lora.export(network, tmp_path, parallel.World()),
                  lambda: lora.save_as(network, tmp_path / "k.safetensors", parallel.World(), "kohya")):
        with pytest.raises(NotFinite):
            write()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- what is no weights
@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.int8),
                                    torch.ones(2, dtype=torch.uint8)], ids=lambda t: str(t.dtype))
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_tensor_of_true_and_false_is_no_weight(name, tensor, tmp_path):
    """But a table of positions may hold whole numbers."""
    save = save_file if name.endswith("safetensors") else torch.save
    save({"embeddings.position_ids": torch.arange(3), "a": torch.ones(2)}, tmp_path / name)
    configs.check_dtypes(tmp_path)
    save({"a": tensor}, tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: a holds .*, which are no weights"):
        configs.check_dtypes(tmp_path)


def test_a_pt_of_true_and_false_is_no_reward(tmp_path):
    torch.save({"state_dict": {"visual.conv1.weight": torch.ones(2, 3, 4, 4).bool()}}, tmp_path / "it.pt")
    with pytest.raises(UserError, match="visual.conv1.weight holds bool, which are no weights"):
        clip_model.state_of(tmp_path / "it.pt")


def test_a_refused_pickle_gives_no_unsafe_advice(tmp_path):
    """torch's own message says how to run what the file holds."""
    torch.save({"a": types.SimpleNamespace()}, tmp_path / "it.pt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(tmp_path / "it.pt", weights_only=True)
    try:
        torch.load(tmp_path / "it.pt", weights_only=True)
    except pickle.UnpicklingError as error:
        assert one_line(error) == ("holds more than tensors, which could run code, so it is not read; save the tensors "
                                   "alone")
