"""srpo.json, in a model's folder: default flags that suit the model. This file checks what it may contain, and that
its paths stay inside the folder."""

from pathlib import Path

from engine.command_line import fields_of, words
from engine.errors import UserError
from engine.files import read_json
from engine.model import configs as con
from engine.paths import named_path, not_a_path

OWN = Path(__file__).resolve().parents[2] / "miniature"  # this project's own; the second miniature has links to it
OTHERS = {"lora_lr": con.NUMBER, "metrics": con.TEXT}  # the --lr that goes with --lora; evaluate.py's --metrics


def may_set(groups):
    """{flag: `Kind`} of the flags that srpo.json may set: the fields marked `model` in a list of dataclasses, and
    OTHERS."""
    kinds = dict(OTHERS)
    for field in fields_of(groups):
        if not field.metadata["model"]:
            continue
        if field.type is str or field.metadata["read"] is words:
            kinds[field.name] = con.TEXT
        elif field.type is list:
            kinds[field.name] = con.NUMBERS
        elif hasattr(field.metadata["read"], "takes_off"):
            kinds[field.name] = con.NUMBER_OR_NULL
        else:
            kinds[field.name] = con.NUMBER
    return kinds


def read(path):
    """{flag: value} of a srpo.json; {} if there is no such file. Raises UserError."""
    if not path.exists():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be an object of flags, such as {{\"size\": 64}}")
    return values


def checked(path, written, kinds):
    """{flag: value} of a srpo.json, with its paths resolved. Paths are relative to its folder, and must stay in it.

    path: the srpo.json; written: its content; kinds: {flag: `Kind`} of what it may set. Raises UserError for any other
    flag, a value of another kind, or a path that leads out of the folder.
    """
    values = {}
    for name, value in written.items():
        if name not in kinds:
            raise UserError(f"{path}: {name!r} is not a flag that a model may set; "
                            f"it may set {', '.join(sorted(kinds))}")
        if not kinds[name].fits(value):
            raise UserError(f"{path}: {name} {str(value)[:40]!r} must be {kinds[name].words}")
        if name in ("prompts", "watch_prompts", "eval_prompts"):
            value = inside(path, name, value)
        if name in ("reward", "metrics"):
            items = [item_inside(path, name, item) for item in value.split(",")]
            value = ",".join(items)
        values[name] = value
    return values


def item_inside(path, flag, item):
    """An item of a reward or of metrics in the srpo.json at `path`, with its path resolved. An item is NAME or
    NAME=PATH; a reward may also be PATH, and end in :WEIGHT. Raises UserError."""
    if flag == "metrics" and "=" not in item:
        return item
    text, colon, weight = item.strip().partition(":")
    try:
        name, where = named_path(text)
    except UserError as error:
        raise UserError(f"{path}: {flag} {error}") from error
    where = inside(path, flag, where, must_exist=name is not None)
    start = "" if name is None else f"{name}="
    return start + where + colon + weight


def inside(path, flag, where, must_exist=False):
    """The text `where` of the srpo.json at `path`, resolved in its folder. If nothing is there, the text is returned
    as it is, since it may be a name such as hpdv2. Raises UserError if it leads out of the folder, or is a path and
    does not exist."""
    why = not_a_path(where)
    if why:
        raise UserError(f"{path}: {flag} {where[:80]!r} must be a path, and it {why}")
    folder = path.parent
    place = folder / where
    if not any(place.resolve().is_relative_to(root) for root in (folder.resolve(), OWN)):
        raise UserError(f"{path}: {flag} {where!r} leads out of the model's folder")
    if place.exists():
        return str(place)
    if must_exist or "/" in where or Path(where).exists():
        raise UserError(f"{path}: {flag} {where!r} is not in the model's folder")
    return where
