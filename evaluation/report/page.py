"""One page that tells a run: report.html in its folder, written anew after each look at the watched pictures.

    python -m evaluation.report runs/a new=runs/b --out report.html

lays several runs side by side; of one alone it writes that one's page again. A page needs no server and no
network: its pictures are inside it, and it is the same on a phone.
"""

import base64
import io
import json
import math
import os
import time
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image

from engine.command_line import Parser
from engine.errors import UserError, frame, one_line, printable
from engine.files import check_outputs, read_json, write_whole
from engine.paths import named_path
from engine.run import checkpoint
from engine.run import folder as run_folder
from evaluation import tables
from evaluation.picture_folders import is_whole
from evaluation.report import curves
from evaluation.report.curves import Run

PAGE = "report.html"
MARK = b'<meta name="generator" content="report of a run">'
DATA = '<script type="application/json" id="report">'
PICTURES = 24         # of a run at most; with the limits below, its page stays under 10 MB
WIDEST = 1600         # pixels of a picture's side
LARGEST = 800_000     # pixels of a picture
SMALL = 100_000       # bytes of a PNG that is shown as it is
FLAGS = {"steps": int, "size": int, "watch": int, "watch_every": int, "lr": float, "form": str,
         "branches": list, "drift_band": list}  # that the page reads


# ------------------------------------------------------------------------------------------------- in words
def advice(warnings, state, args, running=True):
    """What to do when the gauge has spoken, in words; "" if it has not.

    warnings: what it said; state: what the run remembers, of which "step" and "best_step" (None: there is
    none) are read; args: the run's flags, a dict; running: whether it still is. It names flags to try, not
    a cure.
    """
    if not warnings:
        return ""
    words = []
    if running and state["step"] < args["steps"]:
        words.append("Stop here: Ctrl-C saves a checkpoint.")
    best = state.get("best_step")
    if best is None:
        words.append("There is no weights_best/: no look was inside the band.")
    else:
        words.append(f"weights_best/ holds the weights of step {best}, the best by SGP gap inside the band.")
    tries = [f"a smaller --lr ({args['lr'] / 2:g})"]
    if best is not None and best < args["steps"]:
        tries.append(f"fewer updates (--steps {best})")
    colour = any(text.startswith(("saturation", "redness")) for text in warnings)
    falls = any("SGP gap falls" in text for text in warnings)
    if (colour or falls) and args["form"] in ("plain", "sgp"):
        tries.append("a reward that is relative (--form srp)")
    if colour and len(args["branches"]) < 2:
        tries.append("both branches (--branches denoise,invert)")
    return " ".join([*words, "Then try, one at a time:", ", ".join(tries) + "."])


@cache
def say_once(text):
    """Print a line; the same line again is not printed."""
    print(text, flush=True)


# -------------------------------------------------------------------------------------------------- pictures
def samples_of(folder, last):
    """{step: file} of a run's watched pictures, evenly spread, the first and the last one among them. What a
    killed run left beyond its log is not of this run any more."""
    found = {}
    for path in folder.glob("samples/step_*.png"):
        digits = path.stem.removeprefix("step_")
        if digits.isdecimal() and int(digits) <= last and is_whole(path):
            found[int(digits)] = path
    steps = sorted(found)
    stride = max(1, math.ceil((len(steps) - 1) / (PICTURES - 1)))
    return {step: found[step] for step in sorted({*steps[::stride], *steps[-1:]})}


@lru_cache(maxsize=2 * PICTURES)
def data_uri(path, written):
    """A picture's file as a data: URI, a small PNG as it is, others as a JPEG. `written`, the time, tells it
    from an earlier one of that name: while a run trains, each is encoded once. Raises OSError."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        if len(content) <= SMALL and max(picture.size) <= WIDEST:
            return f"data:image/png;base64,{base64.b64encode(content).decode()}"
        picture = picture.convert("RGB")
    scale = min(1, WIDEST / max(picture.size), (LARGEST / (picture.width * picture.height)) ** 0.5)
    size = [max(1, round(side * scale)) for side in picture.size]
    jpeg = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(jpeg, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def tiles(run):
    """[x, y, width, height], in shares of the whole, of each picture that `save_grid` put into one."""
    if not run.samples:
        return []
    with Image.open(next(iter(run.samples.values()))) as picture:
        width, height = picture.size
    side = run.args["size"] * max(1, 128 // run.args["size"])
    if min(width, height) < side + 4:  # a single picture has no frame
        return [[0, 0, 1, 1]]
    columns = (width - 2) // (side + 2)
    rows = (height - 2) // (side + 2)
    found = []
    for i in range(min(len(run.prompts) or run.args["watch"], columns * rows)):
        x = 2 + i % columns * (side + 2)
        y = 2 + i // columns * (side + 2)
        found.append([x / width, y / height, side / width, side / height])
    return found


# ------------------------------------------------------------------------------------------------------ page
def told(run, i):
    """What the page knows of the i-th run, beside its curves."""
    warned = curves.spoke(run)
    best = curves.best_step(run)
    last = max(warned, default=None)
    pace = curves.pace(run)
    running = run.status == "running" and pace is not None
    return {"name": printable(run.name), "status": run.status, "step": run.step, "steps": run.args["steps"],
            "images": run.state.get("images"), "seconds": curves.seconds_of(run), "best": best,
            "left": pace * (run.args["steps"] - run.step) if running else None,
            "flags": run.flags, "prompts": [printable(text) for text in run.prompts],
            "tiles": tiles(run), "pictures": {step: f"picture-{i}-{step}" for step in run.samples},
            "spoke": warned, "looked": max(curves.looks(run), default=0),
            "advice": advice(warned.get(last), {"step": run.step, "best_step": best}, run.args,
                             run.status == "running")}


def page(runs):
    """The parts of the page's text, one picture after the other. Raises OSError."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    head, tail = template.split("<!-- the report -->")
    between_looks = runs[0].args["watch_every"] * (curves.pace(runs[0]) or 0)
    report = {"runs": [told(run, i) for i, run in enumerate(runs)], "charts": curves.charts(runs),
              "numbers": curves.numbers(runs), "written": time.time(), "between": between_looks,
              "differ": curves.flags_that_differ(runs) if len(runs) > 1 else []}
    text = json.dumps(report, allow_nan=False).replace("<", "\\u003c")  # no prompt ends the element it is in
    yield f"{head}{DATA}{text}</script>\n"
    for i, run in enumerate(runs):
        for step, path in run.samples.items():
            uri = data_uri(path, path.stat().st_mtime_ns)
            yield f'<script type="text/plain" id="picture-{i}-{step}">{uri}</script>\n'
    yield tail


def summary_of(folder):
    """What summary.json holds; {} if there is none. Raises UserError if it is damaged."""
    path = folder / "summary.json"
    return read_json(path) if path.is_file() else {}


def write(folder, args, line_of_flags, finished, state=None, prompts=(), stopped=False):
    """Write the page of a run into its folder.

    args: the flags, a dict; line_of_flags: the same as one line; finished: whether the run is, and stopped:
    whether it was asked to stop; state: what it remembers, if that is known; prompts: of the watched
    pictures, likewise. A page is no reason to lose an update: what goes wrong is said once, and never raised.
    """
    folder = Path(folder)
    status = "running"
    if finished or stopped:
        status = "finished" if finished else "stopped"
    try:
        log = folder / "log.jsonl"
        lines = curves.read_log(log) if log.exists() else []
        summary = summary_of(folder) if finished else {}
        run = Run(folder.resolve().name, args, line_of_flags, status, state or {}, list(prompts), lines,
                  samples_of(folder, lines[-1]["step"] if lines else 0), summary)
        write_whole(folder / PAGE, page([run]))
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        say_once(f"{printable(folder / PAGE)}: cannot be written: {printable(why)}; training goes on")


# -------------------------------------------------------------------------------------------- side by side
def earlier(path):
    """(line of flags, prompts) that a run's own page knows; ("", []) if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.startswith(DATA):
                    run = json.loads(line[len(DATA):].removesuffix("</script>\n"))["runs"][0]
                    return run["flags"], run["prompts"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return "", []


def status_of(folder, args, lines):
    """Whether a run is running, by its lock; finished, by its summary; or stopped."""
    lock = folder / run_folder.LOCK
    if lock.is_file():
        with open(lock, "rb") as file:
            try:
                run_folder.lock(file, folder)
            except UserError:
                return "running"
    done = lines[-1]["step"] >= args["steps"] and (folder / "summary.json").is_file()
    return "finished" if done else "stopped"


def read_run(name, folder):
    """The `Run` in a folder. Raises UserError if there is none, or it has logged nothing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if run_folder.run_in(folder) is None or not (folder / "args.json").is_file():
        raise UserError(f"{folder}: not a run's folder: it has no {run_folder.MARK} or no args.json")
    args = read_json(folder / "args.json")
    is_ours = isinstance(args, dict) and all(isinstance(args.get(flag), kind) for flag, kind in FLAGS.items())
    if not is_ours:
        raise UserError(f"{folder}/args.json: not the flags of a run")
    log = folder / "log.jsonl"
    lines = curves.read_log(log) if log.is_file() else []
    if not lines:
        raise UserError(f"{log}: holds no update yet")
    state = {}
    for newest in run_folder.finished(folder)[-1:]:
        try:
            state = checkpoint.state_of(newest)
        except checkpoint.Damaged:  # the page does without it
            pass
    status = status_of(folder, args, lines)
    summary = summary_of(folder) if status == "finished" else {}
    flags, prompts = earlier(folder / PAGE)
    return Run(name or folder.resolve().name, args, flags, status, state, prompts, lines,
               samples_of(folder, lines[-1]["step"]), summary)


def may_write(out):
    """Raise UserError if a page cannot be written there, or something else would be lost."""
    check_outputs([out], [], overwrite=True)
    if os.path.exists(out):
        with open(out, "rb") as file:
            if MARK not in file.read(1000):
                raise UserError(f"{out} exists already and is not a report; give another --out")


def markdown(rows):
    """[[cell]] as a Markdown table, the head first."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(tables.safe, line)) + " |" for line in lines)


def main(argv=None):
    parser = Parser(__doc__, prog="python -m evaluation.report")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN",
                        help="folders of runs; without NAME= one is called by its folder's name")
    parser.add_argument("--out", default=PAGE, help="the page")
    with frame("report"):
        args = parser.parse_args(argv)
        may_write(args.out)
        runs = [read_run(*named_path(item)) for item in args.runs]
        write_whole(args.out, page(runs))
        print(markdown(curves.numbers(runs)))
        print(f"{printable(args.out)}: {len(runs)} run{'s' * (len(runs) > 1)}, "
              f"{Path(args.out).stat().st_size / 1e6:.1f} MB")


