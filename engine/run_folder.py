"""The folder of a run: who may write there, what a run leaves there, and where it goes on from.

    run.json        the mark of a folder that a run made, and the run's id
    args.json       every flag
    log.jsonl       a line an update
    samples/        the watched pictures
    checkpoints/    what --resume needs
    weights/, weights_best/, summary.json, before_after.png, explain.png, tensorboard/
"""

import fcntl
import json
import secrets
import shutil
from pathlib import Path

from engine import checkpoint
from engine.errors import UserError
from engine.files import read_json, write_json, write_whole

# All files that a run makes, but for its checkpoints, and so all that --overwrite removes.
WEIGHTS = ("config.json", "diffusion_pytorch_model.safetensors")
MADE = ("args.json", "log.jsonl", "summary.json", "before_after.png", "explain.png",
        *[f"weights/{name}" for name in WEIGHTS], *[f"weights_best/{name}" for name in WEIGHTS],
        "samples/step_*.png", "tensorboard/events.out.tfevents.*")
FOLDERS = ("samples", "weights", "weights_best", "checkpoints", "tensorboard")

# Flags that --resume may change: no weight depends on them, or their files are compared by content.
FREE = ("steps", "resume", "overwrite", "explain", "plan", "out", "save_every", "keep", "replicas", "batch",
        "accumulate", "checkpointing", "compile", "tensorboard", "world_size", "card", "share",
        "model", "prompts", "eval_prompts", "reward")


def run_in(out):
    """The id of the run that made a folder; None if no run did. Raises UserError for a damaged mark."""
    mark = Path(out) / "run.json"
    if not mark.exists():
        return None
    found = read_json(mark)
    if not isinstance(found, dict) or not isinstance(found.get("run"), str):
        raise UserError(f"{mark}: not the mark of a run; give another --out")
    return found["run"]


def finished(out):
    """The finished checkpoints of the run in a folder, oldest first; none if no run is there."""
    run = run_in(out)
    return [] if run is None else checkpoint.checkpoints(out, run)


class RunFolder:
    """The folder `out` of a run with the flags `args` (a dict). Raises UserError if the run may not go there;
    nothing is written or removed before `open`.

    `checkpoints` are those to go on from, oldest first; there are none where a run starts from the beginning.
    """

    def __init__(self, out, args):
        self.out = Path(out)
        self.args = json.loads(json.dumps(args))  # as a file would give it back
        self.checkpoints = []
        self.id = secrets.token_hex(8)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {out}: cannot be written: Not a directory")
        marked = run_in(self.out)
        if marked is None:
            self.must_be_empty()
        elif args["resume"]:
            self.id = marked
            self.continues()
        elif not args["overwrite"]:
            raise UserError(f"--out {out} already holds a run; --resume continues it, --overwrite deletes it")
        for folder in checkpoint.all_checkpoints(self.out):
            if checkpoint.owner_of(folder) not in (marked, None):
                raise UserError(f"{folder} is another run's checkpoint; move it away, or give another --out")

    def must_be_empty(self):
        """Raise UserError if the folder holds files, and no run made it: they are someone's."""
        if not self.out.exists():
            return
        theirs = [path.name for path in self.out.iterdir()
                  if path.name not in (".lock", "explain.png") and not path.name.startswith(".run.json.")]
        if theirs:
            raise UserError(f"--out {self.out} is not a run's folder, and not empty: it holds "
                            f"{sorted(theirs)[0]}; give another --out")

    def continues(self):
        """Find the checkpoints to go on from. Raises UserError if the run in the folder is another one."""
        done = finished(self.out)
        if not done:
            return
        then = read_json(self.out / "args.json")
        for name, now in self.args.items():
            if name not in FREE and now != then.get(name):
                raise UserError(f"--resume: the run in {self.out} has --{name.replace('_', '-')} "
                                f"{then.get(name)}, now {now}; give the same flags, or another --out")
        if checkpoint.step_of(done[-1]) > self.args["steps"]:
            raise UserError(f"--steps {self.args['steps']}: the run in {self.out} is past it, at "
                            f"{done[-1].name}; give more steps")
        self.checkpoints = done

    def open(self):
        """Make the folder, lock it for as long as this process lives, mark it and write args.json. What an
        earlier run left is removed first, if --overwrite allows it. Raises UserError."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"--out {self.out}: another process is training there") from error
            if not self.checkpoints:
                self.clear()
                write_json(self.out / "run.json", {"run": self.id})
            write_json(self.out / "args.json", self.args)
            (self.out / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written: {error.strerror}") from error

    def clear(self):
        """Remove what the run that marked this folder made, and no other file. Its mark goes last, so that
        a kill on the way leaves a folder that is still known as a run's."""
        marked = run_in(self.out)
        if marked is None:
            return
        inside = self.out.resolve()
        for folder in checkpoint.checkpoints(self.out, marked):
            checkpoint.discard(folder)
        for left in (self.out / "checkpoints").glob(".*"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        for pattern in MADE:
            for path in self.out.glob(pattern):
                is_ours = path.is_file() and not path.is_symlink() and inside in path.resolve().parents
                if is_ours:
                    path.unlink()
        for name in FOLDERS:
            folder = self.out / name
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        (self.out / "run.json").unlink()

    def log_until(self, step):
        """Cut the log after a step: what a killed run logged beyond its checkpoint is computed again. A line
        that the kill cut short is of that kind."""
        path = self.out / "log.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                pass
        write_whole(path, "".join(kept))

    def log(self, line):
        """Append a line, a dict, to log.jsonl."""
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
