"""What made a run: the commit of this code and whether files of it were changed, the libraries, the devices."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "peft", "safetensors")


def now(world):
    """{"commit", "changed", "python", "libraries", "devices"} of a `parallel.World`. The commit is None where the code
    is no git checkout; changed: whether tracked files differ from it."""
    devices = world.gather(name_of(world.device))
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
            "python": platform.python_version(), "libraries": {name: version(name) for name in LIBRARIES},
            "devices": devices}


def name_of(device):
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def git(*arguments):
    """What git says of this code; None if it says nothing, or is not there."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
