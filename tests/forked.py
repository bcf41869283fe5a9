"""Recipes as processes of their own that cost a second: one parent imports everything once and forks for each run."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tests.launch import ROOT, Finished, environment_of_tests

RECIPE = ROOT / "recipes/ppo.py"


class RecipeProcesses:
    """Runs ``recipes/ppo.py`` as one plain process for each call of ``run``."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output.txt"
        self.parent = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=ROOT,
            env=environment_of_tests(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, *arguments: str, seconds: int = 60, before: str = "", environment: dict[str, str] | None = None
    ) -> Finished:
        """The recipe with these command-line ``arguments``, after ``before``, Python code that spoils or observes."""
        job = {
            "arguments": arguments,
            "seconds": seconds,
            "before": before,
            "environment": environment or {},
            "output": str(self.output),
        }
        assert self.parent.stdin is not None and self.parent.stdout is not None
        self.parent.stdin.write(json.dumps(job) + "\n")
        self.parent.stdin.flush()
        return Finished(int(self.parent.stdout.readline()), self.output.read_text())

    def close(self) -> None:
        """The parent ends when it has nothing more to read."""
        self.parent.communicate(timeout=30)


def serve() -> dict[str, Any] | None:
    """Fork for each job on stdin and answer with its exit status. Returns the job in the child, None in the parent."""
    import rlhf_toolkit.trainers.ppo_run  # noqa: F401  what costs seconds, before the first fork

    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            return job
        print(_wait(child, job["seconds"]), flush=True)
    return None


def become(job: dict[str, Any]) -> None:
    """Turn this process into the recipe. It ends as Python would end it, without taking down what the parent built."""
    os.setsid()
    atexit._clear()  # what the parent has registered, such as removing wandb's temporary folder, is the parent's to do
    for target, path, mode in ((0, os.devnull, os.O_RDONLY), (1, job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(path, mode, 0o600), target)
    os.dup2(1, 2)
    os.environ.update(job["environment"])
    sys.argv = [str(RECIPE), *job["arguments"]]
    status = 0
    try:
        exec(job["before"], {})
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _wait(child: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -9


if __name__ == "__main__":
    given = serve()
    if given is not None:
        become(given)
