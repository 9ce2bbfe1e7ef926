"""Shared by the tests: one thread (tiny tensors are slower on two), and a flags object with the defaults."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture
def flags(monkeypatch):
    """flags("--form", "srp") -> the namespace that train.py would use, for the miniature's folder layout or not."""
    import train

    def parse(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        return train.flags().parse_args(list(argv))
    return parse
