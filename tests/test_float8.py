"""Claims about engine/model/float8.py: small weights keep their precision, in memory, in gradients and in files; and a
rollout can multiply in float8."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import command
import flow
import flux
from engine.errors import UserError
from engine.memory import layouts, parallel
from engine.model import export, float8, tensor_files, tensors, trained
from engine.model.folder import Model

LOST = 0.0275  # of a Gaussian matrix in e4m3 with a good scale: 0.0265; three bits after the first allow no less


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def matrix(std, *shape):
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def stored(weight):
    """A `Float8Linear` with this weight."""
    with torch.device("meta"):
        layer = nn.Linear(*reversed(weight.shape), bias=False).requires_grad_(False)
        layer = float8.Float8Linear(layer)
    layer.to_empty(device="cpu")
    tensors.fill(layer.weight, weight, layer.row_scale)
    return layer


# -------------------------------------------------------------------------------------------------------- storage
@pytest.mark.parametrize("std", [0.005, 0.02, 0.1])
def test_a_scale_for_each_row_keeps_small_weights(std):
    """The output and the gradient, of matrices of the sizes of FLUX.1-dev's weights and of the miniature's. Without a
    scale, as float8 was stored before, only the miniature's are kept so well."""
    weight = matrix(std, 256, 128)
    layer = stored(weight)
    x = matrix(1, 8, 128).requires_grad_(True)
    y = layer(x)
    y.sum().backward()
    assert distance(tensors.values(layer.weight, layer.row_scale), weight) < LOST
    assert distance(y, F.linear(x, weight)) < 1.3 * LOST
    assert distance(x.grad, torch.ones(8, 256) @ weight) < 1.3 * LOST
    plain = distance(weight.to(torch.float8_e4m3fn).float(), weight)
    assert (plain < LOST) == (std == 0.1)


def gaussian(folder, std, factor=None):
    """A `Source` of the miniature's size, whose blocks' matrices are Gaussian. factor: they have been rounded to float8
    after multiplying with it."""
    source = trained.source(None, Model("miniature"))
    found = {}
    for name, tensor in source.tensors.items():
        found[name] = tensor[:]
        if float8.is_stored_so(name, found[name]):
            found[name] = matrix(std, *found[name].shape)
            if factor:
                found[name] = (factor * found[name]).to(torch.float8_e4m3fn).float() / factor
    folder.mkdir()
    save_file(found, folder / tensor_files.ONE_FILE)
    return source._replace(tensors=tensor_files.tensors_in(folder))


def gradient_of_adapters(source, name):
    """By a --memory's own loading, after one call of the network."""
    world = parallel.World(mesh=True)
    transformer = parallel.load_sharded(tensor_files.kind_of(source.config), source, world.device, world.dtype, world,
                                        layouts.Layout(4, name, 0))
    net = flux.Flux(transformer, None, None, world.device, world.dtype)
    c = flow.Condition(matrix(1, 2, 16, 64), matrix(1, 2, 64), (4, 4))
    net.velocity(matrix(1, 2, 16, 64), 0.5, c, 3.5).pow(2).mean().backward()
    found = torch.cat([tensors.full(p.grad).flatten() for p in layouts.trainable(transformer)])
    world.close()
    return found


@pytest.mark.parametrize("std", [0.005, 0.02, 0.1])
def test_a_network_with_a_base_in_float8_has_the_gradient_of_float32(tmp_path, std):
    """That of its adapters, as near as float8 can come: as near as if all weights were of the format's best size. A
    plain cast of the base is not at the two smaller sizes."""
    exact = gradient_of_adapters(gaussian(tmp_path / "exact", std), "bf16")
    best = gradient_of_adapters(gaussian(tmp_path / "best", std, factor=1 / std), "bf16")
    cast = gradient_of_adapters(gaussian(tmp_path / "cast", std, factor=1), "bf16")
    ours = gradient_of_adapters(gaussian(tmp_path / "ours", std), "fp8")
    allowed = 1.1 * distance(best, exact)
    assert distance(ours, exact) < allowed
    assert (distance(cast, exact) < allowed) == (std == 0.1)


@pytest.mark.parametrize("std", [0.005, 0.02, 0.1])
def test_a_file_in_float8_loses_no_more(std):
    """As --save-as comfyui-fp8 writes it, and once more as --memory fp8 reads it: powers of two lose once."""
    weight = matrix(std, 256, 128)
    numbers, scale = export.scaled(lambda: [weight])
    written = numbers.float() * scale
    assert distance(written, weight) < LOST
    layer = stored(written)
    assert distance(tensors.values(layer.weight, layer.row_scale), weight) < LOST


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen_in_the_scale(value):
    weight = matrix(0.02, 4, 8)
    weight[1, 2] = value
    layer = stored(weight)
    assert not tensors.are_finite(layer.parameters())
    assert tensors.are_finite(stored(torch.zeros(4, 8)).parameters())
    assert torch.equal(stored(torch.zeros(4, 8))(torch.ones(1, 8)), torch.zeros(1, 4))


def test_no_copy_of_a_weight_is_kept_for_the_backward():
    layer = stored(matrix(0.02, 256, 128))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda t: t):
        layer(matrix(1, 8, 128).requires_grad_(True))
    assert sum(saved) == 256 * 128 + 256 * 4


# ------------------------------------------------------------------------------------------------------- products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_rounded_factors(dtype):
    """Both factors lose what float8 loses, and the sum no more than its dtype."""
    weight, x, bias = matrix(0.02, 64, 128), matrix(3, 2, 5, 128).flip(0), matrix(1, 64)
    x[0, 0] = 0
    numbers, scale = float8.quantised(weight)
    rows, of_rows = float8.rounded(x.to(dtype))
    exact = F.linear(rows.double() * of_rows[..., None], numbers.double() * scale[:, None])
    y = float8.multiply(x.to(dtype), numbers, scale, bias.to(dtype))
    assert y.dtype == dtype and distance(y.double(), exact + bias) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert distance(exact, F.linear(x.double(), weight.double())) < 1.5 * LOST


def test_the_products_of_torch_are_the_same():
    """torch._scaled_mm, which a card with float8 runs: as this machine's CPU makes it."""
    x, weight = matrix(1, 16, 64), matrix(0.02, 32, 64)
    (a, of_a), (b, of_b) = float8.rounded(x), float8.quantised(weight)
    theirs = torch._scaled_mm(a, b.t(), of_a[:, None], of_b[None], out_dtype=torch.bfloat16)
    assert distance(theirs.float(), float8.multiply(x, b, of_b, None)) < 4e-3


@pytest.mark.parametrize("keeps", [True, False])
def test_a_rollout_alone_multiplies_in_float8(keeps):
    """The norms' layers do not; afterwards the network is what it was, and nothing is kept."""
    net = flow.load(Model("miniature"))
    start = matrix(1, 2, 16, 64)
    c = flow.Condition(matrix(1, 2, 16, 64), matrix(1, 2, 64), (4, 4))
    levels = torch.tensor([1.0, 0.6, 0.0])
    before = net.rollout(start, c, levels, 3.5)
    float8.enable(net.transformer, keeps)
    assert torch.equal(net.rollout(start, c, levels, 3.5), before)
    rounded = net.rollout(start, c, levels, 3.5, dtype="fp8")
    assert 0.001 < distance(rounded, before) < 0.1
    assert torch.equal(net.rollout(start, c, levels, 3.5), before)
    chosen = [layer for layer in net.transformer.modules() if isinstance(layer, float8.Quantising)]
    assert chosen and not any(layer.kept or layer.in_float8 for layer in chosen)
    assert not isinstance(net.transformer.transformer_blocks[0].norm1.linear, float8.Quantising)


def test_a_method_that_trains_on_its_rollout_needs_it_exact():
    with pytest.raises(UserError, match="--method dancegrpo --rollout-dtype fp8: .*its own rollout"):
        command.flags(["--model", "miniature", "--method", "dancegrpo", "--group", "2", "--rollout-dtype", "fp8"])
