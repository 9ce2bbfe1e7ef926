"""--resume: a run goes on with its own flags. Nothing here needs torch."""

from engine import command_line as line
from engine.errors import UserError
from engine.files import read_json

ONCE = ("resume", "overwrite", "explain", "plan")  # flags of the command that was typed, and not of the run


def flags_of(out, parser, groups, recipes, given):
    """{flag: value} of the run in a folder: its own flags, and of those that are given the ones that may change. None
    if there is no run, or one without a checkpoint whose flags are others: that starts from the beginning.

    groups, recipes: as in recipe.py; given: {flag: value} of the command line. Raises UserError for a flag that is
    given and disagrees, by the name under which it is given.
    """
    where = out / "args.json"
    if not (out / "run.json").is_file() or not where.is_file():
        return None
    then = read_json(where)
    if not isinstance(then, dict):
        raise UserError(f"{where}: not the flags of a run; give another --out")
    own = line.defaults(groups) | {"recipe": "released"} | line.read_values(parser, then, where)
    own |= dict.fromkeys(ONCE, False)
    may_change = {field.name for field in line.fields_of(groups) if field.metadata["resume"]}
    odd = disagreement(own, given, may_change, recipes)
    if odd is None:
        return own | {name: value for name, value in given.items() if name in may_change}
    if any((out / "checkpoints").glob("step_*")):
        raise UserError(f"--resume: the run in {out} has {odd}; leave it out, or give another --out")
    return None


def disagreement(own, given, may_change, recipes):
    """The first flag that is given and is not the run's own, in words: "--lora 4, and --lora off is given"; or None."""
    for name, value in given.items():
        if name in may_change or own[name] == value or (name == "memory" and value == "auto"):
            continue
        if name != "recipe":
            return f"{line.shown(name, own[name])}, and {line.shown(name, value)} is given"
        for inner, wanted in recipes[value].differs.items():
            if own[inner] != wanted and inner not in given:
                return f"{line.shown(inner, own[inner])}, and --recipe {value} is given"
    return None
