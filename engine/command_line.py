"""The command line, the same for every script: flags whose range is checked where they are read; a model's own
defaults, and named recipes, are flags too."""

import argparse
import math
import shlex

from engine.errors import UserError


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every flag's default behind its help."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose every complaint is a `UserError`."""

    def __init__(self, description, **more):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False, **more)

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


# ------------------------------------------------------------------------------- what a flag's text may say
def whole(low, high=2**53):
    """A type for argparse: a whole number from low to high."""
    def read(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            limits = f"at least {low}" if high == 2**53 else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {limits}")
        return value
    return read


def real(low=-math.inf, high=math.inf, open_low=False, open_high=False):
    """A type for argparse: a finite number between low and high, which themselves are allowed unless open."""
    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if not (math.isfinite(value) and above and below):
            limits = []
            if low > -math.inf:
                limits.append(f"above {low:g}" if open_low else f"at least {low:g}")
            if high < math.inf:
                limits.append(f"below {high:g}" if open_high else f"at most {high:g}")
            wanted = " and ".join(limits) or "any"
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number, {wanted}")
        return value
    return read


def or_off(read):
    """A type for argparse: what `read` takes, or the word off, which is None."""
    def read_or_off(text):
        return None if text == "off" else read(text)
    return read_or_off


def words(text):
    """A type for argparse: "a, b" is ["a", "b"]; none may be empty."""
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f'"{text}": an empty word; give for example "realistic photo"')
    return found


# --------------------------------------------------------------------------------------- reading and printing
def as_arguments(values):
    """{"drift_band": [0.2, 0.1], "threshold": None} -> ["--drift-band", "0.2", "0.1", "--threshold=off"]."""
    arguments = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is False:
            arguments.append("--no-" + name.replace("_", "-"))
        elif value is None:
            arguments.append(f"{flag}=off")
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def parse(parser, argv, defaults_of=None, recipes=None):
    """The flags that a script runs with. Raises UserError.

    Who says it: the command line, before the recipe of `recipes` {name: a line of flags} that it names, before
    the model's own defaults, defaults_of(model) -> (where they stand, {flag: value}), before the parser's own.
    All but the last are read as flags, so that all pass the same checks.
    """
    first, _ = parser.parse_known_args(argv)
    before = []
    if defaults_of is not None:
        where, values = defaults_of(first.model)
        known = {k: v for k, v in values.items() if hasattr(first, k)}
        own = as_arguments(known)
        try:
            parser.parse_known_args(own)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        before += own
    if recipes is not None:
        before += shlex.split(recipes[first.recipe])
    return parser.parse_args([*before, *argv])


def as_line(parser, values):
    """Every flag as one line that can be pasted back into a shell. None is "off" where a flag has a default,
    and nothing where it has none."""
    line = []
    for action in parser._actions:
        if action.dest not in values or not action.option_strings:
            continue
        flag = action.option_strings[0]
        value = values[action.dest]
        if value is True:
            line.append(flag)
        elif value is False and isinstance(action, argparse.BooleanOptionalAction):
            line.append(action.option_strings[1])
        elif value is None and action.default is not None:
            line += [flag, "off"]
        elif isinstance(value, list) and action.nargs is None:
            line += [flag, ",".join(value)]
        elif isinstance(value, list):
            line += [flag, *map(str, value)]
        elif value is not None and value is not False:
            line += [flag, str(value)]
    return shlex.join(line)
