"""Tries the cases of a door, each in a fork of this process with a time limit and a limit on memory.

A door is a module of this package: ``cases(seed, count)`` gives about ``count`` hostile inputs, the same for the same
seed; ``run(case)`` tries one and says how it ended, or raises: an RLHFError of one line that prints is a refusal, and
anything else a bare traceback. It may have ``HEAVY``, names of modules to import before forking, ``COUNT`` and
``LIMIT`` (seconds for a case), ``NOTICES = False`` where something trusted starts processes and asks servers, so that
audit events say nothing, and ``detail()``, more about the last case.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from rlhf_toolkit.errors import RLHFError
from tests.strangers import ground

REFUSED, RIGHTLY, BARE, WRONGLY, HUNG = (
    "refused",
    "accepted rightly",
    "bare traceback",
    "accepted wrongly",
    "hung",
)
ENDINGS = (REFUSED, RIGHTLY, BARE, WRONGLY, HUNG)
HARMS = ("executed", "written", "fetched")
DOORS = (
    *("yaml", "adapters", "bases", "run_folders", "templates", "terminal", "secrets"),
    *("data_files", "rows", "gym_answers", "reward_returns", "http"),
)
DEFAULT_COUNT, DEFAULT_LIMIT = 100, 20.0
MEMORY = 3 * 2**30
"""What a case may take beyond what its parent has."""
LONGEST_MESSAGE = 5000


@dataclass(frozen=True)
class Result:
    """How one case ended, what harm it did, what was said, and the seconds it took."""

    door: str
    case: str
    ending: str
    harms: tuple[str, ...]
    detail: str
    seconds: float

    @property
    def bad(self) -> bool:
        """Whether this may not happen."""
        return self.ending in (BARE, WRONGLY, HUNG) or bool(self.harms)


@dataclass
class _Trial:
    """A child that tries ``case``."""

    number: int
    case: Any
    process: int
    pipe: int
    began: float
    server: ground.Server
    ground: ground.Ground
    said: bytes = b""


def judged(error: RLHFError) -> str:
    """Whether a refusal is one: a line that is not long and prints."""
    text = str(error)
    return REFUSED if text and len(text) <= LONGEST_MESSAGE and text.isprintable() else WRONGLY


def try_door(door: str, seed: int, count: int | None = None, *, workers: int = 2) -> list[Result]:
    """Try the cases of one door, ``workers`` at a time, and say how each ended."""
    module: Any = importlib.import_module(f"tests.strangers.{door}")
    for name in getattr(module, "HEAVY", ()):
        importlib.import_module(name)
    waiting = list(enumerate(module.cases(seed, count or getattr(module, "COUNT", DEFAULT_COUNT))))[::-1]
    limit, results = getattr(module, "LIMIT", DEFAULT_LIMIT), dict[int, Result]()
    running = dict[int, _Trial]()
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="strangers-") as scratch:
        while waiting or running:
            while waiting and len(running) < workers:
                trial = _begun(module, *waiting.pop(), Path(scratch))
                running[trial.pipe] = trial
            for trial in _over(running, limit):
                result = _ended(door, trial, limit)
                came = trial.server.connections()
                trial.server.socket.close()
                if came and not any(each.startswith("fetched") for each in result.harms):
                    result = Result(**{**vars(result), "harms": (*result.harms, f"fetched: {came} connections")})
                results[trial.number] = result
                shutil.rmtree(trial.ground.folder.parent, ignore_errors=True)
    return [results[number] for number in sorted(results)]


def _begun(module: Any, number: int, case: Any, scratch: Path) -> _Trial:
    server = ground.Server()  # of its own: so it is known which of the children that run has come
    place = ground.prepare(scratch / str(number), server.url)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        server.socket.close()
        _try(module, case, place, writing)
    os.close(writing)
    return _Trial(number, case, child, reading, time.monotonic(), server, place)


def _over(running: dict[int, _Trial], limit: float) -> list[_Trial]:
    """Read what children say; those that have ended, or are over their time and killed."""
    ready, _, _ = select.select(list(running), [], [], 0.05)
    over = []
    for pipe, trial in list(running.items()):
        if pipe in ready:
            part = os.read(pipe, 65536)
            trial.said += part
            if part:
                continue
        elif time.monotonic() - trial.began <= limit:
            continue
        over.append(running.pop(pipe))
        os.close(pipe)
    return over


def _ended(door: str, trial: _Trial, limit: float) -> Result:
    seconds = time.monotonic() - trial.began
    with suppress(ProcessLookupError):
        os.killpg(trial.process, signal.SIGKILL)  # and whatever it has started
    _, status = os.waitpid(trial.process, 0)
    harms = trial.ground.harm()
    name = shown_case(trial.case)
    try:
        said = json.loads(trial.said)
    except ValueError:
        hung = seconds > limit
        ending = HUNG if hung else BARE
        detail = f"no end within {limit:g} s" if hung else f"the process ended with {os.waitstatus_to_exitcode(status)}"
        return Result(door, name, ending, tuple(harms), detail, seconds)
    return Result(door, name, said["ending"], (*harms, *said["noticed"]), said["detail"], seconds)


def shown_case(case: Any) -> str:
    """A case's name, or as much of it as fits a line."""
    return getattr(case, "name", None) or ascii(case)[:160]


# ---- in the child ----------------------------------------------------------------------------------------------------


def _try(module: Any, case: Any, place: ground.Ground, pipe: int) -> NoReturn:
    os.setsid()
    faulthandler.disable()
    log = os.open(place.folder.parent / "log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)  # those of the parent did not come along, and to wait for them is to hang or crash
    ground.enter(place)
    ending, detail = _outcome(module, case)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    noticed = ground.noticed[:5] if getattr(module, "NOTICES", True) else []
    told = {"ending": ending, "detail": detail, "noticed": noticed}
    os.write(pipe, json.dumps(told).encode()[:60000])
    os._exit(0)


def _outcome(module: Any, case: Any) -> tuple[str, str]:
    try:
        ending = module.run(case)
        return ending, str(getattr(module, "detail", lambda: "")())[:600]
    except RLHFError as error:
        return judged(error), f"{type(error).__name__}: {error}"[:600]
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "rlhf_toolkit" in frame.filename] or list(where)
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        return BARE, f"{type(error).__name__} at {place}: {error}"[:600]


# ---- what came of it -------------------------------------------------------------------------------------------------


def row(name: str, results: list[Result]) -> list[str]:
    """One line of the table."""
    endings = Counter(result.ending for result in results)
    harms = Counter(harm.partition(":")[0] for result in results for harm in result.harms)
    return [name, str(len(results)), *(str(endings[each]) for each in ENDINGS), *(str(harms[each]) for each in HARMS)]


def table(by_door: dict[str, list[Result]]) -> list[str]:
    """A line for each door, as in the table of strangers' inputs."""
    head = ["door", "tried", *ENDINGS, "executed", "written outside", "fetched"]
    rows = [head, *(row(door, results) for door, results in by_door.items())]
    widths = [max(len(cells[place]) for cells in rows) for place in range(len(head))]
    return [
        cells[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        for cells in rows
    ]


def totals(results: list[Result]) -> str:
    """The last line."""
    _, tried, refused, rightly, bare, wrongly, hung, executed, written, fetched = row("", results)
    return (
        f"{tried} tried: {refused} refused, {rightly} accepted rightly; {bare} bare tracebacks, {wrongly} accepted "
        f"wrongly, {hung} hung, {executed} executed, {written} written outside, {fetched} fetched"
    )
