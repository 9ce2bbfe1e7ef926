"""The folder of a run: its lock, the files in it, and the checkpoints to resume from.

    run.json            marks the folder as a run's: the run's id, and the commit, libraries and devices that made it
    args.json           every flag
    log.jsonl           a line an update, flat: pandas.read_json(path, lines=True) reads it
    samples/            the watched pictures, step_NNNNN.png; photographs.png: those of --images that are held out
    checkpoints/        what --resume needs
    report.html         the run on one page
    weights/            the weights after the last update: full, or a LoRA; README.md is their model card
    weights_best/       the weights with the largest SGP gap among those without a drift warning
    summary.json        written at the end: the number of updates, and the results
    table.csv, .tex     the results of the run as tables
    before_after.png    the watched pictures before and after training
    explain.png         --explain's picture of one update
    tensorboard/        TensorBoard's files, with --tensorboard; wandb/ likewise, which stays with --overwrite
"""

import errno
import json
import re
import secrets
import weakref
from contextlib import contextmanager
from pathlib import Path

from engine.command_line import SAVE_AS
from engine.errors import DISK_FAILS, UserError, printable
from engine.files import (
    PNG_MARK,
    append,
    is_ours,
    must_be_ours,
    must_be_writable,
    must_not_lead_away,
    read_json,
    remove_leftovers,
    write_json,
    write_whole,
)
from engine.run import boards, checkpoint, log

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# All files that a run makes besides its checkpoints. --overwrite removes these and the checkpoints, and no other file.
CARD = "README.md"
CARD_MARK = b"<!-- written by train.py; it is written again unless this line is removed -->"
WEIGHTS = (CARD, "before_after.png", "config.json", "diffusion_pytorch_model.safetensors",
           "pytorch_lora_weights.safetensors", *[f"{name}.safetensors" for name in SAVE_AS])
MARK = "run.json"
LOCK = ".lock"
EXPLAINED = "explain.png"
PHOTOGRAPHS = "photographs.png"
MADE = ("args.json", "log.jsonl", "summary.json", "table.csv", "table.tex", "before_after.png", EXPLAINED,
        "report.html", *[f"weights/{name}" for name in WEIGHTS], *[f"weights_best/{name}" for name in WEIGHTS],
        "samples/step_*.png", f"samples/{PHOTOGRAPHS}", "tensorboard/events.out.tfevents.*")
SAMPLE = re.compile(rf"step_\d{{5,}}\.png|{PHOTOGRAPHS}")
STEPS = "checkpoints/step_" + 5 * "[0-9]"
FOLDERS = ("samples", "weights", "weights_best", "checkpoints", "tensorboard")


def run_in(out):
    """The id of the run that made a folder; None if it has no run.json. Raises UserError if that is damaged."""
    mark = Path(out) / MARK
    if not mark.exists():
        return None
    return read_json(mark, {"run": str}, "damaged, it has no run's id; give another --out")["run"]


def finished(out):
    """The finished checkpoints of the run in a folder, oldest first; [] if there is no run."""
    run = run_in(out)
    return [] if run is None else checkpoint.checkpoints(out, run)


@contextmanager
def as_mistakes(out):
    """Inside, an OSError becomes a UserError about --out, unless the disk is full or broken: that is no user's
    mistake."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FAILS:
            raise
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error


def lock(file, out):
    """Lock an open file until this process closes it. Returns False if its file system, or the machine, has no locks.
    Raises UserError if another process holds the lock."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--out {out}: another process is training there") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    return True


def nobody_trains(out):
    """Raise UserError if another process holds the lock of the run in a folder."""
    if (Path(out) / LOCK).is_file():
        with open(Path(out) / LOCK, "rb") as file:
            lock(file, out)


def may_explain(out):
    """The path of --explain's picture in a folder. Raises UserError if it cannot be written there: a file that
    --explain did not write stays, and so does the folder of a run that is being trained."""
    picture = Path(out) / EXPLAINED
    with as_mistakes(out):
        must_be_writable(out, "--out")
        nobody_trains(out)
        must_be_ours(picture, PNG_MARK, "a picture of --explain")
    return picture


class RunFolder:
    """The folder `out` of a run with the flags `args`, a dict. Raises UserError if the run may not use the folder.
    Before `open` nothing is written or removed, except the folder and the lock file that `take` makes.

    `checkpoints`: those to resume from, oldest first; [] if the run starts from the beginning.
    """

    def __init__(self, out, args):
        self.out = Path(out)
        self.args = json.loads(json.dumps(args))  # as they would be read from args.json
        self.boards = boards.asked(args)
        with as_mistakes(out):
            self.look()

    def look(self):
        """Find the run's id, and the checkpoints to resume from. Raises UserError."""
        self.checkpoints = []
        self.id = secrets.token_hex(8)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: cannot be written: Not a directory")
        folders = [*FOLDERS, f"checkpoints/{checkpoint.WRITING}"]
        must_not_lead_away(self.out, [LOCK, MARK, *MADE, *folders])
        for path in [path for name in (LOCK, MARK, *MADE) for path in self.out.glob(name)]:
            if path.is_dir():
                raise UserError(f"{path}: not a file; remove it, or give another --out")
        for folder in [path for name in (*folders, STEPS) for path in self.out.glob(name)]:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder}: not a folder; remove it, or give another --out")
        nobody_trains(self.out)
        self.marked = run_in(self.out)
        if self.marked is None:
            self.must_be_empty()
        elif self.args["resume"]:
            self.id = self.marked
        elif not self.args["overwrite"]:
            raise UserError(f"--out {self.out} already holds a run; --resume continues it, --overwrite "
                            "deletes it")
        self.found = {folder: checkpoint.owner_of(folder) for folder in checkpoint.all_checkpoints(self.out)}
        for folder, owner in self.found.items():
            if self.args["resume"] and checkpoint.is_of_an_earlier_version(folder):
                raise UserError(f"--resume: {folder} was written by an earlier version, in a format that is not read "
                                "here; finish the run with that version, or give another --out")
            if owner not in (self.marked, None):
                raise UserError(f"{folder} is another run's checkpoint; move it away, or give another --out")
        if self.marked is not None and self.args["resume"]:
            self.continues()

    def must_be_empty(self):
        """Raise UserError if the folder, which has no run.json, holds files: they may be a user's. What a run leaves
        before it writes run.json is none: its lock, --explain's picture, and a --cache inside the folder."""
        if not self.out.exists():
            return
        cache = Path(self.args.get("cache") or "/").resolve()
        inside = self.out.resolve()
        cache = cache.relative_to(inside).parts[:1] if cache.is_relative_to(inside) else ()
        theirs = [path.name for path in self.out.iterdir()
                  if path.name not in (LOCK, *cache) and not path.name.startswith(f".{MARK}.")
                  and not (path.name == EXPLAINED and is_ours(path, PNG_MARK))]
        if theirs:
            raise UserError(f"--out {self.out} is not a run's folder, and not empty: it holds "
                            f"{sorted(theirs)[0]}; give another --out")

    def continues(self):
        """Set the checkpoints to resume from; damaged ones are among them. Raises UserError if the newest is beyond
        --steps."""
        done = [folder for folder, owner in self.found.items() if owner is not None]
        self.checkpoints = list(self.found)
        if not done:
            return
        newest = checkpoint.state_of(done[-1])
        if newest["step"] > self.args["steps"]:
            raise UserError(f"--steps {self.args['steps']}: the run in {self.out} is past it, at "
                            f"{done[-1].name}; give more steps")

    def take(self):
        """Make the folder, and lock it until this process ends. Raises UserError."""
        with as_mistakes(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / LOCK, "a")
            weakref.finalize(self, self.lock.close)  # or at exit
            if not lock(self.lock, self.out):
                print(printable(f"--out {self.out}: its file system has no locks; make sure that no other process "
                                "trains there"))
            self.must_be_as_seen()

    def open(self, made_by=None):
        """Write run.json and args.json into the folder, after `take`. Half-written files that a kill left are removed;
        so are the files of an earlier run, which `look` allows only with --overwrite.

        made_by: what `made_by.now` returned, appended to the list in run.json. Raises UserError.
        """
        with as_mistakes(self.out):
            for pattern in (MARK, *MADE):
                place = self.out / pattern
                remove_leftovers(place.parent, [place.name])
            checkpoint.remove_unfinished(self.out)
            before = []
            if self.checkpoints:
                before = read_json(self.out / MARK).get("made_by", [])
                before = before if isinstance(before, list) else []
            else:
                self.clear()
            write_json(self.out / MARK, {"run": self.id, "made_by": [*before, made_by]})
            write_json(self.out / "args.json", self.args)
            (self.out / "samples").mkdir(exist_ok=True)
            for board in self.boards:
                board.begin(self.out, self.id, self.args)

    def must_be_as_seen(self):
        """Raise UserError if another process has changed the run or its checkpoints since `look`."""
        now = {folder: checkpoint.owner_of(folder) for folder in checkpoint.all_checkpoints(self.out)}
        if run_in(self.out) != self.marked or now != self.found:
            raise UserError(f"--out {self.out}: another process has trained there meanwhile; start again")

    def clear(self):
        """Remove the files of the run that made this folder, and no other file. run.json stays until a new one
        replaces it. So after a kill the folder is still known as a run's."""
        if self.marked is None:
            return
        inside = self.out.resolve()
        for folder, owner in self.found.items():
            if owner == self.marked:
                checkpoint.discard(folder)
        for pattern in MADE:
            for path in self.out.glob(pattern):
                theirs = (path.name == EXPLAINED and not is_ours(path, PNG_MARK)
                          or path.name == CARD and not is_ours(path, CARD_MARK)
                          or path.parent.name == "samples" and not SAMPLE.fullmatch(path.name))
                if path.is_file() and not theirs and inside in path.resolve().parents:
                    path.unlink()
        for name in FOLDERS:
            folder = self.out / name
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                try:
                    folder.rmdir()
                except OSError:  # a mount point cannot be removed, and stays
                    pass

    def go_on_from(self, state):
        """Cut the log, and remove checkpoints, to what they were when the checkpoint with this state was written."""
        self.log_until(state["step"] - (state["unlogged"] is not None))
        checkpoint.prune(self.out, state, self.args["keep"])

    def log_until(self, step):
        """Remove the lines of the log after a step: these updates are computed again. A line that a kill truncated is
        removed too. If a line before is missing, a line says so."""
        path = self.out / "log.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = {}
        for line in lines:
            try:
                number = json.loads(line)["step"]
                if number <= step:
                    kept[number] = line + b"\n"
            except (ValueError, TypeError, LookupError, RecursionError):
                pass
        missing = sorted(set(range(1, step + 1)) - kept.keys())
        if missing:
            more = f", and {len(missing) - 1} more," if len(missing) > 1 else ""
            print(printable(f"--resume: {path} has lost the line of step {missing[0]}{more} of {step}; the run goes on "
                            "without it"))
        write_whole(path, b"".join(kept.values()))

    def log(self, line):
        """Append a line, a dict, to log.jsonl; and its numbers to the boards."""
        append(self.out / "log.jsonl", json.dumps(log.flat(line)) + "\n")
        self.show(line["step"], line)

    def show(self, step, line, **pictures):
        """Show numbers, as a line of the log, and {name: file} of pictures on --tensorboard and --wandb."""
        for board in self.boards:
            board.numbers(step, line)
            for name, path in pictures.items():
                board.picture(step, name.replace("_", " "), path)
