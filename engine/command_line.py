"""The command line of every script. Each flag's range is checked when the flag is read. A flag is added by hand, or
made from a field of a dataclass. Nothing here needs torch."""

import argparse
import dataclasses
import math
import re
import shlex
import sys
import unicodedata

from engine.errors import UserError
from engine.paths import not_a_path

MOST = 10**6          # the usual limit of a whole number; a larger one is a typing mistake
LARGEST = 1e6         # the usual limit of a real number; products of such numbers still fit float32
LONGEST_WORDS = 1000  # characters


WEIGHTS = ("the transformer's weights instead of the model's own: a run's folder, such as runs/miniature; a folder "
           "with config.json and safetensors, or a pipeline's; one .safetensors with the names of diffusers, "
           "black-forest-labs or ComfyUI, also in scaled float8; a LoRA of diffusers, kohya, ComfyUI, OneTrainer, "
           "XLabs or peft; or a hub id of any of these, OWNER/NAME or OWNER/NAME/FILE")
MODEL = "folder in the layout of FLUX.1-dev or FLUX.2-klein, or hub id"
SAVE_AS = ("diffusers", "comfyui", "comfyui-fp8", "kohya")
SAVE_AS_HELP = ("write the weights as one file in bf16 too: diffusers: with diffusers' names; comfyui: with "
                "black-forest-labs' names, which ComfyUI reads; comfyui-fp8: the same, with the blocks' matrices in "
                "float8, each with its scale; kohya: a LoRA with kohya's names")


def check_names(name, family):
    """Raise UserError if the names of a --save-as, one of SAVE_AS or None, are not known for a `family.Family`."""
    if name not in (None, "diffusers") and not family.has_released_names:
        raise UserError(f"--save-as {name}: its names are known here for FLUX.1 alone, and this is {family.name}; "
                        "leave it out: what is written has diffusers' names")


def check_save_as(name, is_lora):
    """Raise UserError if a --save-as, one of SAVE_AS or None, does not go with what is saved: a LoRA, or full
    weights."""
    if name == "kohya" and not is_lora:
        raise UserError("--save-as kohya: its names are a LoRA's, and these are full weights; give comfyui")
    if name not in (None, "kohya") and is_lora:
        raise UserError(f"--save-as {name}: this is a LoRA, which diffusers and ComfyUI read as it is; give kohya, or "
                        f"merge it afterwards: python -m engine.merge --save-as {name}")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description, and adds every flag's default to its help."""

    def _get_help_string(self, action):
        if not isinstance(action.default, list):
            return super()._get_help_string(action)
        default = (" " if action.nargs else ",").join(map(str, action.default))
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `UserError` for every mistake."""

    def __init__(self, description, **more):
        module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
        if module is not None:
            more.setdefault("prog", f"python -m {module.name.removesuffix('.__main__')}")
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False, **more)

    def error(self, message):
        message = re.sub("^argument (.+?): (.*?): must be", r"\1 \2: must be", message)
        raise UserError(message.removeprefix("argument "))


# ------------------------------------------------------------------------------- what a flag's text may say
def whole(low, high=MOST):
    """A type for argparse: a whole number from low to high."""
    def read(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            too_many = high == MOST and value is not None and value > high
            limits = f"at least {low}" if high == MOST else f"from {low} to {high}"
            if too_many:
                limits = f"at most {high}"
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {limits}")
        return value
    return read


def real(low=-LARGEST, high=LARGEST, open_low=False, open_high=False):
    """A type for argparse: a finite number from low to high. `open_low` excludes low itself, `open_high` high."""
    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if not (math.isfinite(value) and above and below):
            limits = []
            if low > -LARGEST or value < low:
                limits.append(f"above {low:g}" if open_low else f"at least {low:g}")
            if high < LARGEST or value > high:
                limits.append(f"below {high:g}" if open_high else f"at most {high:g}")
            wanted = f", {' and '.join(limits)}" if limits else ""
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number{wanted}")
        return value
    return read


def extent(text):
    """A type for argparse: pixels of a picture. "64" and "64x64" are 64, of each side; "96x64" is [96, 64], width and
    height."""
    try:
        width, height = (whole(1)(part) for part in (text.lower().split("x") if "x" in text.lower() else [text, text]))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1, or WIDTHxHEIGHT") from error
    return width if width == height else [width, height]


def sides(size):
    """(height, width) of what `extent` read."""
    return (size, size) if isinstance(size, int) else tuple(reversed(size))


def or_off(read):
    """A type for argparse: what `read` accepts, or the word "off", which becomes None."""
    def read_or_off(text):
        try:
            return None if text == "off" else read(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; or off") from error

    read_or_off.takes_off = True
    return read_or_off


def phrase(text):
    """A type for argparse: words for a text encoder, 1 to LONGEST_WORDS characters, all of them printable, and at least
    one a letter or a digit."""
    found = text.strip()
    if not any(map(str.isalnum, found)) or not found.isprintable() or len(found) > LONGEST_WORDS:
        raise argparse.ArgumentTypeError(
            f'"{text[:LONGEST_WORDS]}": must be words, none of them empty, for example "realistic photo"')
    return found


def words(text):
    """A type for argparse: "a, b" becomes ["a", "b"]; each item is a `phrase`."""
    phrase(text)
    return [phrase(word) for word in text.split(",")]


def some_path(text):
    """A type for argparse: a path that a file or a folder could have. It need not exist."""
    why = not_a_path(text)
    if why:
        raise argparse.ArgumentTypeError(f'"{text[:LONGEST_WORDS]}": must be a path, and it {why}')
    return text


def device(text):
    """A type for argparse: cpu or cuda:N, with the number of a GPU."""
    if not re.fullmatch(r"cpu|cuda:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be cpu or cuda:N, with the number of a GPU")
    return text


def number_or_folder(text):
    """A type for argparse: a finite number, or else a path that a folder could have."""
    try:
        return real()(text)
    except argparse.ArgumentTypeError:
        return some_path(text)


def must_differ(control, neg):
    """Raise UserError if a text of the list `control` (wanted) is also in the list `neg` (unwanted). They are compared
    as a text encoder reads them: it does not see upper case, or how wide a space is."""
    def as_read(text):
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    if {as_read(text) for text in control} & {as_read(text) for text in neg}:
        raise UserError(f"--control {','.join(control)} --neg {','.join(neg)}: the same words are wanted "
                        "and unwanted, so there is nothing to learn")


# ------------------------------------------------------------------------------------------- flags from fields
def flag(default, read=str, help="", choices=None, metavar=None, model=False, resume=False):
    """A field of a dataclass that is a flag.

    read: the type for argparse; metavar: the value's name in the help, or a tuple of names for a flag of several
    numbers; model: whether a model's srpo.json may set the flag; resume: whether it may change at --resume.
    """
    about = {"read": read, "help": help, "choices": choices, "metavar": metavar, "model": model, "resume": resume}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def fields_of(groups):
    """The fields of a list of dataclasses, in order."""
    return [field for group in groups for field in dataclasses.fields(group)]


def defaults(groups):
    """{flag: default} of a list of dataclasses."""
    found = {}
    for group in groups:
        found |= vars(group())
    return found


def name_of(field):
    """The flag of a field as it is typed, such as --rollout-steps."""
    return "--" + field.name.replace("_", "-")


def is_switch(field):
    """Whether a field is a flag without a value."""
    return field.type is bool


def add_group(parser, group, texts):
    """Add the flags of a dataclass to a parser. In their help, {name} is replaced by texts[name]."""
    add = parser.add_argument_group(group.__doc__).add_argument
    defaults_here = vars(group())
    for field in dataclasses.fields(group):
        about = field.metadata
        default = defaults_here[field.name]
        for name, text in texts.items():
            about = about | {"help": about["help"].replace("{" + name + "}", text)}
        options = {"default": default, "help": about["help"]}
        if is_switch(field):
            options["action"] = argparse.BooleanOptionalAction if default else "store_true"
        else:
            options |= {"type": about["read"], "choices": about["choices"], "metavar": about["metavar"]}
        if isinstance(about["metavar"], tuple):
            options["nargs"] = len(about["metavar"])
        add(name_of(field), **options)


def shown(name, value):
    """A flag and its value as a user types them, for a message."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return f"--{name.replace('_', '-')} {'off' if value is None else value}"


def as_line(groups, values):
    """Flags {name: value} as one line that can be pasted back into a shell. None is written as "off" if the flag has
    a default, and left out if it has none."""
    parts = []
    usual = defaults(groups)
    for field in fields_of(groups):
        if field.name not in values:
            continue
        name = name_of(field)
        value = values[field.name]
        if is_switch(field):
            if value != usual[field.name]:
                parts.append(name if value else "--no-" + name.removeprefix("--"))
        elif value is None:
            if usual[field.name] is not None:
                parts += [name, "off"]
        elif isinstance(value, list) and isinstance(field.metadata["metavar"], tuple):
            parts += [name, *map(str, value)]
        elif isinstance(value, list):
            parts += [name, ",".join(value)]
        else:
            parts += [name, str(value)]
    return shlex.join(parts)


# ------------------------------------------------------------------------------------------------------ reading
NOT_GIVEN = object()


def given(parser, argv):
    """{name: value} of the flags that a command line gives; flags that it does not give are left out. Raises
    UserError."""
    actions = [action for action in parser._actions if action.dest != argparse.SUPPRESS and action.dest != "help"]
    several = [action for action in actions if isinstance(action, argparse._AppendAction)]  # they begin with a list
    space = argparse.Namespace(**{action.dest: NOT_GIVEN for action in actions if action not in several})
    parser.parse_args(argv, space)
    for action in several:
        if vars(space)[action.dest] == action.default:
            delattr(space, action.dest)
    return {name: value for name, value in vars(space).items() if value is not NOT_GIVEN}


def read_values(parser, values, where):
    """{name: value} from a file, read as flags, so that the same checks apply. A name that is not a flag of this
    parser is left out. Raises UserError, which begins with `where`, the file."""
    actions = {action.dest: action for action in parser._actions}
    arguments = []
    for name, value in values.items():
        if name in actions:
            arguments += as_arguments(actions[name], value, where)
    try:
        return given(parser, arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def as_arguments(action, value, where):
    """A value from a file as command-line arguments, a list. Raises UserError."""
    name = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise UserError(f"{where}: {action.dest} {value!r} must be true or false")
        if value == action.default:
            return []
        return [action.option_strings[0 if value else 1]]
    if value is None:
        return [f"{name}=off"] if action.default is not None else []
    if isinstance(value, list) and action.nargs:
        if not all(type(number) in (int, float) for number in value):  # a text could be another flag
            raise UserError(f"{where}: {action.dest}: a list must hold only numbers")
        return [name, *map(str, value)]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        value = ",".join(value)
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: {action.dest} {str(value)[:40]!r} is not a value for {name}")
    return [f"{name}={value}"]
