"""--resume: a run continues with its own flags, those in its args.json. Nothing here needs torch."""

from engine import command_line as line
from engine.errors import UserError
from engine.files import read_json

ONCE = ("resume", "overwrite", "explain", "plan")  # flags that hold for one command, and are not kept for the run


def own_flags(where, parser, groups):
    """{flag: value} of a run's args.json at `where`, checked as a command line is. Raises UserError."""
    then = read_json(where, {"model": str, "steps": int}, "not the flags of a run; give another --out")
    return line.defaults(groups) | {"recipe": "released"} | line.read_values(parser, then, where)


def flags_of(out, parser, groups, recipes, given):
    """{flag: value} for continuing the run in the folder `out`: its own flags, changed by the given ones that may
    change. None if the run starts from the beginning: there is no run, or it has other flags and no checkpoint yet.

    groups, recipes: as in recipe.py; given: {flag: value} of the command line. Raises UserError for a given flag that
    must not change and differs; the message names the flag as it was given.
    """
    where = out / "args.json"
    has_run = (out / "run.json").is_file()
    if not has_run and given.keys() == {"resume", "out"}:
        raise UserError(f"--resume --out {out}: there is no run in it; give the --out of one, or a new run's flags")
    if has_run and not where.is_file() and any((out / "checkpoints").glob("step_*")):
        raise UserError(f"{where}: no such file, and it has the run's flags; put it back, or give another --out")
    if not has_run or not where.is_file():
        return None
    own = own_flags(where, parser, groups) | dict.fromkeys(ONCE, False)
    may_change = {field.name for field in line.fields_of(groups) if field.metadata["resume"]}
    odd = disagreement(own, given, may_change, recipes)
    if odd is None:
        return own | {name: value for name, value in given.items() if name in may_change}
    if any((out / "checkpoints").glob("step_*")):
        raise UserError(f"--resume: the run in {out} has {odd}; leave it out, or give another --out")
    return None


def disagreement(own, given, may_change, recipes):
    """The first given flag that differs from the run's own and may not change, in words such as "--lora 4, and --lora
    off is given"; None if there is none."""
    for name, value in given.items():
        if agrees(name, value, own, may_change):
            continue
        if name != "recipe" or value == "released":
            return f"{line.shown(name, own[name])}, and {line.shown(name, value)} is given"
        for inner, wanted in recipes[value].flags.items():
            if own[inner] != wanted and inner not in given:
                return f"{line.shown(inner, own[inner])}, and --recipe {value} is given"
    return None


def agrees(name, value, own, may_change):
    """Whether a given flag may stand beside the run's own flags. Of --weights only the path may change."""
    if name == "weights":
        return (own[name] is None) == (value is None)
    return name in may_change or own[name] == value or (name == "memory" and value == "auto")
