"""Shared by the tests: one thread (tiny tensors are slower on two), no GPU, and a flags object with the defaults."""

import os
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the claims are about a CPU; CUDA is rehearsed in processes of its own

import pytest  # noqa: E402
import torch  # noqa: E402

import command
import flow  # noqa: E402
from engine.model.folder import Model

# Tests that run in the background inherit ignored signals, and train.py leaves what is ignored ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.chdir(Path(__file__).resolve().parent.parent)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def miniature():
    """The miniature, loaded as train.py loads any model."""
    return flow.load(Model("miniature"))


@pytest.fixture
def flags():
    """flags("--form", "srp") -> the namespace that train.py has with these flags and the released
    defaults."""
    def parsed(*argv):
        return command.parser().parse_args(argv)
    return parsed
