"""What this machine has, as far as it shows without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DEVICES = Path("/dev")
SECONDS = 20
"""What nvidia-smi may take on a machine whose driver sleeps."""


def gpus(environment: Mapping[str, str] = os.environ) -> int:
    """The GPUs that a run here may use: those of ``CUDA_VISIBLE_DEVICES``, or all that the driver lists; none for a
    torch that is built for CPUs."""
    if is_for_cpus(torch_version()):
        return 0
    count, visible = listed_by_driver(), environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    names = [name.strip() for name in visible.split(",")]
    wrong = [name in ("", "-1") or (name.isdecimal() and int(name) >= count) for name in names]
    return min(count, [*wrong, True].index(True))  # CUDA reads no further than the first that is no GPU


def torch_version() -> str:
    """The version of the installed torch, which is not imported; empty where there is none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def is_for_cpus(torch: str) -> bool:
    """Whether a version of torch is a build without CUDA, by its local part."""
    return not torch or torch.endswith("+cpu")


def listed_by_driver() -> int:
    """The GPUs that ``nvidia-smi -L`` lists, 0 where it does not answer; where it is not there, as in a container that
    was not given it, those that the system has devices of."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return len(list(DEVICES.glob("nvidia[0-9]*")))
    try:
        found = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in found.stdout.splitlines()) if found.returncode == 0 else 0
