"""black-forest-labs' names of FLUX.1's tensors, which ComfyUI uses too, and which of their rows diffusers' tensors are.

diffusers converts a whole file in memory: 24 GB in every process, and only into its own names. So its converter is
given short tensors of whole numbers, here called marks, which stand for rows. Where a mark is in the result says which
rows of which tensor belong there. This answers both ways, for weights and for a LoRA, at any width of the model.
"""

import importlib
from functools import lru_cache
from typing import NamedTuple

import torch

# The converter splits the first layer of a single block into 3 x 3072 and 12288 rows, FLUX.1's sizes. It splits any
# other tensor into 2 or 3 equal parts at most.
SPLIT_IN_SEVEN = ".linear1."
MARKS_OF_SEVEN = 7 * 3072
MARKS = 6
MOST_MARKS = 2**16


class Piece(NamedTuple):
    """Consecutive rows of a tensor `name`, given by marks: first to last - 1, of `marks` for all rows."""
    name: str
    first: int
    last: int
    marks: int

    def of(self, rows):
        """(first row, last row + 1), if the tensor has so many rows."""
        return rows * self.first // self.marks, rows * self.last // self.marks


def convert(marks):
    """diffusers' conversion of a dict, which removes the names that it knows. Its module is imported only when needed,
    since it imports much of transformers."""
    library = importlib.import_module("diffusers.loaders.single_file_utils")
    return library.convert_flux_transformer_checkpoint_to_diffusers(marks)


def marks_of(name):
    """The number of marks that stand for the rows of a tensor."""
    return MARKS_OF_SEVEN if SPLIT_IN_SEVEN in name else MARKS


def pieces_of(names):
    """({diffusers' name: its `Piece`s, in order}, the names that are not FLUX.1's), of a list of black-forest-labs'
    names. Raises KeyError if one is missing."""
    marks = {}
    for number, name in enumerate(names):
        marks[name] = number * MOST_MARKS + torch.arange(marks_of(name))
    found = {}
    for ours, rows in convert(marks).items():
        starts = (rows.diff() != 1).nonzero().flatten() + 1  # where a new stretch of consecutive marks begins
        found[ours] = []
        for stretch in torch.tensor_split(rows, starts.tolist()):
            name = names[stretch[0] // MOST_MARKS]
            first = int(stretch[0] % MOST_MARKS)
            found[ours].append(Piece(name, first, first + len(stretch), marks_of(name)))
    return found, list(marks)


class Asked(dict):
    """A dict that holds whatever it is asked for, and remembers the names."""

    def __init__(self, names):
        super().__init__(dict.fromkeys(names))
        self.names = []

    def pop(self, name):
        self.names.append(name)
        return torch.arange(marks_of(name))


def names_of(config):
    """black-forest-labs' names of all tensors of a transformer with this config: what the converter asks for."""
    blocks = [f"double_blocks.{config['num_layers'] - 1}.", f"single_blocks.{config['num_single_layers'] - 1}."]
    asked = Asked([*blocks, "guidance"] if config["guidance_embeds"] else blocks)
    convert(asked)
    return asked.names


def parts_of(config):
    """{black-forest-labs' name: {diffusers' name: its `Piece`s}} of all tensors of a transformer with this config. The
    parts are in the order of their rows. {} for another family than FLUX.1: of its names none is known here."""
    if "pooled_projection_dim" not in config:
        return {}
    return parts(config["num_layers"], config["num_single_layers"], config["guidance_embeds"])


@lru_cache(maxsize=4)
def parts(layers, single_layers, guidance):
    """`parts_of`, from the three values that it depends on."""
    names = names_of({"num_layers": layers, "num_single_layers": single_layers, "guidance_embeds": guidance})
    found = {name: {} for name in names}
    for ours, pieces in pieces_of(names)[0].items():
        found[pieces[0].name][ours] = pieces
    return {name: dict(sorted(inside.items(), key=lambda part: min(part[1]).first)) for name, inside in found.items()}
