"""--weights, a transformer's instead of the model's own, or a LoRA beside them: what was given, and whether
it is of this model, known from names and shapes before anything takes memory.

`base` is everywhere the folder with the config of the model's own transformer.
"""

from pathlib import Path

import diffusers
import torch

from engine import configs as con
from engine import lora, model_folder, parallel, single_file
from engine.errors import UserError, one_line
from engine.files import not_a_path

HELP = ("the transformer's weights instead of the model's own, such as runs/miniature/weights: a folder with "
        "config.json and safetensors; one .safetensors with the names of diffusers, black-forest-labs or "
        "ComfyUI; or a LoRA, a folder or file with the names of diffusers")


def is_full(weights):
    """Whether --weights take the place of the model's own transformer, and do not only go beside it."""
    return weights is not None and not lora.is_lora(weights)


def places(weights, base):
    """Of full --weights: (the folder of their config, the single file of their tensors; None: they are in
    that folder). Raises UserError."""
    if not_a_path(weights) is None:
        if single_file.is_single_file(weights):
            return base, Path(weights)
        if (Path(weights) / "config.json").exists():
            return Path(weights), None
    raise UserError(f"--weights {weights[:80]!r}: no transformer there (a folder with config.json and "
                    "safetensors, such as runs/miniature/weights; one .safetensors; or a LoRA)")


def check(weights, base, rank=None):
    """Raise UserError if --weights are not of this model's architecture; or, with the rank of adapters that
    are to be trained, a LoRA that they cannot go on with."""
    if not is_full(weights):
        con.check_folder(base)
        with torch.device("meta"):
            network = diffusers.FluxTransformer2DModel.from_config(con.check_config(base / "config.json"))
        lora.fitting(network, weights, rank)
        return
    folder, file = places(weights, base)
    if file is None:
        theirs = model_folder.check_transformer(folder)
        ours = model_folder.check_transformer(base)
        for key in model_folder.TRANSFORMER:
            if theirs[key] != ours[key]:
                raise UserError(f"--weights {weights}: another architecture: {key} {theirs[key]}, and the "
                                f"--model's is {ours[key]}")
    try:
        parallel.on_meta(diffusers.FluxTransformer2DModel, folder, file)
    except Exception as error:
        raise UserError(f"--weights {weights}: cannot be loaded as FLUX.1: {one_line(error)}") from error
