"""Matrices in float8 (e4m3), each row with a scale of its own: half the bytes of bf16, and products that newer cards
make twice as fast.

An e4m3 number has 3 bits after its first one, and is at least 2^-9 in steps; so small weights become coarse, and then
0. A scale for each row prevents that: of a Gaussian matrix 2.6 % is lost at any size, not 11 % at a standard deviation
of 0.005. A scale is a power of two, so that nothing more is lost when it multiplies, in bf16 too.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
OLDEST = (8, 9)  # the compute capability of Ada, the first with products in float8
SMALLEST = 1e-30  # of a row's largest number, so that a scale is above 0


def quantised(x):
    """x [..., K] -> (numbers [..., K] in float8, scales [...] float32): x is nearly their product, row by row. A row
    that is not finite has a scale that is not."""
    x = x.float()
    largest = x.abs().amax(-1)
    _, exponent = torch.frexp(largest.clamp(min=SMALLEST) / LARGEST)
    scale = torch.ldexp(torch.ones_like(largest), exponent)  # the next power of two
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (x / scale.unsqueeze(-1)).to(FLOAT8), scale


def rounded(x):
    """The same for what a layer multiplies, in few launches: scales that are not powers of two."""
    scale = x.abs().amax(-1).float().clamp(min=SMALLEST) / LARGEST
    return (x / scale.unsqueeze(-1)).to(FLOAT8), scale


def multiply(x, weight, scale, bias):
    """x W^T + bias with both factors in float8: x [..., K] is rounded here, each row by itself. weight [N, K] in
    float8, scale [N], bias [N] or None. Returns [..., N] in x's dtype. Without a gradient.

    The sums are in float32. A card without such products, and a CPU, make them of the same numbers in x's dtype.
    """
    rows, of_rows = rounded(x.flatten(0, -2))  # [M, K], [M]
    of_rows = of_rows[:, None]
    if has_products(x.device):
        y = torch._scaled_mm(rows, weight.t(), of_rows, scale.float()[None], out_dtype=x.dtype)
    else:
        y = (F.linear(rows.to(x.dtype), weight.to(x.dtype)) * scale.to(x.dtype) * of_rows).to(x.dtype)
    y = y.unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def has_products(device):
    """Whether a device makes products in float8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST


# ------------------------------------------------------------------------------------- frozen weights, stored so
class Product(torch.autograd.Function):
    """x W^T + bias of a W in float8, in x's dtype: W is cast here, and once more in the backward, so that no copy of it
    is kept. x [..., K], weight [N, K] in float8, scale [N], bias [N] or None -> [..., N]. The gradient is that in x."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        y = F.linear(x, weight.to(x.dtype))
        scale = scale.to(x.dtype)
        return y * scale if bias is None else torch.addcmul(bias, y, scale)

    @staticmethod
    def backward(ctx, gradient):
        weight, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None, None


class Float8Linear(nn.Linear):
    """A frozen linear layer whose weight is in float8. `weight` [N, K] has its numbers as bytes, since FSDP2 would
    cast a float8 to the dtype that computes; `row_scale` [N] has the scales."""

    in_float8 = False  # inside `products`: x is quantised too

    def __init__(self, layer):
        """layer: the nn.Linear in whose place it is, whose weight is not loaded yet."""
        nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.uint8), requires_grad=False)
        self.row_scale = nn.Parameter(torch.empty_like(layer.weight[:, 0]), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        weight = self.weight.view(FLOAT8)
        if self.in_float8:
            return multiply(x, weight, self.row_scale, self.bias)
        return Product.apply(x, weight, self.row_scale, self.bias)


def is_stored_so(name, parameter):
    """Whether --memory fp8 stores a frozen parameter in float8: the matrices of the blocks."""
    return parameter.ndim == 2 and "transformer_blocks." in name


def store(transformer):
    """Put a `Float8Linear` in the place of every frozen linear layer of the blocks. Nothing may be loaded yet."""
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, nn.Linear) and is_stored_so(name, layer.weight) and not layer.weight.requires_grad:
            transformer.set_submodule(name, Float8Linear(layer))


def scales_of(network):
    """{name of a weight in float8: the parameter with its scales}, under the names of `tensors.own_parameters`."""
    found = {}
    for name, parameter in network.named_parameters():
        if name.endswith(".row_scale"):
            found[name.replace(".base_layer.", ".").removesuffix("row_scale") + "weight"] = parameter
    return found


# ---------------------------------------------------------------------------------- products of a whole rollout
class Quantising(nn.Linear):
    """A linear layer that multiplies in float8 inside `products`: its weight is quantised there."""

    in_float8 = False
    keeps = False  # the quantised weight, until the end of `products`: a byte a number
    kept = None

    def forward(self, x):
        if not self.in_float8:
            return super().forward(x)
        found = self.kept
        if found is None:
            found = quantised(self.weight)
            if self.keeps:
                self.kept = found
        return multiply(x, *found, self.bias)


def enable(transformer, keeps):
    """Let the linear layers of the blocks multiply in float8 inside `products`. Left out are adapters and the norms'
    layers, which are small. keeps: whether a weight that is not in float8 is quantised once, not at every call."""
    for name, layer in transformer.named_modules():
        if "transformer_blocks." in name and type(layer) is nn.Linear and "norm" not in name and ".lora_" not in name:
            layer.__class__ = Quantising  # FSDP2 may hold its parameters already
            layer.keeps = keeps


@contextmanager
def products(transformer):
    """Inside this context linear layers multiply in float8, without a gradient: all `Float8Linear`, and those that
    `enable` chose."""
    layers = [layer for layer in transformer.modules() if isinstance(layer, (Float8Linear, Quantising))]
    for layer in layers:
        layer.in_float8 = True
    try:
        yield
    finally:
        for layer in layers:
            layer.in_float8 = False
            layer.kept = None
