"""One page that shows a run: report.html in its folder, written again after each look at the watched pictures.

    python -m evaluation.report runs/a new=runs/b --out report.html

This command shows several runs side by side. Given one run, it writes the page of that run again. A page needs no
server and no network, because its pictures are inside it. It works on a phone too.
"""

import base64
import io
import json
import math
import time
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image

import command
import recipe
from engine.command_line import Parser, some_path
from engine.data.pictures import opened
from engine.errors import UserError, frame, one_line, printable
from engine.files import check_outputs, fits, read_json, write_whole
from engine.paths import named_path
from engine.run import checkpoint, resume
from engine.run import folder as run_folder
from evaluation import table_formats
from evaluation.picture_folders import is_whole, places
from evaluation.report import curves
from evaluation.report.curves import Run

PAGE = "report.html"
MARK = b'<meta name="generator" content="report of a run">'
DATA = '<script type="application/json" id="report">'
PICTURES = 24         # most pictures of a run; with the limits below, its page stays under 10 MB
WIDEST = 1600         # most pixels of a picture's side
LARGEST = 800_000     # most pixels of a picture
SMALL = 100_000       # most bytes of a PNG that is embedded unchanged
MEAN = {"mean": (None, float), "se": (None, float), "n": (None, int)}
RESULTS = (None, {str: (None, MEAN)})  # the shape of a row of summary.json
NO_SUMMARY = "not the results of a run; remove it"
STATE = {"before": (None, {str: [object]})}  # of what the page reads of a state


# ------------------------------------------------------------------------------------------------- in words
def advice(warnings, state, args, running=True):
    """What the user can do when the drift warning fired, as text; "" without warnings. It names flags to try; none of
    them is sure to help.

    warnings: the texts. state: the run's state, of which "step" and "best_step" (or None) are read. args: the run's
    flags, a dict. running: whether the run still trains.
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
    return " ".join([*words, "To try, one at a time:", ", ".join(tries) + "."])


@cache
def say_once(text):
    """Print a line, but only once: the same line is not printed again."""
    print(text, flush=True)


# -------------------------------------------------------------------------------------------------- pictures
def samples_of(folder, last):
    """{step: file} of a run's watched pictures: PICTURES at most, evenly spread, the first and the last included.
    Pictures of steps after `last`, which a killed run may have left, are ignored."""
    found = {}
    for path in folder.glob("samples/step_*.png"):
        digits = path.stem.removeprefix("step_")
        if digits.isdecimal() and int(digits) <= last and is_whole(path) and can_be_opened(path):
            found[int(digits)] = path
    steps = sorted(found)
    stride = max(1, math.ceil((len(steps) - 1) / (PICTURES - 1)))
    return {step: found[step] for step in sorted({*steps[::stride], *steps[-1:]})}


def photographs_of(folder):
    """The file of the photographs that are shown beside a run's watched pictures; None if there is none."""
    path = folder / "samples" / run_folder.PHOTOGRAPHS
    return path if is_whole(path) and can_be_opened(path) else None


def can_be_opened(path):
    """Whether a picture's file can be opened; one that is too large cannot, and a line says so."""
    try:
        with opened(path):
            return True
    except UserError as error:
        say_once(printable(f"{error}; it is left out"))
        return False


@lru_cache(maxsize=2 * PICTURES)
def data_uri(path, written):
    """A picture's file as a data: URI. A small PNG stays as it is; other files become a JPEG. Raises OSError.

    `written` is the file's time. With it in the cache's key, a file that was written again is encoded again."""
    content = path.read_bytes()
    with opened(path) as picture:
        if len(content) <= SMALL and max(picture.size) <= WIDEST:
            return f"data:image/png;base64,{base64.b64encode(content).decode()}"
        picture = picture.convert("RGB")
    scale = min(1, WIDEST / max(picture.size), (LARGEST / (picture.width * picture.height)) ** 0.5)
    size = [max(1, round(side * scale)) for side in picture.size]
    jpeg = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(jpeg, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def tiles(run, file):
    """[x, y, width, height] of each picture in a grid that `save_grid` wrote, as fractions of the grid; [] without a
    file."""
    if file is None:
        return []
    with opened(file) as picture:
        width, height = picture.size
        found = places(picture, run.args["size"], len(run.prompts) or run.args["watch"])
    return [[x / width, y / height, w / width, h / height] for x, y, w, h in found]


# ------------------------------------------------------------------------------------------------------ page
def told(run, i):
    """The page's data of the i-th run, without its curves: a dict for JSON."""
    warned = curves.warnings(run)
    best = curves.best_step(run)
    last = max(warned, default=None)
    pace = curves.pace(run)
    landed = curves.landed(run)
    running = run.status == "running" and pace is not None and not landed
    return {"name": printable(run.name), "status": run.status, "step": run.step, "landed": landed,
            "steps": run.step if landed else run.args["steps"], "images": run.state.get("images"),
            "seconds": curves.seconds_of(run), "best": best,
            "left": pace * (run.args["steps"] - run.step) if running else None,
            "flags": run.flags, "prompts": [printable(text) for text in run.prompts],
            "tiles": tiles(run, next(iter(run.samples.values()), None)), "beside": tiles(run, run.photographs),
            "photographs": f"photographs-{i}", "pictures": {step: f"picture-{i}-{step}" for step in run.samples},
            "warnings": warned, "looked": max(curves.looks(run), default=0),
            "advice": advice(warned.get(last), {"step": run.step, "best_step": best}, run.args,
                             run.status == "running")}


def as_page(made):
    """The page's data of a `Table`: a dict for JSON."""
    rows = [["", *made.columns, "n"], *([printable(line.title), *line.cells, line.n] for line in made.lines)]
    return {"title": made.title, "settings": made.settings, "rows": rows}


def page(runs):
    """Yields the page's text in parts, with one picture in memory at a time. Raises OSError."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    head, tail = template.split("<!-- the report -->")
    between_looks = runs[0].args["watch_every"] * (curves.pace(runs[0]) or 0)
    report = {"runs": [told(run, i) for i, run in enumerate(runs)], "charts": curves.charts(runs),
              "numbers": [as_page(made) for made in curves.numbers(runs)], "written": time.time(),
              "between": between_looks, "differ": curves.flags_that_differ(runs) if len(runs) > 1 else []}
    text = json.dumps(report, allow_nan=False).replace("<", "\\u003c")  # so a prompt cannot close the <script>
    yield f"{head}{DATA}{text}</script>\n"
    for i, run in enumerate(runs):
        for step, path in run.samples.items():
            uri = data_uri(path, path.stat().st_mtime_ns)
            yield f'<script type="text/plain" id="picture-{i}-{step}">{uri}</script>\n'
        if run.photographs:
            uri = data_uri(run.photographs, run.photographs.stat().st_mtime_ns)
            yield f'<script type="text/plain" id="photographs-{i}">{uri}</script>\n'
    yield tail


def summary_of(folder):
    """The content of summary.json; {} if there is none. Raises UserError if it is damaged."""
    path = folder / "summary.json"
    found = read_json(path, dict, NO_SUMMARY) if path.exists() else {}
    if not all(fits(found.get(when), RESULTS) for when in ("before", "after")):
        raise UserError(f"{path}: {NO_SUMMARY}")
    return found


def write(folder, args, line_of_flags, status, state=None, prompts=()):
    """Write the page of a run into its folder.

    args: the flags, a dict. line_of_flags: the same as one line. status: one of a `Run`. state: the run's state, or
    None. prompts: those of the watched pictures, or ().

    It raises nothing: a page that cannot be written must not end the training. An error is printed once.
    """
    folder = Path(folder)
    try:
        write_whole(folder / PAGE, page([run_of(folder, args, line_of_flags, status, state, prompts)]))
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        say_once(f"{printable(folder / PAGE)}: cannot be written: {printable(why)}; training goes on")


def run_of(folder, args, line_of_flags, status, state=None, prompts=()):
    """The `Run` in a folder whose flags and state are known. The arguments are those of `write`. Raises UserError and
    OSError."""
    log = folder / "log.jsonl"
    lines = curves.read_log(log) if log.exists() else []
    summary = summary_of(folder) if status == "finished" else {}
    return Run(folder.resolve().name, args, line_of_flags, status, state or {}, list(prompts), lines,
               samples_of(folder, lines[-1]["step"] if lines else 0), summary, photographs_of(folder))


# -------------------------------------------------------------------------------------------- side by side
def earlier(path):
    """(line of flags, prompts) from a run's own page; ("", []) if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.startswith(DATA):
                    page = json.loads(line[len(DATA):].removesuffix("</script>\n"))
                    if fits(page, {"runs": [{"flags": str, "prompts": [str]}]}):
                        return page["runs"][0]["flags"], page["runs"][0]["prompts"]
    except (OSError, ValueError, LookupError, RecursionError):
        pass
    return "", []


def status_of(folder, args, lines):
    """"running" if another process holds the run's lock; "finished" if it has all updates and a summary; otherwise
    "stopped"."""
    try:
        run_folder.nobody_trains(folder)
    except UserError:
        return "running"
    done = lines[-1]["step"] == summary_of(folder).get("steps")
    return "finished" if done else "stopped"


def read_run(name, folder):
    """The `Run` in a folder. Raises UserError if the folder is not a run's, or its log is empty."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if run_folder.run_in(folder) is None or not (folder / "args.json").is_file():
        raise UserError(f"{folder}: not a run's folder: it has no {run_folder.MARK} or no args.json; give --out of a "
                        "run of train.py")
    args = resume.own_flags(folder / "args.json", command.parser(), recipe.GROUPS)
    log = folder / "log.jsonl"
    lines = curves.read_log(log) if log.is_file() else []
    if not lines:
        raise UserError(f"{log}: holds no update yet")
    state = {}
    for newest in run_folder.finished(folder)[-1:]:
        try:
            state = checkpoint.state_of(newest)
        except checkpoint.Damaged:
            pass
        if not fits(state, STATE):  # the page can be written without the state
            state = {}
    status = status_of(folder, args, lines)
    summary = summary_of(folder) if status == "finished" else {}
    flags, prompts = earlier(folder / PAGE)
    return Run(name or folder.resolve().name, args, flags, status, state, prompts, lines,
               samples_of(folder, lines[-1]["step"]), summary, photographs_of(folder))


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN",
                        help="folders of runs; without NAME= a run is named after its folder")
    parser.add_argument("--out", type=some_path, default=PAGE, help="file of the page")
    with frame("report"):
        args = parser.parse_args(argv)
        check_outputs([(args.out, MARK, "a report")], [], overwrite=True)
        of_one = Path(args.out).name == PAGE and run_folder.run_in(Path(args.out).parent) is not None
        folders = [Path(named_path(item)[1]).resolve() for item in args.runs]
        if of_one and folders != [Path(args.out).resolve().parent]:
            raise UserError(f"--out {args.out}: is the page of that run alone; give another name")
        runs = [read_run(*named_path(item)) for item in args.runs]
        names = [run.name for run in runs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f'two runs are called "{name}"; give each its own name: NAME=RUN')
        write_whole(args.out, page(runs))
        print(table_formats.for_the_terminal(curves.numbers(runs)) + "\n")
        print(f"{printable(args.out)}: {len(runs)} run{'s' * (len(runs) > 1)}, "
              f"{Path(args.out).stat().st_size / 1e6:.1f} MB")


