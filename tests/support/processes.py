"""Commands with a hard time limit, in an environment without network and without GPU."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    output: str

    def succeeded(self) -> Finished:
        """Fail the test with the output unless the command succeeded."""
        assert self.status == 0, self.output[-6000:]
        return self


def run(command: list[str], *, seconds: int | None, **environment: str) -> Finished:
    """Run a command in a process group of its own; kill the whole group at the time limit (None: there is none)."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment_of_tests(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return Finished(process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        return Finished(-9, f"{output}\n--- killed after {seconds} s ---")


def environment_of_tests() -> dict[str, str]:
    """No network, no GPU, one thread."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
