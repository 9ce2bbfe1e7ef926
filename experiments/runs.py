"""The runs of every experiment: train.py's, and evaluate.py's numbers of their weights.

Each run is made once and kept, in a folder that is named by its flags. So experiments share runs, and an experiment
that was stopped continues. Watched pictures are held-out prompts, sampled at fixed seeds while a run trains. Broken
pictures have melted or damaged parts.
"""

import argparse
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import command
import evaluate
import recipe
import train
from engine.command_line import Parser, some_path, whole
from engine.errors import UserError
from engine.files import must_be_writable, must_not_lead_away, read_json
from engine.model.folder import Model
from evaluation.metrics import frechet
from evaluation.report.curves import read_log
from experiments import pages

HELD_OUT = "miniature/reward_unbiased"  # the held-out reward; only unbiased and rare_words train on it
METRICS = f"reward,statistics,judge,look,frechet,clip={HELD_OUT}"
# What experiments make in --home.
MADE = ("pages", "gpu", "references", "photographs_*", "offline_*.json", "prompts_*.txt", "reward_*", "*/run.json",
        "*/made.json")
BROKEN = 0.05  # a run breaks when the share of broken pictures is larger than this


class Setting(NamedTuple):
    """A row of an experiment: its name, the flags of train.py that make it, and how many times --seeds it is run."""
    name: str
    flags: str
    times: int = 1

    def seeds(self, own):
        """The seeds of its runs."""
        return range(self.times * own.seeds)


def with_a_judge(text):
    """A type for argparse: a model's folder with a judge. A folder that does not exist is refused by `parse`."""
    if Path(text).is_dir() and not (Path(text) / "judge").is_dir():
        raise argparse.ArgumentTypeError(f"{text}: must be a folder with judge/ in it, which is needed to count photos")
    return text


def flag_line(text):
    """A type for argparse: flags as in a shell."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be flags as in a shell: {error}") from error
    return text


def parser(doc, seeds=5, pictures=128):
    """The parser of the flags that every experiment has. seeds, pictures: the defaults of two of them."""
    common = Parser(doc)
    add = common.add_argument
    add("--model", type=with_a_judge, default="miniature", help="a model folder with a judge")
    add("--seeds", type=whole(1, 100), default=seeds, help="runs of each row, seeds 0, 1, ...")
    add("--home", type=some_path, default="runs/experiments",
        help="folder of the runs, which experiments share, and of the pages")
    add("--publish", action="store_true", help="write the page into experiments/results, over the published one")
    add("--pictures", type=whole(frechet.FEWEST), default=pictures,
        help=f"held-out prompts that are evaluated; {frechet.FEWEST} at least, for the Frechet distance")
    add("--flags", type=flag_line, default="",
        help="flags of train.py for every run, which override the run's own; --steps 2 tests that everything runs")
    return common


def parse(common, argv):
    """The values of these flags on a command line, and their defaults as `defaults`. common: a `parser`. Raises
    UserError."""
    own = common.parse_args(argv)
    own.defaults = {flag: common.get_default(flag) for flag in vars(own)}
    pages.must_be_publishable(own)
    Model(own.model)  # a wrong one is refused before anything is drawn or built
    must_be_a_home(own.home)
    return own


def must_be_a_home(home):
    """Raise UserError if --home cannot be written; if it is not empty, and holds nothing of an experiment; or if a link
    leads out of it."""
    must_be_writable(home, "--home")
    must_not_lead_away(home, [*MADE, "pages/*", "gpu/*", "photographs_*/*", "references/*"], "--home")
    made = [path for name in MADE for path in Path(home).glob(name)]
    if Path(home).is_dir() and any(Path(home).iterdir()) and not made:
        raise UserError(f"--home {home}: is not the folder of experiments, and not empty; give another --home")


# ------------------------------------------------------------------------------------------------------- runs
SELDOM = "--watch 2 --watch-every 1000"  # for runs whose watched pictures are not used


WATCHED = 48  # pictures of the selection prompts
SELECTION = 104  # all of the selection prompts


def n_watched(own, pictures=WATCHED):
    """How many pictures are watched: `pictures`, but not more than --pictures."""
    return min(pictures, own.pictures)


def watching(own, pictures=WATCHED, every=2):
    """Flags of train.py for runs whose watched pictures are used: how many, and every how many updates."""
    return f"--watch {n_watched(own, pictures)} --watch-every {every}"


def trained(own, flags, seed, looks=SELDOM):
    """The folder of the finished run of train.py with these flags (one line) and a seed. It is run now if it does not
    exist. looks: further flags, which only change what is watched."""
    argv = ["--model", own.model, *shlex.split(looks), *shlex.split(flags), *shlex.split(own.flags)]
    argv += ["--seed", str(seed)]
    name = re.sub(r"[^\w.]+", "_", flags).strip("_")[:60] or "main"
    digest = hashlib.sha256(shlex.join(argv).encode()).hexdigest()[:8]
    out = Path(own.home) / f"{name}_{digest}"
    if not (out / "summary.json").exists():
        print(f"train.py {shlex.join(argv)} --out {out}", flush=True)
        train.main([*argv, *watch_prompts(argv), "--eval", "0", "--out", str(out), "--resume"])
        if not (out / "summary.json").exists():
            raise UserError(f"{out}: stopped; start the same command again to go on")
        shutil.rmtree(out / "checkpoints")  # most of a run's size, and it is finished
    return out


def watch_prompts(argv):
    """For a run that learns from photographs: the flag with which the model's own prompts are watched, not captions."""
    own = command.flags(argv)
    if own.watch_prompts != recipe.OWN:
        return []
    return ["--watch-prompts", command.flags(["--model", own.model]).watch_prompts]


def watched(own, flags, seed, pictures=WATCHED, every=2):
    """The log of a run: a list of dicts, one for each update. Every `every` updates, "watch" has the means over the
    watched pictures."""
    return log_of(trained(own, flags, seed, watching(own, pictures, every)))


def log_of(folder):
    """The log in a run's folder: a list of dicts, one for each update."""
    return read_log(folder / "log.jsonl")


def scores(own, weights, name, prefix=None, per_prompt=1, prompts=None):
    """{row: `pages.Scored`} by evaluate.py. Rows: the base, with `prefix` the base whose prompts are prefixed with it,
    and weights {row: folder of a run}. Each row has a picture of --pictures prompts, and `per_prompt` of some of them
    for the diversity. prompts: a file; None: the model's. Raises UserError if pictures cannot be read."""
    argv = ["--model", own.model, "--first", str(own.pictures), "--batch", "16", "--metrics", METRICS,
            "--per-prompt", str(per_prompt)]
    if prefix:
        argv += ["--prefix", prefix]
    if prompts:
        argv += ["--prompts", str(prompts)]
    digest = hashlib.sha256(shlex.join([*argv, own.flags]).encode()).hexdigest()[:8]
    out = Path(own.home) / f"evaluate_{name}_{digest}"
    if weights:
        argv += ["--weights", *(f"{row}={folder}/weights" for row, folder in weights.items())]
    if evaluate.run([*argv, "--out", str(out)]):
        raise UserError(f"{out}: some pictures could not be read; delete the folder")
    overall = {}
    for row, found in read_json(out / "results.json")["rows"].items():
        overall[row] = {column: cell["mean"] for column, cell in found["overall"].items() if cell}
    lines = [json.loads(line) for line in (out / "pictures.jsonl").read_text().splitlines()]
    return pages.scored(lines, overall)


def by_seed(own, settings, name, prefix=None, per_prompt=1, looks=SELDOM, prompts=None):
    """{row: [its `pages.Scored`, one for each seed]}, of `scores` for every `Setting`, after the base, with and without
    `prefix`. looks: as in `trained`. prompts: as in `scores`."""
    weights = {}
    rows = {}
    for setting in settings:
        rows[setting.name] = [f"{setting.name} seed{seed}" for seed in setting.seeds(own)]
        weights |= {row: trained(own, setting.flags, seed, looks) for seed, row in enumerate(rows[setting.name])}
    found = scores(own, weights, name, prefix, per_prompt, prompts)
    bases = {row: [seed] for row, seed in found.items() if row not in weights}
    return bases | {name: [found[row] for row in each] for name, each in rows.items()}


def measured(own, settings, name, prefix=None, **more):
    """{row: {column: `pages.Spread`}} of `by_seed`. more: its other arguments."""
    return {row: pages.pooled(seeds) for row, seeds in by_seed(own, settings, name, prefix, **more).items()}


# ---------------------------------------------------------------------------------------------------- from logs
def first(lines, wanted):
    """The first line of a log for which wanted(line) is true; None if there is none."""
    return next((line for line in lines if wanted(line)), None)


def first_step(log, column, reached):
    """The first update at which reached(watched mean of the column) is true; None if there is none."""
    found = first(log, lambda line: "watch" in line and reached(line["watch"][column]))
    return found and found["step"]


def breaks(log):
    """The first update at which more than BROKEN of the watched pictures are broken; None if there is none."""
    return first_step(log, "broken", lambda value: value > BROKEN)


def first_warning(log):
    """The first update at which the drift warning fired; None if it never did."""
    found = first(log, lambda line: line.get("hacking"))
    return found and found["step"]


def at_equal(log, column, climbed, value):
    """The watched mean of `column` at the point where that of `climbed` first reaches `value`, interpolated between two
    looks. None if it never does."""
    before = None
    for line in log:
        if "watch" not in line:
            continue
        now = line["watch"]
        if now[climbed] >= value:
            if before is None or now[climbed] == before[climbed]:
                return now[column]
            part = (value - before[climbed]) / (now[climbed] - before[climbed])
            return before[column] + part * (now[column] - before[column])
        before = now
    return None
