"""What this process's main thread is doing, seen from another thread: whether it moves, waits for others, and where.

``faulthandler`` reads the stack and makes no objects of frames. A frame that another thread holds outlives its call,
and so does what is in it: guards of torch, among others, which would undo in that thread what they did in this one.
"""

from __future__ import annotations

import faulthandler
import os
import re
import tempfile
import threading
import time
from typing import NamedTuple

IN_COLLECTIVE = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/torch.py")
"""Ends of the names of files in which a rank waits for the others."""
WAITING = ("wait", "synchronize")
"""Functions of DeepSpeed in which a rank waits for a collective that it has begun before."""
FOR_REWARDS = "concurrent/futures/_base.py"
"""Where a rank waits for a worker or a server, which have time limits of their own."""
CALL = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?+) in (?P<name>.*)$', flags=re.MULTILINE)
PHASES = {
    "on_save": "saving",
    "write_checkpoint": "saving",
    "save_model": "saving",
    "evaluate": "the evaluation",
    "collect": "the rollout",
    "training_step": "the update",
    "load_model": "loading",
    "load_data": "loading",
    "make_trainer": "loading",
}
"""Functions of the toolkit, and what the run does while one of them is under way."""


class Call(NamedTuple):
    """A function that the main thread is in, and the line it is at."""

    file: str
    line: str
    name: str


class Position(NamedTuple):
    """Where the main thread is. ``seconds`` since it last moved; ``stack`` is its calls, innermost first."""

    seconds: float
    waits: bool
    phase: str
    place: str
    stack: str


class MainThread:
    """Looks at the main thread again and again. It has moved when a line of its stack is another."""

    def __init__(self) -> None:
        self._title = f"Thread 0x{threading.main_thread().ident or 0:016x}"
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self._before = ""
        self._moved = time.monotonic()

    def look(self) -> Position:
        """Where it is now."""
        stack = self._stack()
        calls = [Call(**match.groupdict()) for match in CALL.finditer(stack)]
        if stack != self._before or any(call.file.endswith(FOR_REWARDS) for call in calls):
            self._before, self._moved = stack, time.monotonic()
        ours = [call for call in calls if f"{os.sep}rlhf_toolkit{os.sep}" in call.file]
        return Position(
            time.monotonic() - self._moved,
            any(map(_waits, calls[:6])),
            next((PHASES[call.name] for call in ours if call.name in PHASES), "the start"),
            next(map(_place, ours), "nowhere"),
            stack,
        )

    def _stack(self) -> str:
        self._file.seek(0)
        self._file.truncate()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.seek(0)
        threads = self._file.read().decode(errors="replace").split("\n\n")
        return next((each for each in threads if self._title in each.partition("\n")[0]), "")


def _waits(call: Call) -> bool:
    in_deepspeed = f"{os.sep}deepspeed{os.sep}" in call.file and call.name in WAITING
    return in_deepspeed or call.file.endswith(IN_COLLECTIVE)


def _place(call: Call) -> str:
    file = call.file.rpartition(f"{os.sep}rlhf_toolkit{os.sep}")[2]
    return f"{call.name} ({file}:{call.line})"
