"""Checks of a model's folder, which may come from anyone. Its configs must not make a library run code. Their sizes
are checked before a network is built from them. After loading, no tensor of the network may be missing."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from engine.errors import UserError, one_line
from engine.files import read_json
from engine.hub import quiet

OF_NETWORKS = ("config.json", "open_clip_config.json", "scheduler_config.json")
WORD_LISTS = ("tokenizer.json", "vocab.json", "added_tokens.json")  # vocabularies, whose keys may be any word
ADAPTER = "adapter_config.json"  # transformers would load the adapter that it names on top of the weights
TABLES = ("position_ids", "relative_position_index", "num_batches_tracked")  # tensors that do hold whole numbers
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names of what weights may be
# What is not safetensors, by the first bytes of the file.
BEGINNINGS = {b"version https://git-lfs": "a Git LFS pointer, and not the file itself; git lfs pull", b"GGUF": "GGUF",
              b"PK\x03\x04": "a pickle of torch.save", b"<": "a page of the web, and not the file itself"}
MOST_LAYERS = 1000
LARGEST = 10**7


# -------------------------------------------------------------------------------------------------- a folder
def check_folder(folder):
    """Check a folder before a library reads it. Returns {file: its config}, so that no config is read twice.

    Raises UserError if the folder holds something that is not a file or a folder, such as a pipe; a config that asks
    for code to be run, or that has an impossible size; or an adapter. transformers would run the Python file that
    `auto_map` names, if `trust_remote_code` is set. It would also fetch and run a kernel from the hub that
    `attn_implementation` names.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: not a folder")
    read = {}
    for file in sorted(Path(folder).iterdir()):
        if not file.is_file() and not file.is_dir():
            raise UserError(f"{file}: not a file")
        if file.name == ADAPTER:
            raise UserError(f"{file}: adapters are not loaded; give the weights that they were merged into")
        if file.suffix == ".json" and file.name not in WORD_LISTS:
            read[file] = check_config(file)
    return read


def check_config(file):
    """The config in a file, a dict. Raises UserError if it asks for code to be run; or, for a file of OF_NETWORKS, if
    a number in it is too large to be a size."""
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a config: it must be a JSON object")
    is_network = file.name in OF_NETWORKS
    for key, value in pairs(config):
        if key in ("trust_remote_code", "auto_map") or asks_for_a_kernel(key, value):
            raise UserError(f"{file.name} asks for code to be run ({key}), which is not done")
        if key == "quantization_config" and value:
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise UserError(f"{file}: quantized by {str(method)[:40]}, which is not read; give the weights in bf16")
        if is_network and isinstance(value, int | float):
            most = MOST_LAYERS if "layers" in key else LARGEST
            if not abs(value) <= most:  # written so that nan is refused too
                raise UserError(f"{file}: {key} {str(value)[:40]}: not a size of a network")
    return config


def asks_for_a_kernel(key, value):
    """Whether a key of a config names an implementation of attention on the hub, OWNER/NAME."""
    return key.endswith("attn_implementation") and "/" in str(value)


def pairs(value, key=""):
    """Yields (key, value) of every entry of a JSON value, at any depth. The items of a list have the list's key."""
    if isinstance(value, dict):
        for inner, item in value.items():
            yield inner, item
            yield from pairs(item, inner)
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list):
                yield from pairs(item, key)
            else:
                yield key, item


# ---------------------------------------------------------------------------------------------- a key's value
class Kind(NamedTuple):
    """What the value of a key must be: in words, and as a function value -> bool."""
    words: str
    fits: Callable


def is_whole(value):
    return type(value) is int and value > 0


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e300  # false for nan too


def is_positive(value):
    return is_number(value) and value > 0


def is_flag(value):
    return type(value) is bool


def are_whole(value):
    return isinstance(value, list) and bool(value) and all(is_whole(item) for item in value)


def is_number_or_null(value):
    return value is None or is_number(value)


def are_numbers(value):
    return isinstance(value, list) and bool(value) and all(is_number(item) for item in value)


def is_text(value):
    return isinstance(value, str)


WHOLE = Kind("a whole number above 0", is_whole)
NUMBER = Kind("a finite number", is_number)
POSITIVE = Kind("a finite number above 0", is_positive)
NUMBER_OR_NULL = Kind("a finite number or null", is_number_or_null)
NUMBERS = Kind("a list of finite numbers", are_numbers)
TEXT = Kind("a text", is_text)
FLAG = Kind("true or false", is_flag)
WHOLES = Kind("a list of whole numbers above 0", are_whole)


def one_of(*allowed):
    """The `Kind` of a value that must be one of those given. Types must agree too: 1 is not True."""
    def is_allowed(value):
        return any(value is one or (type(value) is type(one) and value == one) for one in allowed)
    return Kind(" or ".join(repr(one) for one in allowed), is_allowed)


def fitting(file, read, needed, optional=None):
    """The config of a file, a dict, with its values checked.

    read: {file: config}, from `check_folder`; needed, optional: {key: `Kind`}. Raises UserError if the file was not
    read, a value does not fit its `Kind`, or a needed key is missing.
    """
    if file not in read:
        raise UserError(f"{file}: cannot be read: No such file or directory")
    config = read[file]
    for key, kind in (needed | (optional or {})).items():
        if key in config and not kind.fits(config[key]):
            raise UserError(f"{file}: {key} {str(config[key])[:40]!r} must be {kind.words}")
    for key, kind in needed.items():
        if key not in config:
            raise UserError(f"{file}: has no {key}, which must be {kind.words}")
    return config


# ---------------------------------------------------------------------------------------------- the weights
def slices_of(file):
    """{name: slice} of all tensors of a safetensors file. A slice reads its rows on demand. Raises UserError if the
    file cannot be read."""
    try:
        opened = safe_open(file, "pt")
        return {name: opened.get_slice(name) for name in opened.keys()}
    except Exception as error:
        raise UserError(f"{file}: cannot be read: {what_it_is(file) or one_line(error)}") from error


def what_it_is(file):
    """What a file that is not safetensors is, in words; None if that is not known."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(64)
    except OSError:
        return None
    return next((f"it is {words}" for begin, words in BEGINNINGS.items() if start.startswith(begin)), None)


def check_dtypes(folder):
    """Raise UserError if a safetensors or .bin file of a folder holds whole numbers, or true and false, where weights
    are expected."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in slices_of(file).items():
            if tensor.get_dtype() not in FLOATS and not name.endswith(TABLES):
                raise UserError(f"{file}: {name} holds {tensor.get_dtype()}, which are no weights")
    for file in sorted(Path(folder).glob("*.bin")):
        torch = importlib.import_module("torch")  # here, since a plan needs no torch
        must_be_floats(torch.load(file, map_location="meta", weights_only=True), f"{file}: ")


def must_be_floats(tensors, where=""):
    """{name: tensor}, as given. Raises UserError, which begins with `where`, if one holds whole numbers, or true and
    false, where weights are expected."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "dtype") and not tensor.is_floating_point() and not name.endswith(TABLES):
            raise UserError(f"{where}{name} holds {str(tensor.dtype).removeprefix('torch.')}, which are no weights")
    return tensors


def strict(cls, folder, dtype, unread=(), checked=False, **options):
    """cls.from_pretrained(folder, **options) on the CPU in `dtype`, in evaluation mode and frozen.

    unread: prefixes of tensors that may be in the file although the model does not read them; checked: whether
    `check_folder` has already checked the folder. Raises UserError if a tensor is missing, if another tensor is not
    the model's, or as `check_folder` does.
    """
    quiet()
    if not checked:
        check_folder(folder)
    try:
        check_dtypes(folder)
        model, found = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:
        raise UserError(f"{folder}: cannot be loaded as {cls.__name__}: {one_line(error)}") from error
    unknown = [name for name in found["unexpected_keys"] if not name.startswith(tuple(unread))]
    odd = [*found["missing_keys"], *found.get("mismatched_keys", []), *unknown]
    if odd:
        raise UserError(f"{folder}: not a {cls.__name__}: {len(odd)} tensors are missing or not its own, "
                        f"such as {odd[0]}")
    return model.eval().requires_grad_(False)
