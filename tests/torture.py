"""What interruptions do to a run: by hand, and with small counts by `pytest -m slow`.

    python tests/torture.py kills --stride 1       SIGKILL at every event in the run's folder, then --resume
    python tests/torture.py disks --sizes 60       file systems of 60 sizes, from 100 KB to more than enough
    python tests/torture.py signals --times 40     SIGTERM, SIGINT and SIGHUP at 40 moments of each script

kills: train.py is started, resumed, or started over an older run, and kills itself at its k-th file event
(open, mkdir, rename, remove, rmdir, truncate), just before it or some milliseconds after it, in the middle of
what it writes; every stride-th k. The same command with --resume then goes on to the end.

disks: train.py, a resumed train.py, sample.py and evaluate.py write to a tmpfs that is too small (it takes
root, or the right to mount in a namespace of one's own). One line, exit status 1, nothing half written; then
there is room, and the same command goes on to the end.

signals: at random moments from the first to the last, one process and two; one line, exit status 0. The same
command goes on to the end. Then nohup, a second signal, and a terminal that is closed.

The end must always be that of a run that nothing interrupted: the same files, and in them the same bytes, but
for what clocks and memory gave. Every failure is printed; the exit status is 1 if there was one.

All scripts run in processes forked from this one, which has been through a run and holds what it imports: a
run then takes one or two seconds.
"""

import argparse
import faulthandler
import io
import json
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from scripts import _run, places  # noqa: E402
from tqdm import tqdm  # noqa: E402

import evaluate  # noqa: E402, F401
import train  # noqa: E402
from engine import stopping  # noqa: E402

FORK = multiprocessing.get_context("fork")
TINY = ["--model", "miniature", "--global-batch", "2", "--rollout-steps", "1", "--eval-steps", "1", "--watch", "1",
        "--watch-every", "1", "--save-every", "1", "--keep", "1"]
MEASURED = ("timestamp", "seconds_", "images_per_", "tflop_", "share_", "peak_")  # readings of clocks and memory
WAIT = 120  # seconds, after which a process counts as one that never ends
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


# ------------------------------------------------------------------------------------------------- processes
class Hook:
    """Counts the events that change something under a folder, in the process that installs it, and ends that
    at the k-th (None: never): just before it, or `delay` seconds later."""

    def __init__(self, folder, k=None, delay=0.0, report=None):
        self.folder = str(folder)
        self.k = k
        self.delay = delay
        self.report = report
        self.seen = 0

    def __call__(self, event, arguments):
        if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        if not os.fspath(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if self.report is not None:
            with os.fdopen(os.dup(self.report), "a") as file:
                file.write(f"{event} {os.path.basename(arguments[0])}\n")
        if self.seen == self.k:
            if not self.delay:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process wherever it is, as SIGKILL does
            signal.setitimer(signal.ITIMER_REAL, self.delay)
        self.seen += 1


def where_it_is(asked):
    """Let a process write down in which function it is when it is asked to stop."""
    def ask(self, number, frame):
        if self.asked is None:
            names = [entry.name for entry in traceback.extract_stack(frame)]
            Path(asked).write_text(" ".join(names))
        original(self, number, frame)
    original = stopping.Stopping.ask
    stopping.Stopping.ask = ask


def _child(argv, environment, printed, hook, asked, ignored):
    """In the new process: what is to be done to it, then the script. One that never ends says where it is."""
    os.setsid()
    faulthandler.dump_traceback_later(WAIT - 20, file=sys.__stderr__)
    for number in stopping.ASKS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if hook is not None:
        sys.addaudithook(hook)
    if asked is not None:
        where_it_is(asked)
    _run(argv, environment, printed, str(HERE.parent))


class Script:
    """A script with its arguments, started: one process, or the ranks of a world."""

    def __init__(self, argv, ranks=0, hook=None, asked=None, ignored=()):
        self.printed = tempfile.mktemp(prefix="printed", dir=ROOM)
        argv = [str(word) for word in argv]
        self.processes = [FORK.Process(target=_child, args=(argv, place, self.printed, hook, asked, ignored))
                          for place in places(ranks)]
        for process in self.processes:
            process.start()

    def end(self):
        """Wait for its end: the exit statuses."""
        limit = time.monotonic() + WAIT
        for process in self.processes:
            process.join(max(0, limit - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def said(self):
        """All that it printed."""
        path = Path(self.printed)
        return path.read_text(errors="replace") if path.exists() else ""

    def lines(self):
        """The lines with which it ended."""
        return [line for line in self.said().splitlines() if line.startswith(SCRIPTS)]


SCRIPTS = ("train.py: ", "sample.py: ", "evaluate.py: ")
STACK = ("Timeout", "Thread", "Current thread", "  File ")  # how faulthandler's lines begin
ROOM = None  # a folder for everything, made by main


def doing_nothing(tensor):
    """In place of torch.Tensor.backward."""


def warm_up():
    """Go through a run once, so that the processes forked from here find everything imported. Gradients are
    left out: torch refuses to compute any in a process whose parent has done so."""
    tqdm.monitor_interval = 0  # no thread
    torch.set_num_threads(1)
    sys.argv = ["train.py", *TINY, "--eval", "2", "--steps", "1", "--out", f"{ROOM}/warm"]
    backward = torch.Tensor.backward
    torch.Tensor.backward = doing_nothing
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            train.main()
    finally:
        torch.Tensor.backward = backward
    for number in stopping.ASKS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


# ------------------------------------------------------------------------------------------ what is the same
def content(path):
    """What must be the same in two files of one name, of two runs; None: they may differ."""
    if path.name == "log.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]
    if path.name == "results.json":
        return {k: v for k, v in json.loads(path.read_text()).items() if k != "args"}
    if path.name == "README.md":
        text = path.read_text().replace(f"{path.parent.parent.name}/weights", "RUN/weights")
        return re.sub(r"--out ('[^']*'|\S+)", "--out RUN", text)
    if "checkpoints" in path.parts or path.name in ("run.json", "args.json", "made.json", "report.html"):
        return None
    if "scores" in path.parts:
        return sorted(path.read_text().splitlines())
    return path.read_bytes()


def all_of(folder):
    """{path inside a folder: content} of all files."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(Path(folder).rglob("*"))
            if path.is_file()}


def differences(whole, other):
    """What is not the same in two folders, in words; an empty list if nothing."""
    a, b = all_of(whole), all_of(other)
    found = [f"{name} is missing" for name in a.keys() - b.keys()]
    found += [f"{name} is left over" for name in b.keys() - a.keys()]
    found += [f"{name} differs" for name in a.keys() & b.keys() if a[name] != b[name]]
    return sorted(found)


def half_written(folder):
    """The files and folders in a folder that are no end product."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob(".*") if path.name != ".lock")


class Tally:
    """Counts what was tried, and prints what failed."""

    def __init__(self):
        self.tried = Counter()
        self.failures = []

    def add(self, what, problems, said=""):
        self.tried[what.split(":")[0]] += 1
        if problems:
            self.failures.append(what)
            print(f"FAILED {what}: {'; '.join(map(str, problems))}", flush=True)
            for line in said.splitlines():
                if line.startswith((*SCRIPTS, *STACK)) or "rror" in line:
                    print(f"       {line[:300]}", flush=True)

    def show(self):
        for what, n in self.tried.items():
            print(f"{what}: {n}")
        print(f"{len(self.failures)} failures")
        return bool(self.failures)


def must_end(argv, status=0, ranks=0):
    """Run a script to its end; complain about any other exit status."""
    script = Script(argv, ranks)
    statuses = script.end()
    problems = [] if set(statuses) == {status} else [f"exit {statuses}, not {status}"]
    return problems, script.said()


def prepared(argv, ranks=0):
    """Run a script that nothing interrupts, to compare others with."""
    problems, said = must_end(argv, ranks=ranks)
    if problems:
        sys.exit(f"{' '.join(map(str, argv))}: {problems[0]}\n{said}")


# ----------------------------------------------------------------------------------------------------- kills
def kills(arguments, tally):
    """See the top of this file."""
    flags = ["train.py", *TINY, "--eval", "2", "--steps", arguments.steps]
    whole = ROOM / "whole"
    prepared([*flags, "--out", whole])
    begun = ROOM / "begun"  # a run that was stopped after its first update
    prepared(["train.py", *TINY, "--eval", "2", "--steps", "1", "--out", begun])
    older = ROOM / "older"  # another run, with files of its user
    prepared([*flags, "--seed", "5", "--out", older])
    keepsakes = ["samples/notes.txt", "weights/notes.txt", "checkpoints/notes.txt", "thesis.tex"]
    for name in keepsakes:
        (older / name).write_text("mine")

    cases = {"start": (None, []), "--resume": (begun, ["--resume"]), "--overwrite": (older, ["--overwrite"])}
    for name, (before, mode) in cases.items():
        def prepare(out, before=before):
            shutil.rmtree(out, ignore_errors=True)
            if before is not None:
                shutil.copytree(before, out)
        out = ROOM / "run"
        prepare(out)
        with tempfile.TemporaryFile() as report:
            Script([*flags, "--out", out, *mode], hook=Hook(out, report=report.fileno())).end()
            report.seek(0)
            events = report.read().decode().splitlines()
        print(f"{name}: {len(events)} events, of {len(set(events))} kinds", flush=True)
        for delay in arguments.delays:
            for k in range(arguments.first, len(events), arguments.stride):
                prepare(out)
                killed = Script([*flags, "--out", out, *mode], hook=Hook(out, k, delay)).end()
                problems = []
                if not delay and killed != [-signal.SIGKILL]:
                    problems.append(f"not killed: {killed}")
                if before is older and (out / "run.json").read_bytes() == (older / "run.json").read_bytes():
                    again = ["--overwrite"]  # nothing of the new run is there yet
                else:
                    again = ["--resume"]
                more, said = must_end([*flags, "--out", out, *again])
                problems += more
                if before is older:
                    problems += [f"{kept} is gone" for kept in keepsakes if not (out / kept).exists()]
                    for kept in keepsakes:
                        (out / kept).unlink(missing_ok=True)
                problems += differences(whole, out) + half_written(out)
                what = f"kills, {name}, {delay * 1e3:.0f} ms after: event {k}, {events[k]}"
                tally.add(what, problems, said)


# ----------------------------------------------------------------------------------------------------- disks
def mounted(folder, size):
    """Mount a tmpfs of a size in KB, or give one that is mounted another size."""
    folder.mkdir(exist_ok=True)
    again = "remount," if os.path.ismount(folder) else ""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"{again}size={size}k", "tmpfs", str(folder)],
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"disks: a tmpfs cannot be mounted here: {done.stderr.strip()}")


def disks(arguments, tally):
    """See the top of this file."""
    begun = ROOM / "begun"
    prepared(["train.py", *TINY, "--eval", "2", "--steps", "1", "--out", begun])
    two_steps = ["train.py", *TINY, "--eval", "2", "--steps", "2"]
    commands = {
        "train.py": (None, [*two_steps, "--out"], ["--resume"]),
        "train.py --resume": (begun, [*two_steps, "--resume", "--out"], []),
        "sample.py": (None, ["sample.py", "--model", "miniature", "--eval-steps", "1", "--prompts",
                             "miniature/prompts_eval.txt", "--first", "24", "--batch", "4", "--out"], []),
        "evaluate.py": (None, ["evaluate.py", "--model", "miniature", "--eval-steps", "1", "--first", "24",
                               "--batch", "4", "--weights", "again=miniature/transformer", "--out"], [])}
    disk = ROOM / "disk"
    for name, (before, command, again) in commands.items():
        whole = ROOM / f"whole {name}"
        if before is not None:
            shutil.copytree(before, whole)
        prepared([*command, whole])
        kilobytes = sum(path.stat().st_size for path in whole.rglob("*")) // 1000
        least = 0 if before is None else sum(p.stat().st_size for p in before.rglob("*")) // 1000 + 200
        most = 2 * kilobytes + 1000  # a checkpoint stands beside the one before it
        n = arguments.sizes
        sizes = [100 + int((most - 100) * (i / n) ** 2) for i in range(n + 1)]
        statuses = Counter()
        for size in sizes:
            try:
                mounted(disk, size + least)
                out = disk / "out"
                if before is not None:
                    shutil.copytree(before, out)
                script = Script([*command, out])
                ended = script.end()
                statuses[ended[0]] += 1
                problems = [] if ended[0] in (0, 1) else [f"exit {ended}"]
                if ended[0] and len(script.lines()) != 1:
                    problems.append(f"{len(script.lines())} lines")
                if ended[0] and "No space left" not in script.said():
                    problems.append("the line does not say why")
                if "Traceback" in script.said():
                    problems.append("a traceback")
                problems += half_written(out)
                mounted(disk, most + least + 100_000)
                said = script.said()
                more, later = must_end([*command, out, *again])
                problems += more + differences(whole, out)
                tally.add(f"disks, {name}: {size} KB", problems, said + later)
            finally:
                subprocess.run(["umount", str(disk)], capture_output=True)
        print(f"{name}: exit statuses {dict(statuses)}, {sizes[0]} to {sizes[-1]} KB", flush=True)


# --------------------------------------------------------------------------------------------------- signals
PHASES = {"encoded": "encoding", "contact_sheet": "the table", "finish": "evaluation after",
          "evaluate": "evaluation before", "begin": "first look", "export": "export", "save": "checkpoint",
          "step": "watch in the loop",
          "train": "loop", "score": "scoring", "generate": "sampling", "sample": "sampling",
          "load_rewards": "loading", "load": "loading", "decide": "loading", "set_up": "loading"}


def phase_of(asked):
    """In which phase a process was asked to stop."""
    if not asked.exists():
        return "before or after"
    names = asked.read_text().split()
    for name, phase in PHASES.items():
        if name in names:
            return phase
    return "the rest"


def signals(arguments, tally):
    """See the top of this file."""
    train_flags = ["train.py", *TINY, "--watch", "4", "--eval", "8", "--batch", "1", "--steps", "3",
                   "--save-every", "2", "--out"]
    commands = {
        "train.py": (0, train_flags, ["--resume"]),
        "train.py, 2 processes": (2, train_flags, ["--resume"]),
        "sample.py": (0, ["sample.py", "--model", "miniature", "--eval-steps", "6", "--prompts",
                          "miniature/prompts_eval.txt", "--first", "24", "--batch", "4", "--out"], []),
        "evaluate.py": (0, ["evaluate.py", "--model", "miniature", "--eval-steps", "4", "--first", "24",
                            "--batch", "4", "--weights", "again=miniature/transformer", "--out"], [])}
    commands["evaluate.py, 2 processes"] = (2, *commands["evaluate.py"][1:])
    phases = Counter()
    chance = random.Random(arguments.seed)
    slowest = 0.0
    for name, (ranks, command, again) in commands.items():
        whole = ROOM / f"whole {name}"
        began = time.monotonic()
        prepared([*command, whole], ranks)
        lasts = time.monotonic() - began
        for i in range(arguments.times):
            number = stopping.ASKS[i % len(stopping.ASKS)]
            out = ROOM / "run"
            asked = ROOM / "asked"
            shutil.rmtree(out, ignore_errors=True)
            asked.unlink(missing_ok=True)
            script = Script([*command, out], ranks, asked=asked)
            time.sleep(0.05 + chance.random() ** 2 * lasts)  # the phases of the beginning are short
            for process in script.processes:
                if process.is_alive():
                    os.kill(process.pid, number)
            sent = time.monotonic()
            statuses = script.end()
            took = time.monotonic() - sent
            slowest = max(slowest, took)
            phase = phase_of(asked)
            phases[f"{name}: {phase}"] += 1
            problems = []
            was_asked = asked.exists()
            wanted = {0} if ranks else {128 + number}
            if was_asked and set(statuses) != wanted and not finished_all(out):
                problems.append(f"exit {statuses}")
            stopped = [line for line in script.lines() if ": stopped" in line]
            if was_asked and len(script.lines()) != len(stopped) or len(stopped) > 1:
                problems.append(f"lines {script.lines()}")
            if was_asked and not stopped and not finished_all(out):
                problems.append("not a word")
            if took > arguments.patience:
                problems.append(f"took {took:.1f} s")
            if "Traceback" in script.said():
                problems.append("a traceback")
            problems += half_written(out) if was_asked and out.exists() else []
            more, later = must_end([*command, out, *again], ranks=ranks)
            problems += more + differences(whole, out)
            tally.add(f"signals, {name}: {signal.Signals(number).name} in {phase}, exit {statuses}", problems,
                      script.said() + later)
    for phase, n in sorted(phases.items()):
        print(f"{phase}: {n}")
    print(f"from the signal to the end: at most {slowest:.1f} s")
    others(train_flags, ROOM / "whole train.py", tally)


def finished_all(out):
    """Whether a script came to its very end."""
    return any((out / name).exists() for name in ("summary.json", "grid.png", "results.json"))


def others(command, whole, tally):
    """nohup, a second signal, one rank of two, and a terminal that is closed."""
    def after_the_first_step(out, script):
        while not (out / "log.jsonl").exists() and script.processes[0].is_alive():
            time.sleep(0.01)

    def fresh(name):
        out = ROOM / name
        shutil.rmtree(out, ignore_errors=True)
        return out

    out = fresh("nohup")
    script = Script([*command, out], ignored=[signal.SIGHUP])
    after_the_first_step(out, script)
    os.kill(script.processes[0].pid, signal.SIGHUP)
    statuses = script.end()
    problems = [] if statuses == [0] else [f"exit {statuses}"]
    tally.add("signals: SIGHUP under nohup", problems + differences(whole, out), script.said())

    out = fresh("twice")
    slow = [*command, out, "--global-batch", "128", "--batch", "16", "--rollout-steps", "25"]
    script = Script(slow)
    after_the_first_step(out, script)
    time.sleep(0.1)
    os.kill(script.processes[0].pid, signal.SIGTERM)
    time.sleep(stopping.ONE_REQUEST + 0.05)
    os.kill(script.processes[0].pid, signal.SIGTERM)
    sent = time.monotonic()
    statuses = script.end()
    took = time.monotonic() - sent
    fine = statuses == [128 + signal.SIGTERM] and took < 1
    tally.add("signals: twice", [] if fine else [f"exit {statuses}, {took:.1f} s"], script.said())

    for rank in (0, 1):
        out = fresh("one of two")
        script = Script([*command, out], ranks=2)
        after_the_first_step(out, script)
        os.kill(script.processes[rank].pid, signal.SIGTERM)
        statuses = script.end()
        problems = [] if statuses == [0, 0] and len(script.lines()) == 1 else [f"{statuses} {script.lines()}"]
        more, later = must_end([*command, out, "--resume"], ranks=2)
        tally.add(f"signals: to rank {rank} alone", problems + more + differences(
            ROOM / "whole train.py, 2 processes", out), script.said() + later)

    out = fresh("terminal")
    pid, master = pty.fork()
    if pid == 0:
        for number in stopping.ASKS:
            signal.signal(number, signal.SIG_DFL)
        status = 1
        try:
            sys.argv = ["train.py", *map(str, command[1:]), str(out)]
            os.chdir(HERE.parent)
            train.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            os._exit(status)
    while not (out / "log.jsonl").exists():
        os.read(master, 10000)
    os.close(master)  # the terminal is gone, and the kernel sends SIGHUP
    _, status = os.waitpid(pid, 0)
    problems = [] if os.waitstatus_to_exitcode(status) == 129 else [f"exit {os.waitstatus_to_exitcode(status)}"]
    problems += [] if list((out / "checkpoints").glob("step_*")) else ["nothing saved"]
    more, later = must_end([*command, out, "--resume"])
    tally.add("signals: a closed terminal", problems + more + differences(whole, out), later)


def main():
    global ROOM
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("what", nargs="+", choices=["kills", "disks", "signals"])
    add("--steps", type=int, default=2, help="kills: updates of a run")
    add("--stride", type=int, default=1, help="kills: every how manieth event")
    add("--first", type=int, default=0, help="kills: the first event")
    add("--delays", type=float, nargs="+", default=[0.0, 0.003], help="kills: seconds after the event")
    add("--sizes", type=int, default=40, help="disks: how many sizes")
    add("--times", type=int, default=30, help="signals: how many moments of each script")
    add("--patience", type=float, default=10.0, help="signals: seconds that a script may take to end")
    add("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as room:
        ROOM = Path(room)
        warm_up()
        for what in dict.fromkeys(arguments.what):
            ROOM = Path(room) / what
            ROOM.mkdir()
            {"kills": kills, "disks": disks, "signals": signals}[what](arguments, tally)
    sys.exit(tally.show())


if __name__ == "__main__":
    main()
