"""How a bench and its contestants talk: a line on stdin asks for a step, a line on stdout answers with JSON.

It imports nothing but the standard library, since contestants live in environments of their own. Whatever libraries
print goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Server:
    """The contestant's end. ``wait`` returns when the next step is asked for; it ends the process when none is."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # from here on, print and C code write to stderr

    def wait(self) -> None:
        """Block until the bench asks for a step."""
        if not sys.stdin.readline():
            self._answers.close()
            os._exit(0)

    def answer(self, **message: Any) -> None:
        """Send one JSON object."""
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


class Contestant:
    """The bench's end: a process that does one step whenever it is asked to.

    Raises RuntimeError with the end of what the process printed where it ends early.
    """

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.ready = self._read()

    def step(self) -> Mapping[str, Any]:
        """Ask for a step; what the contestant says about it."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Nothing more is asked for; the process ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(f"a contestant ended early:\n{self.log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer
