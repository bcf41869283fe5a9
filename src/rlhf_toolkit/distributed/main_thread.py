"""What this process's main thread is doing, seen from another thread: whether it moves, waits for others, and where."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from types import FrameType
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


class Position(NamedTuple):
    """Where the main thread is. ``seconds`` since it last moved."""

    seconds: float
    waits: bool
    phase: str
    place: str
    stack: str


class MainThread:
    """Looks at the main thread again and again. It has moved when its stack, down to the instruction, is another."""

    def __init__(self) -> None:
        self._ident = threading.main_thread().ident or 0
        self._before: tuple[tuple[int, int], ...] = ()
        self._moved = time.monotonic()

    def look(self) -> Position:
        """Where it is now."""
        frames = _frames(sys._current_frames().get(self._ident))
        now = tuple((id(frame.f_code), frame.f_lasti) for frame in frames)
        if now != self._before:
            self._before, self._moved = now, time.monotonic()
        if any(frame.f_code.co_filename.endswith(FOR_REWARDS) for frame in frames):
            self._moved = time.monotonic()
        return Position(
            time.monotonic() - self._moved,
            any(map(_waits, frames[:6])),
            next(
                (PHASES[name] for frame in frames if _ours(frame) and (name := frame.f_code.co_name) in PHASES),
                "the start",
            ),
            next((_place(frame) for frame in frames if _ours(frame)), "nowhere"),
            "".join(traceback.format_stack(frames[0])) if frames else "",
        )


def _frames(frame: FrameType | None) -> list[FrameType]:
    """The frames of a stack, innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _waits(frame: FrameType) -> bool:
    code = frame.f_code
    in_deepspeed = f"{os.sep}deepspeed{os.sep}" in code.co_filename and code.co_name in WAITING
    return in_deepspeed or code.co_filename.endswith(IN_COLLECTIVE)


def _ours(frame: FrameType) -> bool:
    return f"{os.sep}rlhf_toolkit{os.sep}" in frame.f_code.co_filename


def _place(frame: FrameType) -> str:
    file = frame.f_code.co_filename.rpartition(f"{os.sep}rlhf_toolkit{os.sep}")[2]
    return f"{frame.f_code.co_name} ({file}:{frame.f_lineno})"
