"""Every error the toolkit raises on purpose.

A message names the value, the rule it breaks and the way out, on one line, so that it is worth reading in the last line
of a log: ``save_every=7 is not ...; try 8``. Anything else that escapes is a defect of the toolkit.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rlhf_toolkit.last_words import say_last, says_it_for_us
from rlhf_toolkit.texts import printable, quoted

DISK_FULL = "No space left on device"
"""What the operating system says, in the text of OSError as in that of safetensors' error."""

OUT_OF_MEMORY = ("CUDA out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What PyTorch's errors say where they have no class of their own: those of its CPU allocator, and of cuBLAS."""


MOST_READ = 10_000
"""Characters of a foreign exception that are looked at."""
LONGEST = 4000
"""Characters of a message; a name in it may be a stranger's."""


class RLHFError(Exception):
    """Base class: catch this to catch everything the toolkit raises on purpose. Its message is one line that prints,
    whatever stands in it."""

    def __str__(self) -> str:
        return printable(super().__str__(), longest=LONGEST)


class ConfigError(RLHFError):
    """A setting, or two settings together, cannot work."""


class DataError(RLHFError):
    """A dataset, a tokenizer or a row of data cannot be used."""


class ModelError(RLHFError):
    """A model's architecture or an adapter cannot play the roles asked of it."""


class RewardError(RLHFError):
    """A reward source raised, or returned something that is not one finite number for each response."""


class CheckpointError(RLHFError):
    """A run folder or a checkpoint is incomplete, foreign, or cannot be written."""


class TopologyError(RLHFError):
    """Processes, devices, DeepSpeed and accelerate disagree about what runs where."""


class TrainingPathError(RLHFError):
    """Two passes that must compute the same numbers do not: log-probs, ratio or reference KL."""


class NotFiniteError(RLHFError):
    """A model gave NaN or infinity, in a rollout or in a training step."""


class OutOfMemoryError(RLHFError):
    """Memory ran out in an update or while sampling, also after what can be made smaller was made smaller."""


class StallError(RLHFError):
    """A rank has not moved for longer than ``run.stall_minutes``."""


class StopAskedError(RLHFError):
    """A signal has asked the run to stop, and it has. The process ends with 128 and the signal's number."""

    status = 128 + 15


class RunWarning(RuntimeWarning):
    """What a run goes on with, and people should know of."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed, on a card or in the machine's memory."""
    if isinstance(error, MemoryError | OutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def users_stack(error: BaseException) -> str:
    """The stack of the user's code in an error of a reward; nothing where it did not raise."""
    if isinstance(error, RewardError) and error.__cause__ is not None:
        return "".join(traceback.format_exception(error.__cause__))
    return ""


@contextmanager
def located(place: str) -> Iterator[None]:
    """A NotFiniteError from inside also says where the run was, such as ``rollout 3``."""
    try:
        yield
    except NotFiniteError as error:
        error.args = (f"{place}: {error}",)
        raise


def described(error: BaseException) -> str:
    """An exception on one line, its type first, at most some 400 characters of it."""
    try:
        text = str(error)
    except Exception as another:  # of a stranger's class
        text = f"(its text raises {type(another).__name__})"
    return printable(" ".join(f"{type(error).__name__}: {text[:MOST_READ]}".split()), longest=400)


def shortened(value: Any, length: int = 200) -> str:
    """``repr`` on one line, at most ``length`` characters of it and the dots."""
    return quoted(value, length)


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?``, or nothing where no known name is close."""
    close = difflib.get_close_matches(name[:200], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


at_a_good_end: list[Callable[[], None]] = []
"""What ``reported`` calls where a script has come to its end."""
at_any_other_end: list[Callable[[int], None]] = []
"""What ``reported`` calls with the status where it ends a script; the last of them may end the process."""
at_a_failure: list[Callable[[str], str]] = []
"""What ``reported`` tells a script's last line before it ends with it; gives the line that is said."""


TOO_EARLY = "stopped by SIGINT before there was anything to keep; start it again"


class _Script:
    runs = False


def in_script() -> bool:
    """Whether this process belongs to a script: what runs in a library's user leaves its signals alone."""
    return _Script.runs


@contextmanager
def reported() -> Iterator[None]:
    """For scripts: an RLHFError ends the process with status 1 and its message, one line, instead of a stack.

    What a reward raised stands above it in full, since that is the user's code; so does, on rank 0, what another rank's
    did, and what nobody foresaw there. A disk that is full ends it in the same way, whoever wrote, and so does another
    rank's end. A run that was stopped ends with 128 and the signal's number. Anything else passes, or is left to the
    launcher of ``rlhf train``.
    """
    _Script.runs = True
    try:
        yield
        for step in at_a_good_end:
            step()
    except StopAskedError as error:
        _end(str(error) if os.environ.get("RANK", "0") == "0" else "", status=error.status)
    except RLHFError as error:
        more = [users_stack(error).rstrip()] if users_stack(error) else []
        if not more and os.environ.get("RANK", "0") == "0" and type(error) in (RLHFError, RewardError):
            more = getattr(error, "__notes__", [])  # by ``collectives.agreement``: the traceback of another rank
        _end(_told(f"{type(error).__name__}: {error}"), *more)
    except Exception as error:
        line = described(error)
        if DISK_FULL in str(error):
            _end(_told(f"{line}; make room on that disk, then continue with --resume"))
        said = _told(line)
        if said != line:  # it is only what another rank's end has caused here
            _end(said)
        if says_it_for_us():
            _end(line, "".join(traceback.format_exception(error)).rstrip())
        raise
    except KeyboardInterrupt:  # where nothing of a run has taken the signals yet
        _end(TOO_EARLY if os.environ.get("RANK", "0") == "0" else "", status=128 + 2)


def _told(line: str) -> str:
    for step in at_a_failure:
        line = step(line)
    return line


def _end(line: str, *more: str, status: int = 1) -> NoReturn:
    if line:
        say_last(line, *more)
    for step in at_any_other_end:
        step(status)
    sys.exit(status)
