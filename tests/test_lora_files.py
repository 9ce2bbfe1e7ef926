"""Claims about LoRAs of other tools: each is merged as diffusers merges it, or as the tool that made it means it, or
is refused by the name of its format."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from engine.errors import UserError
from engine.model import lora, lora_files, trained
from engine.model.folder import Model

D = 128  # the miniature's width
Q, K, V = (f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
OUT, FF = "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.ff.net.0.proj"
NORM = "transformer_blocks.0.norm1.linear"
SINGLE, TOP = "single_transformer_blocks.1.attn.to_q", "single_transformer_blocks.1.proj_out"
LAYERS = [Q, K, V, OUT, FF, NORM, SINGLE, TOP]


@pytest.fixture(scope="module")
def base():
    """The miniature's transformer, and a place for its copies."""
    return diffusers.FluxTransformer2DModel.from_pretrained("miniature/transformer")


def matrices(base, layers, ranks=(4,), seed=0):
    """{layer: (A, B)}; the ranks in turn."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for i, layer in enumerate(layers):
        out, wide = base.get_submodule(layer).weight.shape
        rank = ranks[i % len(ranks)]
        found[layer] = (torch.randn(rank, wide, generator=g) / 10, torch.randn(out, rank, generator=g) / 10)
    return found


def in_diffusers(pairs, a="lora_A", b="lora_B", prefix="transformer.", name=str):
    """The tensors of a LoRA with these names."""
    state = {}
    for layer, (A, B) in pairs.items():
        state |= {f"{prefix}{name(layer)}.{a}.weight": A, f"{prefix}{name(layer)}.{b}.weight": B}
    return state


def alphas(layers, values, prefix="transformer.", name=str):
    return {f"{prefix}{name(layer)}.alpha": torch.tensor(float(values[i % len(values)]))
            for i, layer in enumerate(layers)}


def noted(**config):
    """diffusers' metadata of a LoRA."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}


def flat(layer):
    return layer.replace(".", "_")


def theirs(base, file):
    """{name: tensor} of the transformer with a LoRA, as diffusers loads and fuses it."""
    network = diffusers.FluxTransformer2DModel.from_config(base.config)
    network.load_state_dict(base.state_dict())
    pipe = diffusers.FluxPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
                                  tokenizer_2=None, transformer=network)
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return network.state_dict()


def ours(base, place):
    """The same by `lora.merge_into`."""
    network = diffusers.FluxTransformer2DModel.from_config(base.config)
    network.load_state_dict(base.state_dict())
    lora.merge_into(network, str(place))
    return network.state_dict()


def largest(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def changed(base, change):
    """{name: tensor} of the transformer, a change {layer: matrix} added to its weights."""
    state = dict(base.state_dict())
    for layer, matrix in change.items():
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + matrix
    return state


def kohya(base, ranks=(4,), prefix="lora_unet_", a="lora_down", b="lora_up", name=flat):
    """(a LoRA with black-forest-labs' names, {its layer: (A, B)})."""
    rows = {"double_blocks.0.img_attn.qkv": 3 * D, "double_blocks.1.txt_attn.qkv": 3 * D,
            "double_blocks.0.img_attn.proj": D, "double_blocks.1.img_mlp.0": 4 * D,
            "double_blocks.0.img_mod.lin": 6 * D, "single_blocks.0.modulation.lin": 3 * D}
    g = torch.Generator().manual_seed(1)
    pairs = {}
    for i, (layer, n) in enumerate(rows.items()):
        rank = ranks[i % len(ranks)]
        pairs[layer] = (torch.randn(rank, D, generator=g) / 10, torch.randn(n, rank, generator=g) / 10)
    state = {}
    for layer, (A, B) in pairs.items():
        state |= {f"{prefix}{name(layer)}.{a}.weight": A, f"{prefix}{name(layer)}.{b}.weight": B}
    return state, pairs


# ------------------------------------------------------------------------------- what diffusers reads, as it does
def a_plain(base):
    return in_diffusers(matrices(base, LAYERS)), None


def a_ranks(base):
    return in_diffusers(matrices(base, LAYERS, (4, 2, 8))), None


def a_alpha(base):
    return in_diffusers(matrices(base, LAYERS)), noted(r=4, lora_alpha=8, target_modules=LAYERS)


def a_patterns(base):
    ranks = {FF: 2, SINGLE: 8}
    pairs = matrices(base, LAYERS) | matrices(base, [FF], (2,)) | matrices(base, [SINGLE], (8,))
    return in_diffusers(pairs), noted(r=4, lora_alpha=2, rank_pattern=ranks, target_modules=LAYERS,
                                      alpha_pattern={Q: 16, "ff.net.0.proj": 1, "^single_transformer_blocks.1.*": 5})


def a_rslora(base):
    return in_diffusers(matrices(base, LAYERS)), noted(r=4, lora_alpha=8, use_rslora=True, target_modules=LAYERS)


def a_bias(base):
    pairs = matrices(base, [Q, FF])
    biases = {f"transformer.{layer}.lora_B.bias": B[:, 0] for layer, (_, B) in pairs.items()}
    return in_diffusers(pairs) | biases, None


def a_alphas(base):
    return in_diffusers(matrices(base, LAYERS)) | alphas(LAYERS, (8, 1, 2.5)), None


def a_alpha_of_all(base):
    return in_diffusers(matrices(base, LAYERS, (4, 2))) | alphas(LAYERS, (3,)), None


def a_few_alphas(base):
    return in_diffusers(matrices(base, LAYERS)) | alphas([Q, OUT], (8, 8)), None


def a_down(base):
    return in_diffusers(matrices(base, LAYERS), "lora_down", "lora_up"), None


def a_kohya(base):
    state, pairs = kohya(base, (4, 3))
    return state | alphas(pairs, (1, 2.5, 7), "lora_unet_", flat), None


def a_kohya_without_alpha(base):
    return kohya(base)[0], None


def a_kohya_bf16(base):
    state, pairs = kohya(base)
    return {name: t.bfloat16() for name, t in (state | alphas(pairs, (3,), "lora_unet_", flat)).items()}, None


def a_kohya_text(base):
    state, _ = kohya(base)
    words = {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{side}.weight": torch.ones(4, 4)
             for side in ("lora_down", "lora_up")}
    return state | words | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(4.0)}, None


def a_comfy(base):
    return kohya(base, prefix="diffusion_model.", name=str)[0], None


def a_joined(base):
    """As kohya's tool joins adapters of q, k and v: each uses its own share of the rank."""
    pairs = matrices(base, [Q, K, V])
    down = torch.cat([A for A, _ in pairs.values()])
    up = torch.block_diag(*(B for _, B in pairs.values()))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(12.0)}, None


def a_zero_differences(base):
    state, _ = kohya(base)
    return state | {"lora_unet_double_blocks_0_img_attn_proj.diff_b": torch.zeros(D)}, None


def a_xlabs(base):
    state = {}
    for part, n in (("qkv_lora1", 3 * D), ("qkv_lora2", 3 * D), ("proj_lora1", D), ("proj_lora2", D)):
        for side, shape in (("down", (4, D)), ("up", (n, 4))):
            state[f"double_blocks.1.processor.{part}.{side}.weight"] = torch.randn(shape) / 10
    for side, shape in (("down", (4, D)), ("up", (3 * D, 4))):
        state[f"single_blocks.0.processor.qkv_lora.{side}.weight"] = torch.randn(shape) / 10
    return state, None


def a_onetrainer(base):
    layers = [Q, K, V, OUT, SINGLE]
    return (in_diffusers(matrices(base, layers), "lora_down", "lora_up", "lora_transformer_", flat)
            | alphas(layers, (1, 4), "lora_transformer_", flat), None)


KNOWN = [a_plain, a_ranks, a_alpha, a_patterns, a_rslora, a_bias, a_alphas, a_alpha_of_all, a_few_alphas, a_down,
         a_kohya, a_kohya_without_alpha, a_kohya_bf16, a_kohya_text, a_comfy, a_joined, a_zero_differences, a_xlabs,
         a_onetrainer]


@pytest.mark.parametrize("make", KNOWN, ids=lambda make: make.__name__)
def test_what_diffusers_reads_comes_out_as_diffusers_merges_it(make, base, tmp_path):
    """To 1e-6 of weights, where the change is more than 1e-2."""
    state, metadata = make(base)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata)
    if make is a_kohya_text:  # diffusers needs the text encoder
        wanted = tmp_path / "without.safetensors"
        save_file({name: t for name, t in state.items() if "te1" not in name}, wanted)
        wanted = theirs(base, wanted)
    else:
        wanted = theirs(base, file)
    assert largest(wanted, base.state_dict()) > 1e-2
    assert largest(ours(base, file), wanted) < 1e-6
    assert largest(ours(base, tmp_path), wanted) < 1e-6


# ---------------------------------------------------- what diffusers leaves out or cannot read, as its tool means it
def b_prefix_diffusers(base):
    pairs = matrices(base, LAYERS)
    return in_diffusers(pairs, prefix="diffusion_model."), pairs, 1


def b_prefix_none(base):
    pairs = matrices(base, LAYERS)
    return in_diffusers(pairs, prefix=""), pairs, 1


def b_lycoris(base):
    pairs = matrices(base, LAYERS)
    return (in_diffusers(pairs, "lora_down", "lora_up", "lycoris_", flat)
            | alphas(LAYERS, (8,), "lycoris_", flat), pairs, 2)


def b_onetrainer_all(base):
    pairs = matrices(base, LAYERS)
    words = {f"lora_te2_encoder_block_0_layer_0_SelfAttention_q.{side}.weight": torch.ones(4, 4)
             for side in ("lora_down", "lora_up")}
    return (in_diffusers(pairs, "lora_down", "lora_up", "lora_transformer_", flat)
            | alphas(LAYERS, (2,), "lora_transformer_", flat) | words, pairs, 0.5)


def b_down_with_alpha(base):
    pairs = matrices(base, LAYERS)
    return in_diffusers(pairs, "lora_down", "lora_up") | alphas(LAYERS, (2,)), pairs, 0.5


def b_comfy_a_b(base):
    """ComfyUI's names with peft's sides."""
    state, pairs = kohya(base, prefix="diffusion_model.", a="lora_A", b="lora_B", name=str)
    return state | alphas(pairs, (8,), "diffusion_model."), by_rows(pairs), 2


def b_fal(base):
    """A few layers alone, with black-forest-labs' names as peft wraps them."""
    state, pairs = kohya(base, prefix="base_model.model.", a="lora_A", b="lora_B", name=str)
    return state, by_rows(pairs), 1


def b_embedders(base):
    """The layers outside the blocks, which diffusers leaves out of a file of kohya's."""
    names = {"img_in": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer":
             "time_text_embed.timestep_embedder.linear_1", "final_layer.linear": "proj_out"}
    pairs = matrices(base, names.values())
    state = {}
    for name, layer in names.items():
        for side, tensor in zip(("lora_down", "lora_up"), pairs[layer], strict=True):
            state[f"lora_unet_{flat(name)}.{side}.weight"] = tensor
        state[f"lora_unet_{flat(name)}.alpha"] = torch.tensor(2.0)
    A, B = matrices(base, ["norm_out.linear"])["norm_out.linear"]
    last = "lora_unet_final_layer_adaLN_modulation_1"  # black-forest-labs has the shift before the scale
    state |= {f"{last}.lora_down.weight": A, f"{last}.lora_up.weight": torch.cat(B.chunk(2)[::-1]),
              f"{last}.alpha": torch.tensor(2.0)}
    return state, pairs | {"norm_out.linear": (A, B)}, 0.5


def by_rows(pairs):
    """{diffusers' layer: (A, its rows of B)} of pairs with black-forest-labs' names."""
    names = {"double_blocks.0.img_attn.proj": OUT, "double_blocks.1.img_mlp.0": FF, "double_blocks.0.img_mod.lin": NORM,
             "single_blocks.0.modulation.lin": "single_transformer_blocks.0.norm.linear"}
    found = {}
    for layer, (A, B) in pairs.items():
        if layer in names:
            found[names[layer]] = (A, B)
            continue
        for x, part in zip("qkv", B.chunk(3), strict=True):
            own = f"add_{x}_proj" if "txt" in layer else f"to_{x}"
            found[f"transformer_blocks.{layer.split('.')[1]}.attn.{own}"] = (A, part)
    return found


MEANT = [b_prefix_diffusers, b_prefix_none, b_lycoris, b_onetrainer_all, b_down_with_alpha, b_comfy_a_b, b_fal,
         b_embedders]


@pytest.mark.parametrize("make", MEANT, ids=lambda make: make.__name__)
def test_what_diffusers_leaves_out_comes_out_as_it_was_trained(make, base, tmp_path):
    """W + scale B A, to 1e-6."""
    state, pairs, scale = make(base)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "it.safetensors")
    wanted = changed(base, {layer: scale * B @ A for layer, (A, B) in pairs.items()})
    assert largest(wanted, base.state_dict()) > 1e-2
    assert largest(ours(base, tmp_path / "it.safetensors"), wanted) < 1e-6


@pytest.mark.parametrize("name", ["single_blocks.0.linear1", "single_blocks.0.linear2", "double_blocks.0.txt_mlp.2",
                                  "double_blocks.0.txt_attn.qkv"])
def test_a_layer_of_flux_1_dev_is_split_as_diffusers_splits_it(name, tmp_path):
    """At FLUX.1-dev's own width, where diffusers converts kohya's files: the same matrices to the bit."""
    rows = {"linear1": 7, "linear2": 1, "2": 1, "qkv": 3}[name.rpartition(".")[2]] * 3072
    wide = {"linear2": 5, "2": 4}.get(name.rpartition(".")[2], 1) * 3072
    state = {f"lora_unet_{flat(name)}.lora_down.weight": torch.randn(2, wide),
             f"lora_unet_{flat(name)}.lora_up.weight": torch.randn(rows, 2),
             f"lora_unet_{flat(name)}.alpha": torch.tensor(4.0)}
    save_file(state, tmp_path / "it.safetensors")
    config = diffusers.FluxTransformer2DModel.load_config("miniature/transformer")
    config = dict(config, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=24)
    found = lora_files.read(tmp_path / "it.safetensors", config)[1]
    wanted = diffusers.FluxPipeline.lora_state_dict(str(tmp_path / "it.safetensors"))
    assert len(wanted) == 2 * len(found)
    for layer, pair in found.items():
        for side in "AB":
            assert torch.equal(getattr(pair, side), wanted[f"transformer.{layer}.lora_{side}.weight"]), layer


def test_a_folder_of_peft_is_what_peft_merges(base, tmp_path):
    """save_pretrained's adapter_config.json and adapter_model.safetensors, with patterns."""
    peft = lora.library()
    network = diffusers.FluxTransformer2DModel.from_config(base.config)
    network.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "ff.net.0.proj"],
                             rank_pattern={"to_out.0": 2}, alpha_pattern={"to_q": 1}, init_lora_weights=False)
    wrapped = peft.get_peft_model(network, config)
    wrapped.save_pretrained(tmp_path)
    wanted = wrapped.merge_and_unload().state_dict()
    assert largest(wanted, base.state_dict()) > 1e-3
    assert largest(ours(base, tmp_path), wanted) < 1e-6
    assert largest(ours(base, tmp_path / "adapter_model.safetensors"), wanted) < 1e-6
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no adapter_config.json beside it"):
        ours(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "another name.safetensors")
    with pytest.raises(UserError, match="no adapter_config.json beside it"):
        ours(base, tmp_path)


def test_a_lora_in_float8_is_read(base, tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in kohya(base)[0].items()}
    save_file(state, tmp_path / "float8.safetensors")
    save_file({name: tensor.float() for name, tensor in state.items()}, tmp_path / "float32.safetensors")
    assert largest(ours(base, tmp_path / "float8.safetensors"), theirs(base, tmp_path / "float32.safetensors")) < 1e-6


def test_a_lora_of_another_tool_is_trained_on(base, tmp_path):
    """With --lora and its rank, if its layers are those that get adapters; the network is then the same."""
    pairs = matrices(base, [Q, K, V, OUT, FF])
    state = (in_diffusers(pairs, "lora_down", "lora_up", "lora_transformer_", flat)
             | alphas(pairs, (8,), "lora_transformer_", flat))
    save_file(state, tmp_path / "it.safetensors")
    network = diffusers.FluxTransformer2DModel.from_config(base.config)
    network.load_state_dict(base.state_dict())
    lora.add_adapters(network, 4)
    lora.start(network, 0)
    lora.load_into(network, tmp_path / "it.safetensors")
    wanted = changed(base, {layer: 2 * B @ A for layer, (A, B) in pairs.items()})
    for layer in lora.layers_of(base):
        module = network.get_submodule(layer)
        found = module.base_layer.weight + module.get_delta_weight("default")
        assert (found - wanted[f"{layer}.weight"]).abs().max() < 1e-6, layer


ON = {"has ranks [2, 4]; without --lora it is merged": lambda base: in_diffusers(matrices(base, [Q, FF], (4, 2))),
      "--lora 4 goes on with it": lambda base: in_diffusers(matrices(base, [Q])),
      "gets no adapter with --lora": lambda base: in_diffusers(matrices(base, [NORM], (8,))),
      "has a bias": lambda base: in_diffusers(matrices(base, [Q], (8,))) | {
          f"transformer.{Q}.lora_B.bias": torch.ones(D)}}


@pytest.mark.parametrize("words", ON)
def test_what_cannot_be_trained_on_says_how_it_is_merged(words, base, tmp_path):
    save_file(ON[words](base), tmp_path / "it.safetensors")
    with pytest.raises(UserError) as error:
        trained.check(str(tmp_path / "it.safetensors"), Model("miniature"), rank=8)
    assert words in str(error.value) and "python -m engine.merge" in str(error.value), str(error.value)
    trained.check(str(tmp_path / "it.safetensors"), Model("miniature"))


# ------------------------------------------------------------------------------------------------- what is refused
def plus(name, tensor=None):
    """A LoRA with one more tensor."""
    return lambda base: (a_plain(base)[0] | {name: torch.ones(2) if tensor is None else tensor}, None)


def with_note(**config):
    settings = dict(r=4, lora_alpha=4, target_modules=LAYERS) | config
    return lambda base: (a_plain(base)[0], noted(**settings))


ATTN = "lora_unet_double_blocks_0_img_attn_qkv"
REFUSED = {
    "LoKr": lambda base: ({f"{ATTN}.lokr_w1": torch.ones(4, 4), f"{ATTN}.lokr_w2": torch.ones(96, 32),
                           f"{ATTN}.alpha": torch.tensor(1.0)}, None),
    "LoHa": lambda base: ({f"{ATTN}.hada_w1_a": torch.ones(4, 4)}, None),
    "DoRA": plus(f"{ATTN}.dora_scale"),
    "OFT": lambda base: ({f"{ATTN}.oft_blocks": torch.ones(2, 2, 2)}, None),
    "LoCon with a middle matrix": plus(f"{ATTN}.lora_mid.weight"),
    "differences of weights": plus(f"{ATTN}.diff_b"),
    "a control LoRA": plus("double_blocks.0.img_attn.norm.query_norm.scale"),
    "use_dora 'True'": with_note(use_dora=True),
    "bias 'all'": with_note(bias="all"),
    "init_lora_weights 'pissa'": with_note(init_lora_weights="pissa"),
    "has no layer transformer_blocks.7.attn.to_q": lambda base: (in_diffusers(
        {"transformer_blocks.7.attn.to_q": matrices(base, [Q])[Q]}), None),
    "is not two matrices": plus(f"transformer.{K.replace('0', '1')}.lora_A.weight"),
    "is not known": plus("transformer.something.weight"),
    "holds torch.int64, which are no weights": plus("transformer.x_embedder.lora_A.weight", torch.ones(2, 2).long()),
    "holds torch.bool, which are no weights": plus("transformer.x_embedder.lora_A.weight", torch.ones(2, 2).bool()),
    "has no alpha, and the other layers have several": lambda base: (
        in_diffusers(matrices(base, LAYERS)) | alphas([Q, OUT], (8, 2)), None),
    "is there twice, under two names": lambda base: (
        a_plain(base)[0] | in_diffusers(matrices(base, [Q]), prefix="diffusion_model."), None),
    "lora_down.weight is there twice": lambda base: (
        a_plain(base)[0] | in_diffusers(matrices(base, [Q]), "lora_down", "lora_up"), None),
    "is there twice, once joined with others": lambda base: (
        a_plain(base)[0] | kohya(base)[0], None),
    "ff.net.0.proj.alpha must be one number above 0": plus(f"transformer.{FF}.alpha", torch.tensor(0.0)),
    "to_q.alpha must be one number above 0": plus(f"transformer.{Q}.alpha", torch.tensor(True)),
    "norm1.linear.alpha must be one number": plus(f"transformer.{NORM}.alpha", torch.tensor(1j)),
    "r '4.0' is no value of peft's config": with_note(r=4.0),
    "lora_alpha '8' is no value": with_note(lora_alpha="8"),
    "alpha_pattern \"{'to_q': 'x'}\" is no value": with_note(alpha_pattern={"to_q": "x"}),
    "use_rslora 'yes' is no value": with_note(use_rslora="yes"),
    "both scale it": lambda base: (in_diffusers(matrices(base, LAYERS), "lora_down", "lora_up") | alphas(LAYERS, (8,)),
                                   noted(r=4, lora_alpha=2, target_modules=LAYERS)),
    "says lora_bias false": lambda base: (a_bias(base)[0], noted(r=4, lora_alpha=2, target_modules=[Q, FF])),
    "double_blocks.0.img_attn.proj has a bias under black-forest-labs' name": lambda base: (
        b_fal(base)[0] | {"base_model.model.double_blocks.0.img_attn.proj.lora_B.bias": torch.ones(D)}, None),
    "to_k.alpha must be one number above 0": plus(f"transformer.{K}.alpha", torch.tensor(torch.nan)),
    "to_v.alpha must be one number above 0": plus(f"transformer.{V}.alpha", torch.tensor(torch.inf)),
    "proj_out.alpha must be one number above 0": plus(f"transformer.{TOP}.alpha", torch.tensor(-4.0)),
    "ff.net.0.proj.alpha is there twice, under two names": lambda base: (
        a_alphas(base)[0] | alphas([FF], (3,), "diffusion_model."), None),
    "use_bdlora": with_note(use_bdlora={"a": 1}),
    "does not say whose they are; diffusers writes transformer.lora_alpha": lambda base: (
        a_plain(base)[0], {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 8}'}),
    "a model quantized by nunchaku": plus("transformer_blocks.0.qkv_proj.qweight", torch.ones(2).to(torch.int8)),
    "not finite": lambda base: (in_diffusers({Q: (torch.full((2, D), torch.nan), torch.ones(D, 2))}), None),
    "a LoRA's settings is damaged": lambda base: (a_plain(base)[0], {"lora_adapter_metadata": "{"}),
    "settings is damaged": lambda base: (a_plain(base)[0], {"lora_adapter_metadata": "[" * 100_000}),
    "to_k.alpha must be one number": plus(f"transformer.{K}.alpha", torch.ones(2, 2, 2)),
    "cannot be read as a LoRA": lambda base: (a_plain(base)[0], noted(r=8, lora_alpha=8, target_modules=LAYERS)),
    "rank_pattern \"{'(to_q': 4}\" is no value": with_note(rank_pattern={"(to_q": 4}),
    "alpha_pattern \"{'*': 4.0}\" is no value": with_note(alpha_pattern={"*": 4.0}),
    "the bias of transformer_blocks.0.attn.to_q is [], and must be [128]": plus(
        f"transformer.{Q}.lora_B.bias", torch.tensor(1.0)),
    "to_q is [1, 128], and must be [128]": plus(f"transformer.{Q}.lora_B.bias", torch.ones(1, D)),
    "to_k.lora_A.weight is [2, 128, 1, 1], a convolution's, and this transformer": plus(
        f"transformer.{K}.lora_A.weight", torch.ones(2, D, 1, 1)),
    "to_v.lora_B.weight is [128, 2, 1], a convolution's": plus(
        f"transformer.{V}.lora_B.weight", torch.ones(D, 2, 1)),
    "to_k is not two matrices": plus(f"transformer.{K}.lora_A.weight", torch.tensor(1.0)),
    "XLabs', such as double_blocks.x.processor": plus("double_blocks.x.processor.qkv_lora1.up.weight"),
    "XLabs', such as double_blocks.1.processor.qkv_lora1.up": plus("double_blocks.1.processor.qkv_lora1.up.weight"),
    "no tensor of the transformer": lambda base: (in_diffusers(matrices(base, [Q]), prefix="text_encoder."), None),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_read_is_refused_by_name(words, base, tmp_path):
    """In one line, which names the file."""
    state, metadata = REFUSED[words](base)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "it.safetensors", metadata)
    with pytest.raises(UserError) as error:
        trained.check(str(tmp_path / "it.safetensors"), Model("miniature"))
    said = str(error.value)
    assert words in said and len(said.splitlines()) == 1 and "it.safetensors" in said, said
