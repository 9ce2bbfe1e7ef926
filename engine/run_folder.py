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
from pathlib import Path

from engine import checkpoint
from engine.errors import UserError
from engine.files import read_json, write_json, write_whole

# All that a run makes, and so all that --overwrite removes.
MADE = ("run.json", "args.json", "log.jsonl", "summary.json", "before_after.png", "explain.png",
        "samples/step_*.png", "weights/*.json", "weights/*.safetensors", "weights_best/*.json",
        "weights_best/*.safetensors", "checkpoints/step_*/*", "checkpoints/.writing/*",
        "tensorboard/events.out.tfevents.*")

# Flags that --resume may change: they change no weight.
FREE = ("steps", "resume", "overwrite", "explain", "plan", "out", "save_every", "keep", "replicas", "batch",
        "accumulate", "checkpointing", "compile", "tensorboard", "world_size", "card", "share")


def finished(out):
    """The finished checkpoints of the run in a folder, oldest first; none if no run is there."""
    mark = Path(out) / "run.json"
    return checkpoint.checkpoints(out, read_json(mark)["run"]) if mark.exists() else []


class RunFolder:
    """The folder `out` of a run with the flags `args` (a dict). Raises UserError if the run may not go there;
    nothing is written or removed before `open`.

    `checkpoint` is the folder of the checkpoint to go on from, None where the run starts from the beginning.
    """

    def __init__(self, out, args):
        self.out = Path(out)
        self.args = json.loads(json.dumps(args))  # as a file would give it back
        self.checkpoint = None
        self.lock = None
        self.id = secrets.token_hex(8)
        marked = (self.out / "run.json").exists()
        if args["resume"] and marked:
            self.id = read_json(self.out / "run.json")["run"]
            self.continues()
        elif args["resume"] and self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"--resume: {out} is not a run's folder, and not empty; give the run's --out")
        elif marked and not args["overwrite"]:
            raise UserError(f"--out {out} already holds a run; --resume continues it, --overwrite deletes it")

    def continues(self):
        """Find the checkpoint to go on from. Raises UserError if the run in the folder is another one."""
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
        self.checkpoint = done[-1]

    def open(self):
        """Make the folder, lock it for as long as this process lives, and write args.json. What an earlier
        run left is removed first if --overwrite allows it. Raises UserError."""
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"--out {self.out}: another process is training there") from error
            if self.checkpoint is None:
                self.clear()
                (self.out / "samples").mkdir(exist_ok=True)
                write_json(self.out / "run.json", {"run": self.id})
            write_json(self.out / "args.json", self.args)
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written: {error.strerror}") from error

    def clear(self):
        """Remove what a run made here, and no other file."""
        for pattern in MADE:
            for path in self.out.glob(pattern):
                if path.is_file() and not path.is_symlink():
                    path.unlink()
        folders = [path for path in self.out.rglob("*") if path.is_dir() and not path.is_symlink()]
        for folder in sorted(folders, reverse=True):  # the inner ones first
            if not any(folder.iterdir()):
                folder.rmdir()

    def log_until(self, step):
        """Cut the log after a step: what a killed run logged beyond its checkpoint is computed again."""
        path = self.out / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
        write_whole(path, "".join(kept))

    def log(self, line):
        """Append a line, a dict, to log.jsonl."""
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
