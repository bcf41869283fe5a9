"""Whether the run that has claimed a folder came to anything, and whether it is still going on.

A run claims its folder before its first rollout. Where it ends before that, by a mistake in a reward or by a kill,
there is nothing that anybody could want to continue, and the next start may have the folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

RUN_FILE, LOG, SAMPLES, WANDB = "run.json", "log.jsonl", "samples.jsonl", "wandb"
_held: dict[Path, int] = {}
"""By the folders in which runs of this process go on, the descriptors that hold their locks."""


def hold(folder: Path) -> None:
    """Let everybody know that a run of this process goes on in ``folder``, until ``release`` or the end of the process,
    however it ends. Where the file system has no such locks, nobody knows."""
    release(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
    else:
        _held[folder.resolve()] = descriptor


def release(folder: Path) -> None:
    """The run in ``folder`` is over. Does nothing where none of this process goes on there."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def came_to_nothing(folder: Path) -> bool:
    """Whether a run has claimed ``folder`` and has ended before its first rollout: it has left evaluations at most, and
    nobody holds the folder. Where that cannot be told, the answer is no."""
    names = {path.name for path in folder.iterdir()}
    if not names <= {RUN_FILE, LOG, SAMPLES, WANDB} or _is_held(folder):
        return False
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines() if LOG in names else []
        return all(json.loads(line)["kind"] == "eval" for line in lines)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_held(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)  # which gives the lock back
