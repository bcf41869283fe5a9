"""What this process's main thread is doing, seen from another thread: whether it moves, waits for others, and where.

A frame that another thread holds outlives its call, and so does what is in it: guards of torch, among others, which
would undo in that thread what they did in this one. So frames are looked at seldom, let go at once, and kept only of a
thread that stands still. (``faulthandler`` makes no frames, but reads threads that are just being made, and crashes.)
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from types import CodeType
from typing import NamedTuple

IN_COLLECTIVE = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/torch.py")
"""Ends of the names of files in which a rank waits for the others."""
WAITING = ("wait", "synchronize")
"""Functions of DeepSpeed in which a rank waits for a collective that it has begun before."""
FOR_REWARDS = "concurrent/futures/_base.py"
"""Where a rank waits for a worker or a server, which have time limits of their own."""
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
    """A function that the main thread is in: its code, the instruction and the line it is at."""

    code: CodeType
    instruction: int
    line: int | None


class Position(NamedTuple):
    """Where the main thread is. ``seconds`` since it last moved."""

    seconds: float
    waits: bool
    phase: str
    place: str


class MainThread:
    """Looks at the main thread every ``interval`` seconds. It has moved when its stack, down to the instruction, is
    another."""

    def __init__(self, *, interval: float) -> None:
        self.interval = interval
        self._ident = threading.main_thread().ident or 0
        self._calls: list[Call] = []
        self._looked = self._moved = time.monotonic()

    def look(self) -> Position:
        """Where it is now, or was when it was last looked at."""
        if time.monotonic() - self._looked >= self.interval:
            frame, calls = sys._current_frames().get(self._ident), list[Call]()
            while frame is not None:  # innermost first
                calls.append(Call(frame.f_code, frame.f_lasti, frame.f_lineno))
                frame = frame.f_back
            self._looked = time.monotonic()
            if calls != self._calls or any(call.code.co_filename.endswith(FOR_REWARDS) for call in calls):
                self._calls, self._moved = calls, time.monotonic()
        ours = [call for call in self._calls if f"{os.sep}rlhf_toolkit{os.sep}" in call.code.co_filename]
        waits = any(
            call.code.co_filename.endswith(IN_COLLECTIVE)
            or (f"{os.sep}deepspeed{os.sep}" in call.code.co_filename and call.code.co_name in WAITING)
            for call in self._calls[:6]
        )
        place = "nowhere"
        if ours:
            file = ours[0].code.co_filename.rpartition(f"{os.sep}rlhf_toolkit{os.sep}")[2]
            place = f"{ours[0].code.co_name} ({file}:{ours[0].line})"
        return Position(
            time.monotonic() - self._moved,
            waits,
            next((PHASES[call.code.co_name] for call in ours if call.code.co_name in PHASES), "the start"),
            place,
        )

    def rest(self) -> None:
        """Count from now on: this process was stopped, and with it the main thread."""
        self._moved = time.monotonic()

    def stack(self) -> str:
        """The lines of its stack, outermost first. Only where it stands still: reading the source takes a while."""
        frame = sys._current_frames().get(self._ident)
        return "" if frame is None else "".join(traceback.format_stack(frame))
