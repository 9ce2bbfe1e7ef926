"""A transformer in one .safetensors file, as black-forest-labs or ComfyUI distribute it. Its tensors have diffusers'
names or black-forest-labs' names.

diffusers converts the second kind to the first, but only tensors in memory: 24 GB in every process. So its converter
is given short tensors of whole numbers, here called marks, which stand for rows. Where a mark is in the result says
which rows of which tensor belong there. Then each process reads only its own rows from the file.
"""

import importlib
from pathlib import Path

import torch
from safetensors import safe_open

from engine.errors import UserError, one_line

COMFYUI = "model.diffusion_model."  # prefix of the transformer's names in a file that holds other networks too
# The converter splits the first layer of a single block into 3 x 3072 and 12288 rows, FLUX.1's sizes. It splits any
# other tensor into 2 or 3 equal parts at most.
SPLIT_IN_SEVEN = ".linear1."
MARKS_OF_SEVEN = 7 * 3072
MARKS = 6
MOST_MARKS = 2**16


def is_single_file(path):
    """Whether a path is an existing file that ends in .safetensors."""
    return Path(path).suffix == ".safetensors" and Path(path).is_file()


def slices_of(file):
    """{name: slice} of all tensors of a safetensors file. A slice reads its rows on demand. Raises UserError if the
    file cannot be read."""
    try:
        opened = safe_open(file, "pt")
        return {name: opened.get_slice(name) for name in opened.keys()}
    except Exception as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error


def tensors_of(file):
    """{diffusers' name: slice, or `Rows`} of the transformer in one file. If names begin with COMFYUI, all other
    tensors are left out. Raises UserError if the file is not FLUX.1's."""
    slices = slices_of(file)
    if any(name.startswith(COMFYUI) for name in slices):
        slices = {name.removeprefix(COMFYUI): tensor for name, tensor in slices.items()
                  if name.startswith(COMFYUI)}
    if not any(name.startswith("double_blocks.") for name in slices):
        return slices
    return renamed(slices, file)


def library():
    """diffusers' module of conversions. It is imported only when needed, since it imports much of transformers."""
    return importlib.import_module("diffusers.loaders.single_file_utils")


def renamed(slices, file):
    """{diffusers' name: `Rows`} from the slices of a file with black-forest-labs' names. Raises UserError if they are
    not FLUX.1's."""
    names = list(slices)
    marks = {}
    for number, name in enumerate(names):
        marks[name] = number * MOST_MARKS + torch.arange(marks_of(name))
    try:
        # The converter removes the names that it knows from `marks`.
        converted = library().convert_flux_transformer_checkpoint_to_diffusers(marks)
    except Exception as error:
        raise UserError(f"{file}: not FLUX.1's tensors: {one_line(error)}") from error
    if marks:
        raise UserError(f"{file}: {len(marks)} tensors are not FLUX.1's, such as {sorted(marks)[0]}")
    tensors = {}
    for name, found in converted.items():
        starts = (found.diff() != 1).nonzero().flatten() + 1  # where a new stretch of consecutive marks begins
        stretches = []
        for stretch in torch.tensor_split(found, starts.tolist()):
            source = names[stretch[0] // MOST_MARKS]
            first = int(stretch[0] % MOST_MARKS)
            stretches.append(Stretch(slices[source], first, first + len(stretch), marks_of(source)))
        tensors[name] = Rows(stretches)
    return tensors


def marks_of(name):
    """The number of marks that stand for the rows of a tensor."""
    return MARKS_OF_SEVEN if SPLIT_IN_SEVEN in name else MARKS


class Stretch:
    """Consecutive rows of a tensor in a file. They are given by marks: first to last - 1, of `marks` for all rows."""

    def __init__(self, tensor, first, last, marks):
        self.tensor = tensor
        rows, *self.width = tensor.get_shape() or [1]
        self.first = rows * first // marks
        self.last = rows * last // marks

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
