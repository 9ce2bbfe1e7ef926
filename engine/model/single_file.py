"""A transformer in one safetensors file, as black-forest-labs or ComfyUI distribute it. Its tensors have diffusers'
names or black-forest-labs' names. A weight in float8 may have a scale beside it, in ComfyUI's spellings. Each process
reads only its own rows of each tensor."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from engine.errors import UserError, one_line
from engine.model import released

SUFFIXES = (".safetensors", ".sft")
# Before the transformer's names in a file that holds other networks too, or that ComfyUI or diffusers' adapters made.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
SCALES = (".scale_weight", ".weight_scale")  # a weight is its float8 numbers times its scale
OF_ACTIVATIONS = (".scale_input", ".input_scale")  # for products in float8, which are not made here
MARKER = "scaled_fp8"         # ComfyUI's mark of a file with SCALES, an empty tensor
QUANTIZED = ".comfy_quant"    # ComfyUI's note of a layer's format, JSON as bytes
IN_HEADER = "_quantization_metadata"  # the same of all layers, in the file's metadata
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def is_single_file(path):
    """Whether a path is an existing file that ends in .safetensors or .sft."""
    return Path(path).suffix in SUFFIXES and Path(path).is_file()


def slices_of(file):
    """{name: slice} of all tensors of a safetensors file. A slice reads its rows on demand. Raises UserError if the
    file cannot be read."""
    try:
        opened = safe_open(file, "pt")
        return {name: opened.get_slice(name) for name in opened.keys()}
    except Exception as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error


def tensors_of(file):
    """{diffusers' name: slice, `Scaled` or `Rows`} of the transformer in one file. If names begin with one of PREFIXES,
    all other tensors are left out. Raises UserError if the file is not FLUX.1's, or is quantized otherwise."""
    slices = slices_of(file)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in slices):
            slices = {name.removeprefix(prefix): tensor for name, tensor in slices.items() if name.startswith(prefix)}
            break
    slices = with_scales(slices, file)
    if not any(name.startswith("double_blocks.") for name in slices):
        return slices
    return renamed(slices, file)


# -------------------------------------------------------------------------------------------- scales and names
def with_scales(slices, file):
    """The slices without ComfyUI's tensors of a quantization: each weight that has a scale becomes `Scaled`. Raises
    UserError for another format than scaled float8."""
    for layer, known in formats_of(slices, file).items():
        if known.get("format") not in FLOAT8 or known.get("convrot"):
            raise UserError(f"{file}: {layer} is quantized as {str(known.get('format'))[:40]!r}, which is not read; "
                            "give the model in bf16, or in float8 with scales")
    found = {name: tensor for name, tensor in slices.items()
             if name != MARKER and not name.endswith((*SCALES, *OF_ACTIVATIONS, QUANTIZED))}
    for name in slices:
        for ending in SCALES:
            if name.endswith(ending):
                weight = name.removesuffix(ending) + ".weight"
                if weight not in found:
                    raise UserError(f"{file}: {name} is a scale, and there is no {weight}")
                found[weight] = Scaled(found[weight], slices[name][...], f"{file}: {name}")
    return found


def formats_of(slices, file):
    """{layer: what ComfyUI notes of its quantization, a dict} of a file. Raises UserError."""
    try:
        with safe_open(file, "pt") as opened:
            found = dict(json.loads((opened.metadata() or {}).get(IN_HEADER, "{}")).get("layers", {}))
        for name, tensor in slices.items():
            if name.endswith(QUANTIZED):
                found[name.removesuffix(QUANTIZED)] = json.loads(bytes(tensor[:].tolist()))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its note of a quantization is damaged: {one_line(error)}") from error
    if not all(isinstance(known, dict) for known in found.values()):
        raise UserError(f"{file}: its note of a quantization is damaged: a layer's is no object")
    return found


def renamed(slices, file):
    """{diffusers' name: `Rows`} from the slices of a file with black-forest-labs' names. ComfyUI has .weight where they
    have .scale in the norms of queries and keys. Raises UserError if they are not FLUX.1's."""
    slices = {name.removesuffix("weight") + "scale" if name.endswith("_norm.weight") else name: tensor
              for name, tensor in slices.items()}
    try:
        pieces, others = released.pieces_of(list(slices))
    except Exception as error:
        raise UserError(f"{file}: not FLUX.1's tensors: {one_line(error)}") from error
    if others:
        raise UserError(f"{file}: {len(others)} tensors are not FLUX.1's, such as {sorted(others)[0]}")
    return {name: Rows([Stretch(slices[piece.name], piece) for piece in found]) for name, found in pieces.items()}


# ---------------------------------------------------------------- what stands for a tensor, and reads its own rows
class Scaled:
    """A tensor of a file times a scale, with the methods of safetensors' slices. scale: one number, or one of each
    row. Raises UserError if it is neither, or is not finite; `where` begins the message."""

    def __init__(self, tensor, scale, where):
        self.tensor = tensor
        self.scale = scale.float().flatten()
        rows, *width = tensor.get_shape() or [1]
        if self.scale.numel() not in (1, rows):
            raise UserError(f"{where} has {self.scale.numel()} numbers, and its weight {rows} rows")
        if not self.scale.isfinite().all():
            raise UserError(f"{where} is not finite")
        self.each = [1] * len(width)  # the shape of a row's scale

    def get_shape(self):
        return self.tensor.get_shape()

    def get_dtype(self):
        """Of the product, unless the tensor holds no weights at all."""
        return "F32" if self.tensor.get_dtype() in ("F8_E4M3", "F8_E5M2") else self.tensor.get_dtype()

    def __getitem__(self, rows):
        """The rows of a Python slice first:last, as a float32 tensor."""
        scale = self.scale if len(self.scale) == 1 else self.scale[rows]
        return self.tensor[rows].float() * scale.view(-1, *self.each)


class Stretch:
    """Consecutive rows of a tensor in a file, a `released.Piece`."""

    def __init__(self, tensor, piece):
        self.tensor = tensor
        rows, *self.width = tensor.get_shape() or [1]
        self.first, self.last = piece.of(rows)

    def __len__(self):
        return self.last - self.first


class Rows:
    """Several `Stretch`es, one after the other, as one tensor whose rows are read on demand. It has the methods of
    safetensors' slices that `parallel.load_sharded` uses."""

    def __init__(self, stretches):
        self.stretches = stretches

    def get_shape(self):
        return [sum(map(len, self.stretches)), *self.stretches[0].width]

    def get_dtype(self):
        return self.stretches[0].tensor.get_dtype()

    def __getitem__(self, rows):
        """The rows of a Python slice first:last, as a tensor."""
        parts = []
        before = 0
        for stretch in self.stretches:
            first = min(max(rows.start - before, 0), len(stretch)) + stretch.first
            last = min(max(rows.stop - before, 0), len(stretch)) + stretch.first
            parts.append(stretch.tensor[first:last])
            before += len(stretch)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
