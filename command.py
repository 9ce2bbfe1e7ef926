"""The command line of train.py. It is read, completed by the recipe, the method and the model, and checked. Nothing
here needs torch, so -h and a wrong flag are answered at once.

Every flag is a field of recipe.py. Its default, help and range are there, and whether a model's srpo.json or --resume
may change it.
"""

from argparse import Namespace
from pathlib import Path

import rewards
from engine import command_line as line
from engine.command_line import must_differ
from engine.data import prompt_files
from engine.errors import UserError
from engine.memory import gpus, modes
from engine.model.folder import Model
from engine.model.own_flags import may_set
from engine.run import resume
from recipe import GROUPS, LORA_LR, METHODS, OWN, RECIPES, Plan, Trained


# -------------------------------------------------------------------------------------------------------- reading
def parser():
    """The argparse parser of train.py."""
    methods = "; ".join(f"{name}, {method.says}" for name, method in METHODS.items())
    p = line.Parser("SRPO: align FLUX.1 with the difference between two prompts (arXiv 2509.06942).",
                    epilog=recipes_and_methods(), prog="train.py")
    texts = {"methods": methods, "rewards": ", ".join(rewards.names())}
    for group in GROUPS:
        line.add_group(p, group, texts)
    p.add_argument("--recipe", choices=list(RECIPES), default="released", help="a named set of flags, see below")
    return p


def flags(argv):
    """The flags of a command line of train.py. Raises UserError for what can be refused before weights are loaded."""
    return read(argv)[0]


def read(argv):
    """(flags, the `Model` that they name). Where several give a flag a value, the first of these counts: the command
    line, --recipe, the method, the model's srpo.json, the field of recipe.py. With --resume the run's own flags are
    taken instead. Raises UserError."""
    p = parser()
    given = line.given(p, argv)
    check_method(given)
    out = out_of(given.get("out"), given.get("model", Trained().model))
    values = resume.flags_of(out, p, GROUPS, RECIPES, given) if given.get("resume") else None
    if values is None:
        values, model = new_run(p, given)
    else:
        check_method(values)
        model = Model(values["model"])
    a = Namespace(**values)
    check(a, model)
    return a, model


def out_of(out, model):
    """The folder of a run: --out, or a folder in runs/ with the model's name."""
    return Path(out or f"runs/{Path(model).name}")


def new_run(p, given):
    """({flag: value}, `Model`) of a run that starts from the beginning. Raises UserError."""
    if "images" in given and "prompts" in given:
        raise UserError(f"--images {given['images']} --prompts {given['prompts']}: the captions are the prompts; give "
                        "one of the two")
    model = Model(given.get("model", Trained().model))
    return defaults(p, given, model) | given, model


def defaults(p, given, model):
    """{flag: value} of all flags, before the command line's own values replace some of them. `given`, what the command
    line gives, is read for the flags that decide over the defaults of others: --recipe, --method, --lora, --prompts and
    --images. Raises UserError."""
    values = line.defaults(GROUPS) | {"recipe": given.get("recipe", "released")}
    differs = checked_recipe(p, values["recipe"])
    own = model.flags(may_set(GROUPS))
    rate = own.pop("lora_lr", LORA_LR)
    if (differs | given).get("lora"):
        own["lr"] = rate
    values |= line.read_values(p, own, model.says)
    values |= METHODS[given.get("method", values["method"])].flags
    values |= differs
    if "images" in given or given.get("prompts", "hpdv2") not in prompt_files.PROMPTS:
        values["watch_prompts"] = OWN
    return values


def checked_recipe(p, name):
    """{flag: value} that the recipe of a name sets. Raises UserError for what the command line would refuse."""
    differs = RECIPES[name].flags
    for flag_name in differs:
        if flag_name not in line.defaults(GROUPS) or flag_name in ("model", "method"):
            raise UserError(f"--recipe {name}: {flag_name} is no flag that a recipe can set; see RECIPES in recipe.py")
    line.read_values(p, differs, f"--recipe {name}")
    return differs


def of_script(p, argv):
    """(flags, `Model`) of sample.py or evaluate.py. p: its parser, which has --model. The model's own flags replace the
    parser's defaults. Raises UserError."""
    given = line.given(p, argv)
    args = p.parse_args(argv)
    model = Model(args.model)
    for name, value in line.read_values(p, model.flags(may_set(GROUPS)), model.says).items():
        if name not in given:
            setattr(args, name, value)
    return args, model


# ------------------------------------------------------------------------------------------------------- in words
def as_line(a, fixed=False):
    """The flags of a run as one line that can be pasted back into a shell. It stays the same when the run is resumed.
    fixed: without the flags that --resume may change."""
    left_out = {*resume.ONCE, *(field.name for field in line.fields_of([Plan]))}
    if a.images is not None:
        left_out.add("prompts")  # `new_run` refuses both
    if fixed:
        left_out |= {field.name for field in line.fields_of(GROUPS) if field.metadata["resume"]}
    values = {name: value for name, value in vars(a).items() if name not in left_out}
    return f"{line.as_line(GROUPS, values)} --recipe {a.recipe}"


def recipes_and_methods():
    """The end of the help: every recipe and every method, with the flags that it sets."""
    told = []
    for title, named in (("recipes:", RECIPES), ("methods:", METHODS)):
        told.append(title)
        for name, each in named.items():
            sets = f":\n      {line.as_line(GROUPS, each.flags)}" if each.flags else ""
            told.append(f"  {name}: {each.says}{sets}")
    return "\n".join(told)


# ---------------------------------------------------------------------------------------------------------- checks
def check_method(given):
    """Raise UserError for an unknown method, or for a recipe with a method other than srpo."""
    name = given.get("method", "srpo")
    if name not in METHODS:
        raise UserError(f"--method: invalid choice: {name!r} (choose from {', '.join(METHODS)})")
    recipe = given.get("recipe", "released")
    if name != "srpo" and recipe != "released":
        raise UserError(f"--method {name} --recipe {recipe}: the recipes are srpo's; give the flags that {name} reads")


def check(a, model):
    """Raise UserError for flags that do not fit each other, or the model."""
    high, low = a.sigma_range
    if high - low < 1e-3:
        raise UserError(f"--sigma-range {high} {low}: give MAX then MIN, 0.001 apart at least")
    if a.lam == [0, 0]:
        raise UserError("--lam 0 0: every loss would be 0, and there is nothing to learn")
    if not a.branches or len(set(a.branches)) < len(a.branches) or set(a.branches) - {"denoise", "invert"}:
        raise UserError(f"--branches {','.join(a.branches)}: must be denoise, invert or denoise,invert")
    must_differ(a.control, a.neg)
    check_pairs(a)
    out = out_of(a.out, a.model).resolve()
    if a.overwrite and a.weights and out in (Path(a.weights).resolve(), *Path(a.weights).resolve().parents):
        raise UserError(f"--overwrite --weights {a.weights}: the weights would be deleted before the run starts from "
                        "them; give another --out")
    gpus.check(a.card)
    model.grid(a.size, a.size)
    check_cfg(a, model)
    rewards.parse_rewards(a.reward)
    modes.check(a.lora, a.memory)
    line.check_names(a.save_as, model.family)
    line.check_save_as(a.save_as, bool(a.lora))


def check_cfg(a, model):
    """Raise UserError for guidance that a distilled model does not take, or DanceGRPO's ratio does not allow. a: the
    flags of train.py, sample.py or evaluate.py."""
    if a.cfg is not None and not model.configs.takes_cfg:
        raise UserError(f"--cfg {a.cfg:g}: {model.name} is distilled, and takes no classifier-free guidance; leave it "
                        "out, or give an undistilled model, such as black-forest-labs/FLUX.2-klein-base-4B")
    if getattr(a, "method", None) == "dancegrpo" and a.cfg is not None and a.cfg_gradient == "off":
        raise UserError("--method dancegrpo --cfg-gradient off: its ratio compares a velocity with that of the "
                        "rollout, which is guided; give both or prompt")


def check_pairs(a):
    """Raise UserError for two flags that exclude each other."""
    method = METHODS[a.method]
    steps_inside = method.optimizer_steps > 1  # then the method compares the network with its own rollout
    refused = (
        (a.resume and a.overwrite, "--resume --overwrite: go on with the run in --out, or start again; give one"),
        (a.resume and a.explain, "--resume --explain: the base would be explained, and not the run; for that give "
         f"--weights {out_of(a.out, a.model)}/weights without --resume"),
        (a.explain and a.method != "srpo", f"--explain --method {a.method}: only srpo can be explained"),
        (a.images is not None and not method.takes_photographs,
         f"--images --method {a.method}: it learns from its own rollouts, and not from photographs"),
        (a.online_from is not None and a.images is None,
         f"--online-from {a.online_from}: without --images every update is online; leave it out"),
        (a.images is not None and a.noise == "fresh", "--images --noise fresh: nothing is rolled out, and every "
         "photograph gets noise of its own; leave --noise out"),
        (steps_inside and a.rollout_dtype == "fp8", f"--method {a.method} --rollout-dtype fp8: the method compares the "
         "network with its own rollout, so both need the same dtype; leave --rollout-dtype out"),
        (steps_inside and a.rollout_steps < 2, f"--method {a.method} --rollout-steps {a.rollout_steps}: must be at "
         "least 2, because the last step is not trained"))
    for is_so, message in refused:
        if is_so:
            raise UserError(message)


# ------------------------------------------------------------------------------------------ what may surprise
# Flags that are read only where another flag has some value: (names, which value in words, whether it has it).
READ_WITH = (
    (("cfg_k",), "--form cfg", lambda a: a.form == "cfg"),
    (("discount_denoise", "discount_invert"), "--form released", lambda a: a.form == "released"),
    (("discount_denoise",), "a denoising branch", lambda a: a.method != "srpo" or "denoise" in a.branches),
    (("discount_invert",), "an inverting branch", lambda a: "invert" in a.branches),
    (("lam_at", "lam_shift"), "two values of --lam that differ", lambda a: a.lam[0] != a.lam[1]),
    (("cfg_gradient", "cfg_keep_norm"), "--cfg", lambda a: a.cfg is not None),
    (("world_size", "card", "share"), "--plan", lambda a: a.plan))


def notes(a, model):
    """What may surprise about the flags: a list of lines to print."""
    lines = model.notes(vars(a)) + unread(a, model)
    if a.threshold is not None and a.form in ("plain", "sgp") and len(a.branches) == 2 and a.method == "srpo":
        lines.append(f"--form {a.form} --threshold {a.threshold}: the inverting branch has the reward of the denoising "
                     "one with the other sign; so the threshold stops at most one of the two, and --threshold off "
                     "stops none")
    if a.images is not None:
        until = "" if a.online_from is None else f" before update {a.online_from}"
        lines.append(f"--images {a.images}: the captions are the prompts; nothing is rolled out{until}; every "
                     f"photograph gets noise of its own in every update{until}; --noise and --rollout-* are not "
                     f"read{until}")
    if a.land is not None and a.watch < 16:
        lines.append(f"--land {a.land} --watch {a.watch}: the mean gap of so few pictures has a standard error of "
                     f"about {0.1 / a.watch ** 0.5:.2f}, so the run ends late; give --watch 16 or more")
    return lines


def unread(a, model):
    """A line for each flag whose value nothing reads, unless the value is the usual one."""
    usual = defaults(parser(), {"method": a.method, "recipe": a.recipe}, model)
    told = []
    for name, value in usual.items():
        if vars(a)[name] == value:
            continue
        why = [f"read only with {where}" for names, where, holds in READ_WITH if name in names and not holds(a)]
        if name in METHODS[a.method].never_reads:
            why = [f"--method {a.method} does not read it"]
        if why:
            told.append(f"{line.shown(name, vars(a)[name]).removesuffix(' True')}: {why[0]}")
    return told
