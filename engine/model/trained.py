"""--weights: a transformer that replaces the model's own, or a LoRA that is added to it. Which of them it is, and
whether it fits the model, is decided from names and shapes, before memory is allocated."""

from pathlib import Path

import diffusers

from engine.errors import UserError, one_line
from engine.model import lora, single_file
from engine.model.folder import PARTS, TRANSFORMER, check_transformer
from engine.model.tensor_files import Source, meta_network, tensors_in
from engine.paths import not_a_path


def kind():
    """The class of the transformer. diffusers imports it only when it is first used."""
    return diffusers.FluxTransformer2DModel


def is_full(weights):
    """Whether --weights replace the model's own transformer; False for None and for a LoRA."""
    return weights is not None and not lora.is_lora(weights)


def source(weights, model):
    """The `Source` of the transformer: --weights if they are full weights, otherwise the `Model`'s own. Raises
    UserError."""
    if not is_full(weights):
        folder = model.part("transformer")
        return Source(model.configs.transformer, tensors_in(folder), folder)
    if not_a_path(weights) is None:
        if single_file.is_single_file(weights):
            return Source(model.configs.transformer, single_file.tensors_of(weights), weights)
        if (Path(weights) / "config.json").exists():
            return Source(check_transformer(Path(weights)), tensors_in(weights), weights)
    raise UserError(f"--weights {weights[:80]!r}: no transformer there (a folder with config.json and "
                    "safetensors, such as runs/miniature/weights; one .safetensors; or a LoRA)")


def check(weights, model, rank=None):
    """Check --weights. Returns the parts of the model that must still be read from its own folder.

    rank: of the adapters that will be trained, or None. Raises UserError if the weights have another architecture, or
    are a LoRA that adapters of that rank cannot start from.
    """
    if weights is None:
        return list(PARTS)
    if not is_full(weights):
        lora.fitting(meta_network(kind(), model.configs.transformer), weights, rank)
        return list(PARTS)
    try:
        found = source(weights, model)
    except UserError:
        raise
    except Exception as error:
        raise cannot_load(weights, error) from error
    ours = model.configs.transformer
    for key in TRANSFORMER:
        if found.config[key] != ours[key]:
            raise UserError(f"--weights {weights}: another architecture: {key} {found.config[key]}, and "
                            f"--model has {ours[key]}")
    try:
        found.on_meta(kind())
    except Exception as error:
        raise cannot_load(weights, error) from error
    return [part for part in PARTS if part != "transformer"]


def cannot_load(weights, error):
    """The UserError for --weights that cannot be read."""
    return UserError(f"--weights {weights}: cannot be loaded as FLUX.1: {one_line(error)}")
