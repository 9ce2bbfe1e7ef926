"""The command line, the same for every script: flags whose range is checked where they are read; a model's
own defaults, and named recipes, are flags too."""

import argparse
import math
import re
import shlex
import unicodedata

from engine import memory
from engine.errors import UserError
from engine.files import not_a_path

MOST = 10**6          # of anything that is counted: more would only be a slip of the hand
LARGEST = 1e6         # of any number: float32 holds its products
LONGEST_WORDS = 1000  # characters


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and every flag's default behind its help."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose every complaint is a `UserError`."""

    def __init__(self, description, **more):
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
            if low > -LARGEST or value < low:
                limits.append(f"above {low:g}" if open_low else f"at least {low:g}")
            if high < LARGEST or value > high:
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


def phrase(text):
    """A type for argparse: words that a text encoder can read, with nothing in them that cannot be seen."""
    found = text.strip()
    if not found or not found.isprintable() or len(found) > LONGEST_WORDS:
        raise argparse.ArgumentTypeError(
            f'"{text[:LONGEST_WORDS]}": must be words, none of them empty, for example "realistic photo"')
    return found


def words(text):
    """A type for argparse: "a, b" is ["a", "b"]; each is a `phrase`."""
    phrase(text)
    if not all(word.strip() for word in text.split(",")):
        raise argparse.ArgumentTypeError(
            f'"{text}": must be words, none of them empty, for example "realistic photo"')
    return [phrase(word) for word in text.split(",")]


def some_path(text):
    """A type for argparse: the path that a file or a folder could have."""
    why = not_a_path(text)
    if why:
        raise argparse.ArgumentTypeError(f'"{text[:LONGEST_WORDS]}": must be a path, and it {why}')
    return text


def must_differ(control, neg):
    """Raise UserError if a wanted text (of the list `control`) is also unwanted. A text encoder sees neither
    upper case nor how wide a space is."""
    def as_read(text):
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    if {as_read(text) for text in control} & {as_read(text) for text in neg}:
        raise UserError(f"--control {','.join(control)} --neg {','.join(neg)}: the same words are wanted "
                        "and unwanted, so there is nothing to learn")


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
            if not all(type(number) in (int, float) for number in value):  # a text could be another flag
                raise UserError(f"{name}: a list must hold numbers, and nothing else")
            arguments += [flag, *map(str, value)]
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def parse(parser, argv, defaults_of=None, recipes=None):
    """The flags that a script runs with. Raises UserError.

    Who says it: the command line, before the recipe of `recipes` {name: a line of flags} that it names,
    before the model's own defaults, defaults_of(flags) -> (where they stand, {flag: value}), before the
    parser's own. All but the last are read as flags, so that all pass the same checks.
    """
    first, _ = parser.parse_known_args(argv)
    before = []
    if defaults_of is not None:
        where, values = defaults_of(first)
        known = {k: v for k, v in values.items() if hasattr(first, k)}
        try:
            own = as_arguments(known)
            parser.parse_args(own)
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


def add_machine_flags(parser):
    """What only a machine cares for: no weight depends on it."""
    add = parser.add_argument_group("the run's folder").add_argument
    add("--out", type=some_path, help="folder of the run (None: runs/<model>)")
    add("--save-every", type=whole(1), default=10, help="updates between checkpoints")
    add("--keep", type=whole(1), default=2, help="checkpoints that stay")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--overwrite", action="store_true", help="delete the run in --out first")
    add("--tensorboard", action="store_true",
        help="also write out/tensorboard (needs: pip install tensorboard)")
    add = parser.add_argument_group("the machine").add_argument
    add("--lora", type=or_off(whole(1, 4096)), default=None, metavar="R", help="train adapters of this rank "
        "beside frozen weights; off: all weights")
    add("--memory", choices=memory.NAMES, default="auto", help="how it fits: engine/memory.py; "
        "auto: the first that the plan says fits this GPU")
    add("--cache", type=or_off(some_path), default="auto", metavar="DIR", help="folder where embeddings of "
        "prompts and latents of --images are kept for other runs, 32 GiB at most; auto: ~/.cache/srpo, and "
        "none for a miniature; off")
    add("--replicas", type=whole(1), default=1, help="HSDP: parameters are sharded inside each of so many "
        "groups and copied between them; the number of nodes")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="recompute activations in the backward: 21 GiB less for FLUX.1-dev at 720 pixels, "
             "a quarter more work in the update [released code]")
    add("--compile", action="store_true", help="torch.compile every transformer block")
    add = parser.add_argument_group("the plan").add_argument
    add("--plan", action="store_true", help="print the predicted memory, work and seconds of an update, "
        "and stop: no GPU and no weights needed")
    add("--world-size", type=whole(1), default=8, help="processes that are planned for")
    add("--card", default="H200", help="GPU that is planned for: H200, H100, A100, H20, L40S or 'RTX 4090'")
    add("--share", type=real(0, 1, open_low=True), default=0.4, help="of the card's peak that is reached")
