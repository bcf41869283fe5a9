"""How a run that a signal has stopped ends: with a checkpoint, and a line that gives the command to go on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_toolkit.checkpoint_files import Checkpoint
from rlhf_toolkit.distributed import stopping
from rlhf_toolkit.errors import StopAskedError
from rlhf_toolkit.last_words import command_of_rlhf
from rlhf_toolkit.trainers.base import RoleTrainer

LAUNCHERS = ("accelerate", "torchrun", "deepspeed")


def stopped(trainer: RoleTrainer, resumed_from: Checkpoint | None, why: str) -> StopAskedError:
    """Write a checkpoint of the last whole update, where there is none yet, and say how to go on. A collective."""
    done = trainer.state.global_step
    began = 0 if resumed_from is None else resumed_from.step
    if done > began:
        trainer.write_checkpoint()
    if trainer.writer is not None:
        with stopping.held():
            trainer.writer.finish()
    if done == 0:
        line = f"{why} before the first update: there is nothing to save; start again with {command(resume=False)}"
    else:
        line = f"{why} after update {done}, with a checkpoint; continue with {command(resume=True)}"
    error = StopAskedError(line)
    error.status = 128 + (stopping.requested() or 15)
    return error


def command(*, resume: bool) -> str:
    """The command line that this process was started with, by ``rlhf train`` or a launcher if it was, with ``--resume``
    or, to begin afresh in the folder that the run has claimed, ``--overwrite``."""
    words = command_of_rlhf() or launched_by(parent_command()) or [Path(sys.executable).name, *sys.argv]
    kept = [word for word in words if word not in ("--resume", "--overwrite")]
    return shlex.join([*kept, "--resume" if resume else "--overwrite"])


def launched_by(words: Sequence[str]) -> list[str]:
    """``words`` from the launcher's name on, without the folder that it lies in; nothing where none is there."""
    for number, word in enumerate(words[:3]):
        if Path(word).name in LAUNCHERS:
            return [Path(word).name, *words[number + 1 :]]
    return []


def parent_command() -> list[str]:
    """The words of the command that started this process's parent; nothing where the system does not say."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0")
    except (OSError, ValueError):
        return []
