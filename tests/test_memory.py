"""Claims about engine/memory/ and engine/model/lora.py: every --memory trains what the plain path trains, on one
process and on two. On the CPU, through the code that runs on GPUs."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from builders import a_batch, backward
from memory_worker import KINDS, RANK, Small, as_on_a_gpu
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import call
from torch.distributed.fsdp import FSDPModule

import direct_align as da
import flow
import rewards
from engine.errors import UserError
from engine.memory import adamw, layouts, lean, modes, parallel
from engine.model import lora, lora_files, trained
from engine.model.folder import Model

MODES = [name for _, name in KINDS]


# ------------------------------------------------------------------------------- every path, run by processes
class Case:
    """What tests/memory_worker.py wrote."""

    def __init__(self, folder):
        self.facts = json.loads((folder / "facts.json").read_text())
        self.tensors = {name: load_file(folder / f"{name}.safetensors") for name in self.facts}

    def flat(self, name, what):
        found = self.tensors[name]
        return torch.cat([found[key].flatten() for key in sorted(found) if key.startswith(what)])


def run(folder, *argv, ranks=0):
    folder.mkdir()
    call(folder / "printed", "tests/memory_worker.py", folder, *argv, ranks=ranks)
    return Case(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process, in float32."""
    return run(tmp_path_factory.mktemp("memory") / "one")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes, in float32."""
    return run(tmp_path_factory.mktemp("memory") / "two", ranks=2)


@pytest.fixture(scope="module")
def as_a_gpu(tmp_path_factory):
    """One process that computes in bf16, and recomputes activations."""
    return run(tmp_path_factory.mktemp("memory") / "bf16", "bf16", ranks=1)


@pytest.fixture(params=["one", pytest.param("two", marks=pytest.mark.slow)])
def case(request):
    """Either of them: that two ranks of a float8 base train is shown by default in test_one_card.py."""
    return request.getfixturevalue(request.param)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def same_as(name):
    """The path that a --memory is compared with."""
    return "masters" if name in modes.FULL else "bf16"


@pytest.mark.parametrize("name", ["offload", "stream"])
def test_offload_is_masters(case, name):
    """Weights after two updates to 1e-8; and between updates parameters and moments lie on the host, where
    FSDP2's policy for the host has put them."""
    assert distance(case.flat(name, "weight"), case.flat("masters", "weight")) < 1e-8
    assert case.facts[name]["offloaded"] and not case.facts["masters"]["offloaded"]
    assert case.facts[name]["devices"] == ["cpu"] and case.facts[name]["resharded"]


@pytest.mark.parametrize("name", ["fp8", "fp8-offload"])
def test_a_base_in_fp8_gives_the_gradient_of_bf16(case, name):
    """To what rounding the miniature's weights to three bits leaves of it: 0.9981 of a cosine."""
    got = torch.cosine_similarity(case.flat(name, "gradient"), case.flat("bf16", "gradient"), dim=0)
    assert got > 0.998
    assert case.facts[name]["dtypes"] == ["float32", "uint8"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_two_ranks_train_as_one_process(one, two, name):
    """To 1e-6 in the gradient. The weights after two updates too; but Adam turns 1e-8 of a small gradient
    into more, and with split the gradients themselves are bf16."""
    near = 4e-3 if name == "split" else 1e-6
    assert distance(two.flat(name, "gradient"), one.flat(name, "gradient")) < near
    near = 1e-3 if name in modes.LORA else 1e-5
    assert distance(two.flat(name, "weight"), one.flat(name, "weight")) < near


@pytest.mark.parametrize("name", ["split", "offload", "fp8"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(case, name):
    """To the bit: two updates, a checkpoint, one more."""
    assert case.facts[name]["resumed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_every_path_computes_in_bf16_as_on_a_gpu(as_a_gpu, one, name):
    """Its gradient is float32's to a few per cent, as bf16 is; all stays finite."""
    facts = as_a_gpu.facts[name]
    expected = {"split": ["bfloat16"], "bf16": ["bfloat16", "float32"]}
    if name.startswith("fp8"):
        assert facts["dtypes"] == ["bfloat16", "float32", "uint8"]
    else:
        assert facts["dtypes"] == expected.get(name, ["float32"])
    assert facts["finite"] and facts["resharded"]
    got, exact = as_a_gpu.flat(name, "gradient"), one.flat(same_as(name), "gradient")
    assert torch.cosine_similarity(got, exact, dim=0) > 0.97


def test_one_process_computes_with_what_it_stores_as_fsdp_would(monkeypatch):
    """With --memory split in bf16 it runs without FSDP2, which would only copy. The gradient is the same to the bit.
    Where all blocks' gradients are added, in bf16 and another order, it is nearly so: time, guidance and text."""
    monkeypatch.setattr(parallel, "device_and_dtype", as_on_a_gpu)
    world = parallel.World(mesh=True)
    plain = Small(world, None, "split")
    monkeypatch.setattr(layouts.Layout, "needs_no_copies", lambda *arguments: False)
    sharded = Small(world, None, "split")
    assert isinstance(sharded.net.transformer, FSDPModule) and not isinstance(plain.net.transformer, FSDPModule)
    assert plain.gradient(1) == sharded.gradient(1)
    ours, theirs = plain.gradients(), sharded.gradients()
    world.close()
    for name, gradient in ours.items():
        near = 0.01 if "time_text_embed" in name else 0
        assert (gradient - theirs[name]).norm() <= near * theirs[name].norm(), name


@pytest.mark.slow
def test_state_takes_the_bytes_that_the_names_promise(one, as_a_gpu):
    """Beside the gradients, 12 bytes a parameter with float32 masters and 8 with split ones; a LoRA has 12 a
    parameter of the adapters, beside 2 of the base in bf16 or about 1 in fp8."""
    masters = one.facts["masters"]["state_bytes"]
    parameters = masters / 12
    assert one.facts["offload"]["state_bytes"] == masters
    assert one.facts["split"]["state_bytes"] == 8 * parameters
    trained = one.flat("bf16", "weight").numel()
    base = {}
    for name in modes.LORA:
        facts = as_a_gpu.facts[name]
        assert facts["state_bytes"] == 12 * trained
        base[name] = (facts["all_bytes"] - facts["state_bytes"]) / parameters
    assert base["bf16"] == 2 and base["fp8"] == base["fp8-offload"]
    assert 1 < base["fp8"] < 1.1


# -------------------------------------------------------------------------------------------------- optimizer
def test_a_float32_is_split_and_joined_to_the_bit():
    """Every finite one; its upper half is torch's own bf16 of it but where two are equally near. What is not
    finite stays so in the upper half, where it is looked for, and when it is joined."""
    bits = torch.randint(-2**31, 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, 0x3F80FFFF, 0x3F817FFF, 0, -2**31])
    numbers = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    numbers = numbers[numbers.isfinite()]
    high, low = adamw.split(numbers)
    assert torch.equal(adamw.join(high, low).view(torch.int32), numbers.view(torch.int32))
    is_tie = numbers.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(high[~is_tie], numbers[~is_tie].to(torch.bfloat16))
    broken = torch.tensor([0x7F800000, 0x7FFFFFFF, 0x7FC00000, -0x800000], dtype=torch.int32)
    high, low = adamw.split(broken.view(torch.float32))
    assert not high.isfinite().any() and not adamw.join(high, low).isfinite().any()


@pytest.mark.parametrize("small", [0, 100, 10_000], ids=["each alone", "one alone", "all at once"])
def test_split_adamw_is_adamw(monkeypatch, small):
    """On bf16 weights with float32 moments, fed bf16 gradients: to the bit torch's AdamW on float32 masters
    that is fed the same, and the weights are the masters rounded. So is each parameter's step."""
    monkeypatch.setattr(adamw, "SMALL", small)
    generator = torch.Generator().manual_seed(0)
    weights = [0.05 * torch.randn(shape, generator=generator) for shape in ((40, 30), (30,))]
    halves = [torch.nn.Parameter(weight.to(torch.bfloat16)) for weight in weights]
    masters = [torch.nn.Parameter(half.detach().float()) for half in halves]
    ours = adamw.SplitAdamW(halves, 5e-6, weight_decay=1e-4, moments=torch.float32)
    torchs = torch.optim.AdamW(masters, 5e-6, weight_decay=1e-4)
    for _ in range(50):
        for half, master in zip(halves, masters, strict=True):
            half.grad = torch.randn(half.shape, generator=generator).mul(1e-3).to(torch.bfloat16)
            master.grad = half.grad.float()
        ours.step()
        torchs.step()
    for half, master in zip(halves, masters, strict=True):
        joined = adamw.join(half.detach(), ours.state[half]["low"].view(torch.int16))
        assert torch.equal(joined, master.detach()) and ours.state[half]["step"] == 50
        assert torch.equal(half.detach(), adamw.split(master.detach())[0])


def test_split_adamw_keeps_what_bf16_would_lose():
    """Updates of 5e-6 on weights of .02, which bf16 rounds to multiples of 1.2e-4: 19 updates in one
    direction move a weight by 9.5e-5. Plain AdamW on bf16 weights moves none."""
    start = torch.full((1000,), 0.02).to(torch.bfloat16)
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [adamw.SplitAdamW([ours], 5e-6), torch.optim.AdamW([plain], 5e-6, weight_decay=0)]
    for _ in range(19):
        for parameter, optimizer in zip((ours, plain), optimizers, strict=True):
            parameter.grad = torch.full_like(parameter, 1e-3)
            optimizer.step()
    moved = start.float() - adamw.join(ours.detach(), optimizers[0].state[ours]["low"].view(torch.int16))
    assert moved == pytest.approx(19 * 5e-6, rel=0.01)
    assert torch.equal(plain.detach(), start)


@pytest.mark.slow
def test_the_distance_of_split_masters_from_float32(flags):
    """200 updates of SRPO on the miniature, all fed the same gradients; distance of the weights from AdamW's
    in float32, in units of the way that those have gone. (pytest -m slow -s)"""
    a = flags("--threshold", "off", "--form", "srp", "--branches", "denoise")
    net = flow.load(Model("miniature"))
    reward = rewards.load_rewards("miniature/reward")
    prompts = Path("miniature/prompts.txt").read_text().splitlines()
    embeddings = flow.encode_prompts(Model("miniature"), prompts)
    start = [p.detach().to(torch.bfloat16) for p in net.transformer.parameters()]
    masters = list(net.transformer.parameters())
    with torch.no_grad():
        for master, weight in zip(masters, start, strict=True):
            master.copy_(weight)
    options = {"lr": 2.5e-5, "weight_decay": 1e-4}
    reference = torch.optim.AdamW(masters, **options)
    halves = {}
    for name, moments in (("float32 moments", torch.float32), ("bf16 moments", torch.bfloat16)):
        parameters = [torch.nn.Parameter(weight.clone()) for weight in start]
        halves[name] = adamw.SplitAdamW(parameters, **options, moments=moments)
    plain = torch.optim.AdamW([torch.nn.Parameter(weight.clone()) for weight in start], **options)
    off = {}
    for step in range(1, 201):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, len(prompts), (4,), generator=generator)
        c = embeddings.condition(rows, (4, 4), "cpu")
        eps = torch.randn(4, 16, 64, generator=generator)
        x0 = net.rollout(eps, c, da.sigma_steps(4, 3.0), 1.0)
        texts = [prompts[row] for row in rows]
        levels = torch.randint(50, 950, (4,), generator=generator)
        backward(a, net, reward, a_batch(texts, c, x0, eps, [levels]))
        torch.nn.utils.clip_grad_norm_(masters, 0.1)
        for optimizer in (*halves.values(), plain):
            for parameter, master in zip(optimizer.param_groups[0]["params"], masters, strict=True):
                parameter.grad = master.grad.to(torch.bfloat16)
            optimizer.step()
        reference.step()
        reference.zero_grad()
        if step in (19, 200):
            way = [m.detach() - w.float() for m, w in zip(masters, start, strict=True)]
            length = torch.cat([w.flatten() for w in way]).norm()
            found = {name: [adamw.join(p.detach(), optimizer.state[p]["low"].view(torch.int16))
                            for p in optimizer.param_groups[0]["params"]]
                     for name, optimizer in halves.items()}
            weights = [p.detach().float() for p in plain.param_groups[0]["params"]]
            found["plain AdamW on bf16 weights"] = weights
            for name, weights in found.items():
                apart = [w - m.detach() for w, m in zip(weights, masters, strict=True)]
                off[name, step] = (torch.cat([each.flatten() for each in apart]).norm() / length).item()
                print(f"{name}, {step} updates: distance {off[name, step]:.4f}")
    assert off["bf16 moments", 19] < 0.005 and off["bf16 moments", 200] < 0.01
    assert off["plain AdamW on bf16 weights", 19] > 0.5


# ------------------------------------------------------------------------------------------------------- LoRA
@pytest.fixture
def world():
    return parallel.World()


def load_miniature(world, layout):
    """The miniature's transformer, laid out."""
    source = trained.source(None, Model("miniature"))
    return parallel.load_sharded(diffusers.FluxTransformer2DModel, source, world.device, world.dtype, world, layout)


def with_adapters(miniature, world, rank=RANK, seed=0):
    """The miniature with adapters whose B is not zero, so that they matter."""
    transformer = load_miniature(world, layouts.Layout(rank, "bf16", seed))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.adapters(transformer).items():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return replace(miniature, transformer=transformer)


def velocity(net):
    """Of three images of noise."""
    generator = torch.Generator().manual_seed(2)
    c = flow.Condition(torch.randn(3, 16, 64, generator=generator), torch.randn(3, 64, generator=generator),
                       (4, 4))
    with torch.no_grad():
        return net.velocity(torch.randn(3, 16, 64, generator=generator), 0.7, c, 3.5)


def test_adapters_start_as_the_base_and_can_be_switched_off(miniature, world):
    layout = layouts.Layout(RANK, "bf16", 0)
    fresh = load_miniature(world, layout)
    base = velocity(miniature)
    assert torch.equal(velocity(replace(miniature, transformer=fresh)), base)
    net = with_adapters(miniature, world)
    changed = velocity(net)
    assert distance(changed, base) > 0.01
    with lora.adapter_off(net.transformer):
        assert torch.equal(velocity(net), base)
    assert torch.equal(velocity(net), changed)
    assert all(parameter.requires_grad for parameter in lora.adapters(net.transformer).values())


def test_adapters_stand_beside_all_linear_layers_of_the_blocks(miniature, world):
    """But those of the norms: 12 a double block and 5 a single one, 418 of FLUX.1-dev. Their start is drawn
    from name and seed; A as nn.Linear's weight, B zero; nothing else is trained."""
    first, again, other = (with_adapters(miniature, world, seed=seed).transformer for seed in (0, 0, 1))
    found = lora.adapters(first)
    assert len(found) == 2 * (2 * 12 + 4 * 5) and 19 * 12 + 38 * 5 == 418
    assert set(map(id, layouts.trainable(first))) == set(map(id, found.values()))
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    assert torch.equal(found[key], lora.adapters(again)[key])
    assert not torch.equal(found[key], lora.adapters(other)[key])
    assert not torch.equal(found[key], found[key.replace("to_q", "to_k")])
    assert found[key].abs().max() <= 128**-0.5


def test_the_file_loads_in_diffusers_and_merged_is_loaded(tmp_path, miniature, world):
    """FluxPipeline.load_lora_weights("folder") computes what was trained, to 1e-5; and so, to 1e-6 of it,
    does a transformer that the adapters were merged into."""
    net = with_adapters(miniature, world)
    lora.export(net.transformer, tmp_path, world)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = diffusers.FluxPipeline.from_pretrained("miniature")
    pipe.load_lora_weights(str(tmp_path))
    loaded = velocity(replace(miniature, transformer=pipe.transformer))
    assert (loaded - velocity(net)).abs().max() < 1e-5
    merged = flow.load(Model("miniature")).transformer
    lora.merge_into(merged, tmp_path)
    assert distance(velocity(replace(miniature, transformer=merged)), loaded) < 1e-6


def test_the_file_has_the_names_that_comfyui_maps(tmp_path, miniature, world):
    """transformer.<a layer as diffusers names it>.lora_A.weight and .lora_B.weight, and nothing of peft's."""
    lora.export(with_adapters(miniature, world).transformer, tmp_path, world)
    layers = {name.removesuffix(".weight") for name, p in miniature.transformer.named_parameters()
              if p.ndim == 2}
    with safe_open(tmp_path / lora.FILE, "pt") as file:
        for key in file.keys():
            layer, side, weight = key.removeprefix("transformer.").rsplit(".", 2)
            assert key.startswith("transformer.") and layer in layers
            assert side in ("lora_A", "lora_B") and weight == "weight"


def test_a_lora_is_read_back_into_adapters(tmp_path, miniature, world):
    net = with_adapters(miniature, world)
    lora.export(net.transformer, tmp_path, world)
    fresh = load_miniature(world, layouts.Layout(RANK, "bf16", 5))
    lora.load_into(fresh, tmp_path)
    assert torch.equal(velocity(replace(miniature, transformer=fresh)), velocity(net))


def test_alpha_is_taken_from_where_diffusers_notes_it(tmp_path, miniature, world):
    net = with_adapters(miniature, world)
    lora.export(net.transformer, tmp_path, world)
    tensors = load_file(tmp_path / lora.FILE)
    noted = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK})
    save_file(tensors, tmp_path / lora.FILE, {"lora_adapter_metadata": noted})
    _, pairs = lora_files.read(tmp_path, miniature.transformer.config)
    layer = "transformer_blocks.0.attn.to_q"
    assert torch.equal(pairs[layer][1], 2 * tensors[f"transformer.{layer}.lora_B.weight"])


LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize("tensors, words", [
    ({"text_encoder.a.lora_A.weight": (4, 128)}, "holds no tensor of the transformer"),
    ({f"{LAYER}.lora_C.weight": (4, 128)}, "is not known"),
    ({f"{LAYER}.lora_A.weight": (4, 128)}, "is not two matrices"),
    ({}, "holds no tensor"),
    ({f"{LAYER}.lora_A.weight": (8, 128), f"{LAYER}.lora_B.weight": (128, 8)}, "another rank"),
    ({f"{LAYER}.lora_A.weight": (4, 64), f"{LAYER}.lora_B.weight": (64, 4)}, "another model's"),
    ({f"{LAYER}x.lora_A.weight": (4, 128), f"{LAYER}x.lora_B.weight": (128, 4)}, "this transformer has no"),
], ids=["text encoder", "another tool's", "half a pair", "empty", "another rank", "another width",
        "another layer"])
def test_a_lora_that_is_not_of_this_model_is_one_line(tmp_path, miniature, world, tensors, words):
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / lora.FILE)
    net = with_adapters(miniature, world)
    before = velocity(net)
    with pytest.raises(UserError, match=words) as error:
        lora.load_into(net.transformer, tmp_path)
    assert "\n" not in str(error.value)
    assert torch.equal(velocity(net), before)
    if words != "another rank":  # it can be merged all the same
        with pytest.raises(UserError, match=words):
            lora.merge_into(flow.load(Model("miniature")).transformer, tmp_path)


def test_a_lora_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / lora.FILE).write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="pytorch_lora_weights.safetensors: cannot be read") as error:
        lora_files.read(tmp_path, {})
    assert "\n" not in str(error.value)
    assert lora.is_lora(tmp_path) and not lora.is_lora(tmp_path / "none")


@pytest.mark.parametrize("rank, name", [(None, "fp8"), (8, "split")])
def test_a_memory_that_is_for_something_else_is_one_line(rank, name):
    with pytest.raises(UserError, match=f"--memory {name}: is for"):
        modes.check(rank, name)
    for allowed in ("auto", *modes.choices(rank)):
        modes.check(rank, allowed)


# -------------------------------------------------------------------------------------------- the reward path
def test_of_a_reward_the_image_side_alone_stays(tmp_path):
    """What the image side runs stays, in another dtype, and computes nearly the same; the text side goes."""
    reward = rewards.load_reward("miniature/reward")
    network = reward.model
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = reward.image_features(images)

    def look():
        return reward.image_features(images)

    assert lean.parts_used(network, look) == [network.visual]
    lean.keep_only_what_is_used(network, look, torch.bfloat16)
    assert {p.dtype for p in network.visual.parameters()} == {torch.bfloat16}
    assert network.token_embedding.weight.dtype == torch.float32
    images.requires_grad_(True)
    after = reward.image_features(images)
    after.sum().backward()
    assert torch.cosine_similarity(after, before, dim=-1).min() > 0.999
    assert images.grad.isfinite().all()


def test_the_decoder_recomputed_gives_the_same_gradient(miniature):
    z = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    vae = flow.load(Model("miniature")).vae
    vae.enable_gradient_checkpointing()
    gradients = []
    for net in (miniature, replace(miniature, vae=vae)):
        x = z.clone().requires_grad_(True)
        net.decode(x, (4, 4))[:, 0].sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
