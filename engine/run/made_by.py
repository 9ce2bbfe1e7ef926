"""What made a run: the commit of this code, whether its files were changed since, the libraries and the devices."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "peft", "safetensors")


def now(world):
    """{"commit", "changed", "python", "libraries", "devices"} of a `parallel.World`. commit: None if the code is not in
    a git checkout; changed: whether tracked files differ from the commit; devices: one name a process."""
    devices = world.gather(name_of(world.device))
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
            "python": platform.python_version(), "libraries": {name: version(name) for name in LIBRARIES},
            "devices": devices}


def name_of(device):
    """The name of a device: of the GPU, or of the machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def git(*arguments):
    """The output of a git command on this code; None if it is empty, git fails, or git is not installed."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
