"""A transformer in one .safetensors file, as its authors or ComfyUI give it: with diffusers' names of the
tensors, or with black-forest-labs' own.

diffusers has the conversion from one to the other, but only of tensors in memory, 24 GB of them in every
process. So it is given marks in place of tensors, as many for every one as it takes to be split: from where
they come out is known which rows of which tensor diffusers means, and each process reads its own rows.
"""

import importlib
from pathlib import Path

import torch
from safetensors import safe_open

from engine.errors import UserError, one_line

COMFYUI = "model.diffusion_model."  # stands before the names where other networks are in the file too
# The converter splits the first layer of a single block into 3 x 3072 and 12288 rows, which are FLUX.1's; any
# other tensor into 2 or 3 equal parts.
SPLIT_IN_SEVEN = ".linear1."
MARKS_OF_SEVEN = 7 * 3072
MARKS = 6
MOST_MARKS = 2**16


def is_single_file(path):
    """Whether a path is of a file that may hold a transformer."""
    return Path(path).suffix == ".safetensors" and Path(path).is_file()


def slices_of(file):
    """{name: slice} of all tensors of a safetensors file. Raises UserError if it is none."""
    try:
        opened = safe_open(file, "pt")
        return {name: opened.get_slice(name) for name in opened.keys()}
    except Exception as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error


def tensors_of(file):
    """{diffusers' name: slice, or `Rows`} of the tensors of one file. What stands beside a transformer, in a
    file that marks it, is left out. Raises UserError if it is none of FLUX.1's."""
    slices = slices_of(file)
    if any(name.startswith(COMFYUI) for name in slices):
        slices = {name.removeprefix(COMFYUI): tensor for name, tensor in slices.items()
                  if name.startswith(COMFYUI)}
    if not any(name.startswith("double_blocks.") for name in slices):
        return slices
    return renamed(slices, file)


def library():
    """diffusers' conversions, imported when one is needed: they import much of transformers."""
    return importlib.import_module("diffusers.loaders.single_file_utils")


def renamed(slices, file):
    """The slices of a file with black-forest-labs' names, as diffusers names and splits them: {name: `Rows`}.
    Raises UserError if they are not FLUX.1's."""
    names = list(slices)
    marks = {}
    for number, name in enumerate(names):
        marks[name] = number * MOST_MARKS + torch.arange(marks_of(name))
    try:
        # It takes out of the dictionary what it knows.
        converted = library().convert_flux_transformer_checkpoint_to_diffusers(marks)
    except Exception as error:
        raise UserError(f"{file}: not FLUX.1's tensors: {one_line(error)}") from error
    if marks:
        raise UserError(f"{file}: {len(marks)} tensors are not FLUX.1's, such as {sorted(marks)[0]}")
    tensors = {}
    for name, found in converted.items():
        starts = (found.diff() != 1).nonzero().flatten() + 1  # a new stretch of rows begins
        stretches = []
        for stretch in torch.tensor_split(found, starts.tolist()):
            source = names[stretch[0] // MOST_MARKS]
            first = int(stretch[0] % MOST_MARKS)
            stretches.append(Stretch(slices[source], first, first + len(stretch), marks_of(source)))
        tensors[name] = Rows(stretches)
    return tensors


def marks_of(name):
    """How many marks stand for the rows of a tensor."""
    return MARKS_OF_SEVEN if SPLIT_IN_SEVEN in name else MARKS


class Stretch:
    """Some rows of a tensor in a file, the marks first .. last - 1 of `marks` that stand for all."""

    def __init__(self, tensor, first, last, marks):
        self.tensor = tensor
        rows, *self.width = tensor.get_shape() or [1]
        self.first = rows * first // marks
        self.last = rows * last // marks

    def __len__(self):
        return self.last - self.first


class Rows:
    """Stretches of rows one after the other, which are read when they are asked for: what of safetensors'
    slices `parallel.load_sharded` uses."""

    def __init__(self, stretches):
        self.stretches = stretches

    def get_shape(self):
        return [sum(map(len, self.stretches)), *self.stretches[0].width]

    def get_dtype(self):
        return self.stretches[0].tensor.get_dtype()

    def __getitem__(self, rows):
        """The rows of a slice first:last, a tensor."""
        parts = []
        before = 0
        for stretch in self.stretches:
            first = min(max(rows.start - before, 0), len(stretch)) + stretch.first
            last = min(max(rows.stop - before, 0), len(stretch)) + stretch.first
            parts.append(stretch.tensor[first:last])
            before += len(stretch)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
