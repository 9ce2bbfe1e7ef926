"""Scripts in processes of their own, one or the ranks of a world, as a shell or torchrun starts them; but
forked from a server that has imported the project once: importing torch takes longer than what is tested."""

import multiprocessing
import os
import runpy
import socket
import sys
import threading
from pathlib import Path

from tqdm import tqdm

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])  # it has no other path than the folder it starts in


def _run(argv, environment, printed, folder):
    """In the new process: the script, or -m and a module, with what it prints in a file."""
    tqdm.set_lock(threading.RLock())  # forks share the other: who is killed holding it stops all that follow
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = argv
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def places(ranks):
    """What torchrun tells each of its processes: a list of environments; ranks 0 is without torchrun."""
    if ranks == 0:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]),
                 "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def start(printed, *argv, ranks=0, folder="."):
    """Start a script with its arguments in a folder; ranks 0 is without torchrun. A list of processes."""
    processes = [SERVER.Process(target=_run, args=([str(a) for a in argv], place, str(printed), folder))
                 for place in places(ranks)]
    for process in processes:
        process.start()
    return processes


def call(printed, *argv, ranks=0, status=0, folder="."):
    """Run a script to its end; all its processes exit with `status`. Returns what they printed."""
    processes = start(printed, *argv, ranks=ranks, folder=folder)
    for process in processes:
        process.join()
    text = Path(printed).read_text() if Path(printed).exists() else ""
    assert [p.exitcode for p in processes] == [status] * len(processes), text[-6000:]
    return text
