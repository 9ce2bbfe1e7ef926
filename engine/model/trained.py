"""--weights: a transformer that replaces the model's own, or a LoRA that is added to it. Where it is, which of them it
is, and whether it fits the model, is decided from names and shapes, before memory is allocated."""

from functools import lru_cache
from pathlib import Path

from engine.errors import UserError, one_line
from engine.hub import some_files
from engine.model import lora, lora_files, single_file
from engine.model.configs import slices_of
from engine.model.family import check_transformer
from engine.model.tensor_files import INDEX, ONE_FILE, Source, kind_of, meta_network, tensors_in
from engine.paths import not_a_path

WHAT = ("a run's folder, a folder with config.json and safetensors, a pipeline's folder, one .safetensors, a LoRA, or "
        "a hub id of one of these")


# ------------------------------------------------------------------------------------------------- where it is
def place_of(weights):
    """The file or folder on this machine that --weights lead to: those of a run, of a pipeline or of a hub id are
    looked for. None for None. Raises UserError, which says what was found, if there are no weights."""
    if weights is None:
        return None
    why = not_a_path(weights)
    if why:
        raise UserError(f"--weights {str(weights)[:80]!r}: must be a path or a hub id, and it {why}")
    path = Path(weights)
    if not path.exists() and is_hub_id(str(weights)):
        path = on_the_hub(str(weights))
    folders = [folder for folder in (path, path / "weights", path / "transformer") if folder.is_dir()]
    for folder in folders:
        if lora_files.file_in(folder) or has_transformer(folder):
            return folder
    for folder in folders:
        single = [file for file in folder.iterdir() if single_file.is_single_file(file)]
        if len(single) == 1:
            return single[0]
    if single_file.is_single_file(path):
        return path
    raise UserError(f"--weights {str(weights)[:80]!r}: no transformer there: {found_in(path)}; give {WHAT}")


def has_transformer(folder):
    """Whether a folder has a config and the weights beside it, in diffusers' layout."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (INDEX, ONE_FILE))


def found_in(path):
    """What is at a path that holds no weights, in words."""
    if not path.exists():
        return "no such file or folder"
    if not path.is_dir():
        return f"a file that ends in {path.suffix}" if path.suffix else "a file without an ending"
    names = sorted(file.name + "/" * file.is_dir() for file in path.iterdir())
    if not names:
        return "an empty folder"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"a folder with {', '.join(names[:5])}{more}"


def is_hub_id(text):
    """Whether a text that is no path could be OWNER/NAME or OWNER/NAME/FILE of the hub."""
    if text.count("/") != 1 and not (text.count("/") > 1 and text.endswith(single_file.SUFFIXES)):
        return False
    return all(text.split("/")) and not text.startswith((".", "~")) and not Path(text.split("/")[0]).exists()


@lru_cache(maxsize=16)
def on_the_hub(name):
    """The local copy of the weights of a hub id: a file, or a folder with nothing else that could be weights. Raises
    UserError."""
    owner, repository, *file = name.split("/")

    def wanted(files):
        if file:
            return ["/".join(file)]
        if "model_index.json" in files:
            return [one for one in files if one.startswith("transformer/")]
        top = [one for one in files if "/" not in one and Path(one).suffix in single_file.SUFFIXES]
        for known in (lora_files.FILE, lora_files.OF_PEFT):
            if known in top:
                return [one for one in (known, lora_files.PEFT_CONFIG) if one in files]
        if "config.json" in files:
            return [*top, *(one for one in files if "/" not in one and one.endswith(".json"))]
        if len(top) == 1:
            return top
        raise UserError(f"--weights {name}: no transformer there: the hub has {', '.join(files[:10])}; give one of its "
                        f"files, {name}/FILE.safetensors")

    folder = some_files(f"{owner}/{repository}", wanted,
                        f"--weights {name}: no transformer there: no such file or folder")
    return folder.joinpath(*file)


def notes(weights):
    """Lines about what of --weights is left out, a list."""
    file = None if weights is None else lora_files.file_in(place_of(weights))
    left = [] if file is None else [name for name in slices_of(file) if lora_files.is_of_text(name)]
    if not left:
        return []
    return [f"--weights {weights}: {len(left)} tensors are of text encoders, such as {left[0]}; they are left out"]


# -------------------------------------------------------------------------------------------------- what it is
def is_full(weights):
    """Whether --weights replace the model's own transformer; False for None and for a LoRA. Raises UserError."""
    return weights is not None and not lora.is_lora(place_of(weights))


def source(weights, model):
    """The `Source` of the transformer: --weights if they are full weights, otherwise the `Model`'s own. Raises
    UserError."""
    if not is_full(weights):
        folder = model.part("transformer")
        return Source(model.configs.transformer, tensors_in(folder), folder)
    place = place_of(weights)
    if single_file.is_single_file(place):
        return Source(model.configs.transformer, single_file.tensors_of(place), place)
    return Source(check_transformer(place, model.family), tensors_in(place), place)


def check(weights, model, rank=None):
    """Check --weights. Returns the parts of the model that must still be read from its own folder.

    rank: of the adapters that will be trained, or None. Raises UserError if the weights have another architecture, or
    are a LoRA that adapters of that rank cannot start from.
    """
    if weights is None:
        return list(model.family.parts)
    ours = model.configs.transformer
    if not is_full(weights):
        lora.fitting(meta_network(kind_of(ours), ours), place_of(weights), rank)
        return list(model.family.parts)
    try:
        found = source(weights, model)
    except UserError:
        raise
    except Exception as error:
        raise cannot_load(weights, model, error) from error
    for key in ("_class_name", *model.family.keys):
        if found.config[key] != ours[key]:
            raise UserError(f"--weights {weights}: another architecture: {key} {found.config[key]}, and "
                            f"--model has {ours[key]}")
    try:
        found.on_meta(kind_of(ours))
    except Exception as error:
        raise cannot_load(weights, model, error) from error
    return [part for part in model.family.parts if part != "transformer"]


def rank_of(weights, model):
    """The rank of the adapters that a LoRA can be read into. None for full weights, and for a LoRA that can only be
    merged: one of several ranks, with biases, or with layers that get no adapter. Raises UserError."""
    if weights is None or is_full(weights):
        return None
    pairs = lora.fitting(meta_network(kind_of(model.configs.transformer), model.configs.transformer), place_of(weights))
    ranks = {len(pair.A) for pair in pairs.values()}
    if len(ranks) > 1 or any(pair.bias is not None or not lora.has_adapter(layer) for layer, pair in pairs.items()):
        return None
    return ranks.pop()


def cannot_load(weights, model, error):
    """The UserError for --weights that cannot be read."""
    return UserError(f"--weights {weights}: cannot be loaded as {model.family.name}: {one_line(error)}")
