"""Shared by the tests: one thread (tiny tensors are slower on two), and a flags object with the defaults."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def miniature():
    """The miniature, loaded as train.py loads any model."""
    import flux
    return flux.load("miniature")


@pytest.fixture
def flags():
    """flags("--form", "srp") -> the namespace that train.py has with these flags and the released
    defaults."""
    from engine import old_flags as room
    return lambda *argv: room.parser("").parse_args(argv)
