"""From a script's start until its libraries are loaded, which takes seconds: a signal ends it with one line, and a long
silence is explained."""

import os
import signal
import sys
import threading
import traceback
from functools import partial

# Windows has no SIGHUP.
ASKS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
SILENCE = 3  # seconds

waiting = []  # the timer of the line that explains the silence
before = {}   # the handlers that `loaded` puts back


def say(line):
    """Write a line to stdout, of rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        try:
            os.write(1, line.encode() + b"\n")
        except OSError:
            pass  # a closed terminal


def stop(script, number):
    """End the process, which a signal has asked for."""
    say(f"\n{script}: stopped before the start: there is nothing to save")
    os._exit(0 if "RANK" in os.environ else 128 + number)


def fail(script, kind, error, trace):
    """End the process in one line: a library cannot be imported."""
    *_, (frame, number) = traceback.walk_tb(trace)
    first = (str(error).strip().splitlines() or [""])[0]
    if os.environ.get("RANK", "0") == "0":
        print(f"{script}: a library cannot be loaded: {kind.__name__}: {first} ({frame.f_code.co_filename}:{number}); "
              "pip install -r requirements.txt, or correct the variable of the environment", file=sys.stderr)
    os._exit(2)


def open_streams():
    """Open /dev/null as each of stdin, stdout and stderr that the process was started without. Otherwise the next file
    that is opened takes the stream's number, and what is printed is written into that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def check_place(script):
    """End the process in one line where the libraries cannot be loaded: under python -OO, which takes the docstrings
    that transformers reads, and in a folder that has been deleted."""
    if sys.flags.optimize > 1:
        print(f"{script}: python -OO, or PYTHONOPTIMIZE=2: removes docstrings that transformers reads; leave it out",
              file=sys.stderr)
        sys.exit(2)
    try:
        os.getcwd()
    except OSError as error:
        print(f"{script}: the current folder cannot be read: {error.strerror}; cd to another one", file=sys.stderr)
        sys.exit(2)


def until_loaded(script):
    """From now on, and until `loaded`, SIGTERM, Ctrl-C and SIGHUP end the process with one line, and so does an import
    that fails. After SILENCE seconds a line says what takes so long. script: the name in these lines."""
    open_streams()
    check_place(script)
    loaded()
    sys.excepthook = partial(fail, script)
    for number in ASKS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, frame: stop(script, number))
    timer = threading.Timer(SILENCE, say, [f"{script}: loading torch, diffusers and transformers"])
    timer.daemon = True
    timer.start()
    waiting.append(timer)


def until_module_loaded():
    """`until_loaded` if this process is `python -m PACKAGE.NAME`, otherwise nothing. PACKAGE/__init__.py calls it."""
    if sys.argv[0] == "-m":
        until_loaded(sys.orig_argv[-len(sys.argv)].split(".")[-1])


def loaded():
    """The libraries are loaded: nothing more is said, and signals and errors do what they did before."""
    sys.excepthook = sys.__excepthook__
    while waiting:
        waiting.pop().cancel()
    while before:
        signal.signal(*before.popitem())
