"""All predictions, measured on one GPU without supervision: python -m experiments.gpu

Each part makes updates of two images at FLUX.1-dev's size with random weights (experiments/bench.py), in a process of
its own. If a part runs out of memory, that is noted, and the next part follows. The gradient is compared with float32
on the miniature. Nothing is downloaded. The most important parts come first. A part ends after MOST minutes, and all of
it after --minutes. The page is written again after each part. Measured parts are kept, so after a kill the same command
goes on.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import flow
from engine.command_line import Parser, real, some_path
from engine.errors import UserError, frame
from engine.files import read_json, write_json
from engine.memory import cards, parallel, shown
from engine.model.folder import Model
from experiments import pages, runs
from experiments.bench import PHASES

UPDATE, OTHER = "bench", "on_a_card"
MOST = 8  # minutes of a part, so that one that hangs leaves time for the others
ERROR_LINES = ("OutOfMemoryError", "Error", ":")  # texts that mark the line of the error; the first one found counts
WARNING = re.compile(r"(\[rank\d+\]:)?\[?[IW]\d{4} |.*Warning:")  # the start of a line of torch's log that is no error


class Part(NamedTuple):
    """A row of the page: its name, the module that measures it, what it is asked, and its flags."""
    name: str
    module: str
    what: str
    flags: str


PARTS = [
    Part("LoRA, float8 base", UPDATE, "", "--lora 32 --memory fp8"),
    Part("all weights, split", UPDATE, "", "--memory split"),
    Part("LoRA, bf16 base", UPDATE, "", "--lora 32 --memory bf16"),
    Part("numerics", OTHER, "numerics", ""),
    Part("LoRA, float8 base, fast recipe", UPDATE, "", "--lora 32 --memory fp8 --recipe fast"),
    Part("LoRA, bf16 base, rollout in float8", UPDATE, "", "--lora 32 --memory bf16 --rollout-dtype fp8"),
    Part("LoRA, bf16 base, compiled", UPDATE, "", "--lora 32 --memory bf16 --compile"),
    Part("determinism", OTHER, "determinism", ""),
    Part("picture, bf16", OTHER, "sampling", "--memory bf16"),
    Part("picture, float8", OTHER, "sampling", "--memory fp8"),
    Part("LoRA, float8 base on the host", UPDATE, "", "--lora 32 --memory fp8-offload"),
    Part("all weights, on the host", UPDATE, "", "--memory offload"),
    Part("picture, float8 on the host", OTHER, "sampling", "--memory fp8-offload"),
    Part("all weights, compiled", UPDATE, "", "--memory split --compile"),
    Part("all weights, streamed", UPDATE, "", "--memory stream"),
    Part("all weights, float32 masters", UPDATE, "", "--memory masters")]
NAMES = [part.name for part in PARTS]
KEPT = {"command": [str], "took": float, "told": dict}  # the shape of a part's file


# --------------------------------------------------------------------------------------------------- measuring
def command_of(own, part, file):
    """The command line of a part, in a list."""
    model = Model(own.model)
    words = ["-m", f"experiments.{part.module}"]
    if part.module == UPDATE:
        words += ["--json", str(file), "--repeats", "1", "--global-batch", "2", "--model", own.model]
        words += ["--random-init"] * flow.is_full_size(model)
    else:
        words += [part.what, str(file)]
        words += ["--model", own.model] * (part.what == "sampling")
    if part.what in ("", "sampling"):
        words += shlex.split(part.flags)
    if part.what != "sampling":
        words += shlex.split(own.flags)
    return words


def in_a_process(words, seconds, printed):
    """Run a module for at most `seconds`. printed: the file of what it prints. Returns its error in one line, or None.
    Raises TimeoutExpired."""
    with open(printed, "w") as file:  # a pipe would stay open as long as a process that the module has started
        done = subprocess.run([sys.executable, *words], stdout=file, stderr=file, timeout=seconds,
                              env=os.environ | {"PYTHONUNBUFFERED": "1"})
    if done.returncode == 0:
        return None
    told = [line.strip() for line in Path(printed).read_text(errors="replace").splitlines()]
    told = [line for line in told if line and not WARNING.match(line)]
    for mark in ERROR_LINES:
        for line in reversed(told):
            if mark in line:
                return line[:300]
    return f"exit status {done.returncode}"


def measure(words, seconds, file, printed):
    """What a part measures and writes to a file, or {"failed": why not}. seconds: what is left of --minutes. Raises
    TimeoutExpired if they end before MOST does."""
    file.unlink(missing_ok=True)
    try:
        failed = in_a_process(words, min(seconds, 60 * MOST), printed)
    except subprocess.TimeoutExpired:
        if seconds < 60 * MOST:
            raise
        failed = f"it took more than {MOST} minutes"
    return {"failed": failed} if failed else read_json(file)


def measured(own, folder):
    """Yields (name, what was measured, or {"failed": why not}) of each part, in their order, until the time is over.
    Each is kept in a file of the folder, with the seconds that it took."""
    left = 60 * own.minutes
    for number, part in enumerate(PARTS):
        if own.parts and part.name not in own.parts:
            continue
        file = folder / f"{number:02d}.json"
        measuring = folder / "measuring.json"
        words = command_of(own, part, measuring)
        kept = read_json(file, KEPT, "not what was measured here; remove it") if file.exists() else {}
        if kept.get("command") != words:
            if left <= 0:
                continue
            print(f"{part.name}: {shlex.join(['python', *words])}", flush=True)
            began = time.monotonic()
            try:
                told = measure(words, left, measuring, file.with_suffix(".txt"))
            except subprocess.TimeoutExpired:
                left = 0
                continue
            kept = {"command": words, "took": time.monotonic() - began, "told": told}
            write_json(file, kept)
        left -= kept["took"]
        yield part.name, kept["told"]


# ---------------------------------------------------------------------------------------------------- the page
def one(value):
    """A number that was measured once, as a `pages.Spread`; None for none."""
    return None if value is None else pages.Spread(value, None, 1)


def rows_of(found):
    """Three tables {row: {column: `pages.Spread`}}: updates, pictures, and what compares gradients; and {row: why it
    has no numbers}."""
    updates = {}
    pictures = {}
    gradients = {}
    failed = {}
    for part in PARTS:
        told = found.get(part.name)
        if told is None:
            failed[part.name] = "not reached"
        elif "failed" in told:
            failed[part.name] = told["failed"]
        elif part.module == UPDATE:
            numbers = told["phases"] | {name: told.get(name) for name in (
                "seconds", "first", "share_of_peak", "allocated", "reserved", "planned")}
            updates[part.name] = {name: one(value) for name, value in numbers.items()}
        else:
            table = pictures if part.what == "sampling" else gradients
            table[part.name] = {name: one(value) for name, value in told.items()}
    return updates, pictures, gradients, failed


COLUMNS = {phase: (f"{phase}, s", ".3g") for phase in PHASES} | {
    "seconds": ("an update of 2 images, s", ".3g"), "first": ("the first one, s", ".3g"),
    "share_of_peak": ("share of the peak", ".1%"), "allocated": ("allocated, GiB", ".1f"),
    "reserved": ("reserved, GiB", ".1f"), "planned": ("planned, GiB", ".1f")}
OF_PICTURES = {"seconds": ("seconds", ".3g"), "allocated": ("allocated, GiB", ".1f"),
               "reserved": ("reserved, GiB", ".1f")}
OF_GRADIENTS = {"cosine": ("cosine", ".6f"), "largest": ("largest difference, of the largest number", ".2g"),
                "reward": ("reward", ".4f"), "reward on the CPU": ("reward on the CPU", ".4f"),
                "the same bits": ("the same bits (1: yes)", ".0f")}


def readme_rows(card, gib, found):
    """Rows for README.md's table of cards, measured: GiB with what CUDA takes, an update of 32 images, 19 updates."""
    lines = [f"| {card}, {gib:.0f} GB: flags | GiB | an update of 32 images | 19 updates |", "|---|---|---|---|"]
    for part in PARTS:
        told = found.get(part.name, {})
        if part.module == UPDATE and "reserved" in told:
            seconds = told["seconds"] * 32 / told["images"]
            taken = told["reserved"] + cards.CONTEXT / 2**30
            lines.append(f"| `{part.flags}` | {taken:.1f} | {shown.in_time(seconds)} | {shown.in_time(19 * seconds)} |")
    return "\n".join(lines)


def page(own, card, gib, found):
    """The `pages.Page` of what was measured."""
    updates, pictures, gradients, failed = rows_of(found)
    said = f"{len(PARTS) - len(failed)} of {len(PARTS)} parts measured on {card}"
    told = [f"{card}, torch {torch.__version__}. Random weights of {own.model}'s size, one image at a time; every "
            "number was measured once. Planned: without text encoders and CUDA itself.",
            readme_rows(card, gib, found)]
    if failed:
        told.append("Without numbers:\n\n" + "\n".join(f"- {name}: {why}" for name, why in failed.items()))
    tables = [(updates, COLUMNS), (pictures, OF_PICTURES), (gradients, OF_GRADIENTS)]
    return pages.Page("One GPU", "The table of README.md says what a card needs and how long an update takes.",
                      f"{said}.", "\n\n".join(told), [(rows, columns) for rows, columns in tables if rows])


def parser():
    """The parser of this script's flags."""
    common = Parser(__doc__)
    add = common.add_argument
    add("--model", default="black-forest-labs/FLUX.1-dev", help="whose size is measured, hub id or folder")
    add("--minutes", type=real(0, open_low=True), default=25, help="after so many minutes nothing more is begun")
    add("--parts", nargs="+", choices=NAMES, metavar="PART", help="only these: " + "; ".join(NAMES) + " (None: all)")
    add("--home", type=some_path, default="runs/experiments", help="folder of what is measured, and of the page")
    add("--publish", action="store_true", help="write the page into experiments/results, over the published one")
    add("--flags", type=runs.flag_line, default="", help="flags of train.py for every update, which override its own")
    return common


def main(argv=None):
    with frame("gpu"):
        own = runs.parse(parser(), argv)
        flow.needs_gpu(Model(own.model))
        device, _ = parallel.device_and_dtype()
        card, gib = "CPU", 0
        if device.type == "cuda":
            card = torch.cuda.get_device_name(device)
            gib = torch.cuda.get_device_properties(device).total_memory / 1e9
        folder = Path(own.home) / "gpu" / card.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        found = {}

        def write(quiet):
            updates, *_ = rows_of(found)
            if updates:
                figure = pages.bar_figure(updates, ["seconds", "reserved", "planned"])
                pages.write(own, "gpu", page(own, card, gib, found), figure, quiet, card=card, found=found)
            return updates

        for name, told in measured(own, folder):
            found[name] = told
            write(quiet=True)
        if not write(quiet=False):
            raise UserError(f"{folder}: no update was measured; the files there say why")


if __name__ == "__main__":
    main()
