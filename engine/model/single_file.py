"""A transformer in safetensors files, as diffusers, black-forest-labs or ComfyUI distribute it. Its tensors have
diffusers' names or black-forest-labs' names. A weight in float8 may have a scale beside it, in ComfyUI's spellings.
Each process reads only its own rows of each tensor."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from engine.errors import UserError, one_line
from engine.model import released
from engine.model.configs import FLOATS, slices_of

SUFFIXES = (".safetensors", ".sft")
# Before the transformer's names in a file that holds other networks too, or that ComfyUI or diffusers' adapters made.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
SCALES = (".scale_weight", ".weight_scale")  # a weight is its float8 numbers times its scale
OF_ACTIVATIONS = (".scale_input", ".input_scale")  # for products in float8, which are not made here
MARKER = "scaled_fp8"         # ComfyUI's mark of a file with SCALES, an empty tensor
QUANTIZED = ".comfy_quant"    # ComfyUI's note of a layer's format, JSON as bytes
IN_HEADER = "_quantization_metadata"  # the same of all layers, in the file's metadata
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
BLOCKS = ("double_blocks.", "transformer_blocks.")  # how a transformer's names go on after their prefix
# Files that are neither FLUX.1's weights nor float8 with a scale, by a part of a tensor's name.
OTHERS = {".absmax": "quantized by bitsandbytes", ".SCB": "quantized by bitsandbytes", "._data": "quantized by quanto",
          ".qweight": "quantized by nunchaku, GPTQ or AWQ", ".tensor_impl.": "quantized by torchao",
          "_weight_qdata": "quantized by torchao", "_quantizer.": "quantized by ModelOpt",
          ".zero_point": "quantized by SDNQ", "weight_scale_2": "quantized as nvfp4",
          "weight_scale_inv": "float8 with a scale for each block",
          "distilled_guidance_layer.": "Chroma, another model", ".ip_adapter_": "an IP-adapter",
          "double_stream_modulation_img.lin.": "FLUX.2 with black-forest-labs' names, not diffusers'"}


def is_single_file(path):
    """Whether a path is an existing file that ends in .safetensors or .sft."""
    return Path(path).suffix in SUFFIXES and Path(path).is_file()


def tensors_of(file):
    """{diffusers' name: slice, `Scaled` or `Rows`} of the transformer in one file. Raises as `named`."""
    return named(slices_of(file), [file], file)


def named(slices, files, where):
    """{diffusers' name: slice, `Scaled` or `Rows`} of a transformer's tensors, {name: slice} of some files. If names
    begin with one of PREFIXES, all other tensors are left out. `where` begins the messages. Raises UserError if there
    are two transformers, the tensors are another model's, or they are quantized otherwise than in float8."""
    for name in slices:
        for part, what in OTHERS.items():
            if part in name:
                raise UserError(f"{where}: {what} (it has {name}), which is not read; give the weights of --model in "
                                "bf16, or in float8")
    found = []
    for prefix in ("", *PREFIXES):
        if any(name.startswith((prefix + BLOCKS[0], prefix + BLOCKS[1])) for name in slices):
            found.append(prefix)
    if len(found) > 1:
        raise UserError(f"{where}: holds two transformers, one with {found[-1]} before its names; keep one of them")
    prefix = found[0] if found else ""
    slices = {name.removeprefix(prefix): tensor for name, tensor in slices.items() if name.startswith(prefix)}
    slices = with_scales(slices, files, where)
    if not any(name.startswith(BLOCKS[0]) for name in slices):
        return slices
    return renamed(slices, where)


# -------------------------------------------------------------------------------------------- scales and names
def with_scales(slices, files, where):
    """The slices without ComfyUI's tensors of a quantization: each weight that has a scale becomes `Scaled`. Raises
    UserError for another format than scaled float8, and if one matrix in float8 has a scale and another has none."""
    scaled = MARKER in slices
    for layer, known in formats_of(slices, files, where).items():
        scaled = True
        if known.get("format") not in FLOAT8 or known.get("convrot"):
            raise UserError(f"{where}: {layer} is quantized as {str(known.get('format'))[:40]!r}, which is not read; "
                            "give the model in bf16, or in float8 with scales")
    found = {name: tensor for name, tensor in slices.items()
             if name != MARKER and not name.endswith((*SCALES, *OF_ACTIVATIONS, QUANTIZED))}
    for name in slices:
        if name.endswith(SCALES):
            scaled = True
            weight = name.rpartition(".")[0] + ".weight"
            if weight not in found:
                raise UserError(f"{where}: {name} is a scale, and there is no {weight}")
            if isinstance(found[weight], Scaled):
                raise UserError(f"{where}: {weight} has two scales, {' and '.join(SCALES)}; keep one of them")
            found[weight] = Scaled(found[weight], slices[name], f"{where}: {name}")
    for name, tensor in found.items():
        bare = not isinstance(tensor, Scaled) and tensor.get_dtype().startswith("F8") and len(tensor.get_shape()) > 1
        if scaled and bare:
            raise UserError(f"{where}: {name} is in float8 without a scale, and others have one, or the file says so; "
                            "give a file that is whole")
    return found


def formats_of(slices, files, where):
    """{layer: what ComfyUI notes of its quantization, a dict} of some files. Raises UserError."""
    found = {}
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                found |= json.loads((opened.metadata() or {}).get(IN_HEADER, "{}")).get("layers", {})
        for name, tensor in slices.items():
            if name.endswith(QUANTIZED):
                found[name.removesuffix(QUANTIZED)] = json.loads(bytes(tensor[:].tolist()))
    except Exception as error:
        raise UserError(f"{where}: its note of a quantization is damaged: {one_line(error)}") from error
    if not all(isinstance(known, dict) for known in found.values()):
        raise UserError(f"{where}: its note of a quantization is damaged: a layer's is no object")
    return found


def renamed(slices, where):
    """{diffusers' name: `Rows`} from slices with black-forest-labs' names. ComfyUI has .weight where they have .scale
    in the norms of queries and keys. Raises UserError if they are not FLUX.1's."""
    theirs = {name.removesuffix("weight") + "scale" if name.endswith("_norm.weight") else name: tensor
              for name, tensor in slices.items()}
    if len(theirs) < len(slices):
        raise UserError(f"{where}: its norms are there as .weight and as .scale; keep one of them")
    try:
        pieces, others = released.pieces_of(list(theirs))
    except KeyError as error:
        raise UserError(f"{where}: not FLUX.1's tensors: {error} is missing") from error
    except Exception as error:
        raise UserError(f"{where}: not FLUX.1's tensors: {one_line(error)}") from error
    if others:
        raise UserError(f"{where}: {len(others)} tensors are not FLUX.1's, such as {sorted(others)[0]}")
    return {name: Rows([Stretch(theirs[piece.name], piece) for piece in found]) for name, found in pieces.items()}


# ---------------------------------------------------------------- what stands for a tensor, and reads its own rows
class Scaled:
    """A tensor of a file times a scale, with the methods of safetensors' slices. scale: a slice of one number, or of
    one for each row. Raises UserError if it is neither, or is not finite; `where` begins the message."""

    def __init__(self, tensor, scale, where):
        self.tensor = tensor
        rows, *width = tensor.get_shape() or [1]
        shape = scale.get_shape()
        if shape not in ([], [1], [1, 1], [rows], [rows, 1]):
            raise UserError(f"{where} has the shape {shape}, and its weight {rows} rows; one number is read, or one "
                            "for each row")
        if scale.get_dtype() not in FLOATS:
            raise UserError(f"{where} holds {scale.get_dtype()}, which are no scales")
        self.scale = scale[...].float().flatten()
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
