"""accelerate's own launcher, with its words in a file, and what the ranks left to say on the screen.

accelerate and torchelastic write some 40 lines about a rank that has failed, after its message. Here the launcher runs
in this process, whose Python streams are a log file meanwhile; ranks have the terminal, since they inherit it from the
operating system. What they leave (``last_words``) is said once they have ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from rlhf_toolkit.errors import TopologyError, described
from rlhf_toolkit.last_words import ERROR_FILE, LAUNCHER, left_in, say_at_once

PATIENCE = 600
"""Seconds in which ranks that were asked to stop may write their checkpoint. torchelastic kills them after 30."""
PATIENCE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
STOPPED = (
    "stopped by {name} before a rank could say what it has kept; start it again, with --resume where the run folder "
    "holds a checkpoint"
)
ASKING = (signal.SIGTERM, signal.SIGINT)


class _Asked(BaseException):
    """This process was asked to stop by the signal ``number``, before torchelastic took the signals."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def launch(script: Path, words: Sequence[str], options: Sequence[str]) -> int:
    """Run ``script`` with ``words`` under ``accelerate launch`` with ``options``, in this process, and say what its
    ranks have left to say. The status that this process should end with: a failed rank's, or 128 and the number of the
    signal that was sent here.

    Ranks get that signal, too, and ``PATIENCE`` seconds to end by themselves. None is left behind. The launcher's own
    words, and what it keeps for its ranks, lie in a folder that goes with it, unless nobody has said why a run failed.
    """
    folder = Path(tempfile.mkdtemp(prefix="rlhf_train_"))
    os.environ.setdefault(PATIENCE_VARIABLE, str(PATIENCE))
    alone = folder / "ranks/0/error.json"  # of a single process, which torchelastic has no part in
    alone.parent.mkdir(parents=True)
    os.environ.update({ERROR_FILE: str(alone), LAUNCHER: str(os.getpid())})
    options = [*options, "--log_dir", str(folder / "ranks"), str(script), *words]
    with (folder / "launcher.log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        with _heard():
            ended = _accelerate(options)
        if ended is not None:
            log.write("".join(traceback.format_exception(ended)))
    line, more = left_in(folder / "ranks")
    status = _status_of(ended)
    if status > 128 and not line:
        line = STOPPED.format(name=_name_of(status - 128))
    elif status and (not line or _killed(ended) is not None):
        say_at_once("", _unexplained(ended, folder / "launcher.log"))  # not at the end of a bar that nobody has closed
        return status
    if status:
        say_at_once(*more, line)
    shutil.rmtree(folder, ignore_errors=True)
    return status


def _accelerate(options: Sequence[str]) -> BaseException | None:
    """Run its launcher to the end of all ranks. What ended it, if it was not their good end."""
    try:
        from accelerate.commands.launch import launch_command, launch_command_parser  # its loggers take the log file

        chosen = launch_command_parser().parse_args(list(options))
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup, which torchelastic would not heed
            chosen.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"
        launch_command(chosen)
    except BaseException as error:
        return error
    finally:
        _end_children()
    return None


def _status_of(ended: BaseException | None) -> int:
    """The status of this process, as shells have it for a signal."""
    if ended is None:
        return 0
    number = getattr(ended, "number", None) or getattr(ended, "sigval", None)  # torchelastic's name for it
    if number is not None:
        return 128 + int(number)
    failures: dict[int, Any] = getattr(ended, "failures", {})
    codes = [failure.exitcode for failure in failures.values()] or [getattr(ended, "returncode", 1)]
    stopped = [code for code in codes if code > 128]
    ended_with_them = [code for code in codes if -code in ASKING]  # by torchelastic, which asks the others then
    return stopped[0] if stopped and len(stopped) + len(ended_with_them) == len(codes) else 1


def _killed(ended: BaseException | None) -> tuple[int, int] | None:
    """The rank and the status of one that a signal ended before any rank had failed by itself, None where none was:
    what the others say then is what came of it. Whom torchelastic asks or kills ends after another has failed."""
    failures: dict[int, Any] = getattr(ended, "failures", {})
    silent = {rank: each for rank, each in failures.items() if not Path(each.error_file).is_file()}
    known = [each.timestamp for rank, each in failures.items() if rank not in silent and each.exitcode <= 128]
    for rank, each in silent.items():
        if each.exitcode < 0 and -each.exitcode not in ASKING and all(each.timestamp < other for other in known):
            return rank, each.exitcode
    return None


def _unexplained(ended: BaseException | None, log: Path) -> str:
    """A line for ranks that have ended without a word, or a launcher that has not come to start them."""
    failures: dict[int, Any] = getattr(ended, "failures", {})
    codes = [(rank, failure.exitcode) for rank, failure in failures.items()]
    if not codes and ended is not None and hasattr(ended, "returncode"):
        codes = [(0, ended.returncode)]
    first = _killed(ended) or next((each for each in codes if -each[1] not in ASKING), codes[0] if codes else None)
    if first is not None:
        rank, code = first
        how = f"status {code}" if code >= 0 else _name_of(-code)
        why = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
        return _line(
            f"rank {rank} was ended by {how}{why}; start it again, with --resume where the run folder holds a "
            f"checkpoint; the launcher's own words: {log}"
        )
    reason = "nothing" if ended is None else described(ended)
    return _line(f"accelerate's launcher ended with {reason}; its own words: {log}")


def _line(text: str) -> str:
    return f"{TopologyError.__name__}: {TopologyError(text)}"


def _name_of(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


# ---- signals ---------------------------------------------------------------------------------------------------------


@contextmanager
def _heard() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise in this process, and Ctrl-Z stops the ranks with it: they are not of the
    terminal's group, and a store that does not answer would end them."""

    def ask(number: int, frame: FrameType | None) -> None:
        raise _Asked(number)

    def suspend(number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children(recursive=True)
        _each(ranks, psutil.Process.suspend)
        os.kill(os.getpid(), signal.SIGSTOP)
        _each(ranks, psutil.Process.resume)

    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = dict.fromkeys(ASKING, ask)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_children() -> None:
    """End what is left of this process's children, as those are that torchelastic did not start: ask, then kill."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    children = psutil.Process().children(recursive=True)
    _each(children, psutil.Process.terminate)
    _, left = psutil.wait_procs(children, timeout=PATIENCE)
    _each(left, psutil.Process.kill)


def _each(processes: Sequence[psutil.Process], action: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            action(process)
