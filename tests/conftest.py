"""Shared by the tests: one thread (tiny tensors are slower on two), and a flags object with the defaults."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

import flux  # noqa: E402
import train  # noqa: E402

os.chdir(Path(__file__).resolve().parent.parent)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def miniature():
    """The miniature, loaded as train.py loads any model."""
    return flux.load("miniature")


@pytest.fixture
def flags():
    """flags("--form", "srp") -> the namespace that train.py has with these flags and the released
    defaults."""
    def parsed(*argv):
        return train.parser().parse_args(argv)
    return parsed
