"""One cell of the kill matrix: a run that is struck, and what became of it when it went on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_toolkit.distributed.stopping import NOTHING_YET
from tests.reliability.kinds import Kind, Task, copied_run, differences, newest_checkpoint
from tests.reliability.strike import LAUNCHER, LOADING, PHASES, RESUMED, STRUCK, Strike, watch_code
from tests.support.forked import Processes
from tests.support.launch import ACCELERATE
from tests.support.processes import ROOT, Finished, run

SECONDS = 240
"""A hang's limit for one start on a busy machine; a run takes four seconds on a quiet one."""
SECONDS_TO_END = 90.0
"""From the signal to the end of all ranks: torchrun gives 30 seconds to those that another has left behind."""
STEP_OF = {"rollout": 2, "scoring": 2, "update": 3, "evaluation": 3, "write": 4, "rename": 4, "renamed": 4}
"""When a phase is struck: at optimizer steps that are done; where it writes, in the checkpoint of that step."""
MOMENT_OF = {"rollout": 3, "write": 2}
GO_ON = re.compile(r"^.*--resume.*$", flags=re.MULTILINE)
TOLD_OF_A_RANK = re.compile(r"^--- traceback of rank \d+ ---\nTraceback \(most recent call last\)", flags=re.MULTILINE)
NOTHING_TO_RESUME = re.compile(r"no complete checkpoint|holds no run|no checkpoint")


@dataclass(frozen=True)
class Cell:
    """Where a run is struck: ``target`` is a rank or the launcher; ``real_launcher``: by accelerate launch."""

    kind: str
    phase: str
    signal: str
    target: str
    real_launcher: bool = False

    def __str__(self) -> str:
        target = f"rank {self.target}" if self.target != LAUNCHER else LAUNCHER + "*" * self.real_launcher
        return f"{self.kind:5} {self.phase:11} {self.signal:8} {target:10}"

    @property
    def number(self) -> int:
        """Of the signal."""
        return int(getattr(signal, self.signal))

    def strike(self, notes: Path) -> Strike:
        """What the ranks are armed with."""
        step, moment = STEP_OF.get(self.phase, 0), MOMENT_OF.get(self.phase, 1)
        return Strike(self.phase, self.number, self.target, str(notes), step=step, moment=moment)


@dataclass
class Outcome:
    """What became of a cell. ``faults`` is empty where all is as it must be."""

    cell: Cell
    ended: str
    resumed_from: str
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        word = "ok" if not self.faults else "FAILED: " + "; ".join(self.faults[:3])
        return f"{self.cell} | {self.ended:34} | {self.resumed_from:18} | {self.seconds:5.1f} s | {word}"


class Bench:
    """Runs cells of one kind: the uninterrupted run, and a folder of a run that was killed after a checkpoint."""

    def __init__(self, kind: Kind, folder: Path, processes: Processes) -> None:
        self.kind, self.folder, self.processes = kind, folder, processes
        self.task = Task(kind, folder / "task")
        self.straight, self.half = folder / "straight", folder / "half"

    def prepare(self) -> None:
        """The uninterrupted run and the half one. Raises AssertionError where the first fails."""
        self.start(self.straight).succeeded()
        notes = self.folder / "half_notes"
        notes.mkdir()
        self.start(self.half, before=Strike("renamed", int(signal.SIGKILL), "0", str(notes), step=2).code())
        assert newest_checkpoint(self.half) == 2, "the half run was to have its first checkpoint"

    def start(self, run_folder: Path, *more: str, before: str = "") -> Finished:
        """The recipe on two forked ranks under ZeRO-3."""
        arguments = [*self.task.arguments(run_folder), *more]
        return self.processes.run(
            str(self.kind.script),
            *arguments,
            launch_config=self.task.launch_config,
            seconds=SECONDS,
            before=before,
        )

    def judge(self, cell: Cell) -> Outcome:
        """Strike a run, go on with it, and compare its end with the uninterrupted one's."""
        began = time.monotonic()
        name = f"{cell.phase}_{cell.signal}_{cell.target}{'_real' * cell.real_launcher}"
        run_folder, notes = self.folder / name, self.folder / f"{name}_notes"
        notes.mkdir(parents=True)
        if cell.phase == "loading":
            copied_run(self.half, run_folder)
        outcome = Outcome(cell, "", "")
        self._interrupt(cell, run_folder, notes, outcome)
        if not outcome.faults or outcome.ended.startswith("not orderly"):
            self._go_on(cell, run_folder, notes, outcome)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _interrupt(self, cell: Cell, run_folder: Path, notes: Path, outcome: Outcome) -> None:
        more = ["--resume"] if cell.phase == "loading" else []
        code = cell.strike(notes).code()
        if cell.real_launcher:
            finished = launched(self.task, [*self.task.arguments(run_folder), *more], code, notes)
        else:
            finished = self.start(run_folder, *more, before=code)
        (notes / "interrupted.txt").write_text(finished.output)
        if not (notes / STRUCK).is_file():
            outcome.ended = f"never struck, status {finished.status}"
            outcome.faults.append(f"the phase was not reached: {finished.output[-300:]!r}")
            return
        took = time.time() - (notes / STRUCK).stat().st_mtime
        outcome.ended, faults = ending(cell, finished, took)
        outcome.faults += faults
        outcome.faults += [f"{pid} is alive" for pid in survivors(notes)]

    def _go_on(self, cell: Cell, run_folder: Path, notes: Path, outcome: Outcome) -> None:
        newest, struck = newest_checkpoint(run_folder), json.loads((notes / STRUCK).read_text())
        finished = self.start(run_folder, "--resume", before=watch_code(notes))
        fresh = finished.status != 0 and NOTHING_TO_RESUME.search(finished.output) is not None
        if fresh:
            finished = self.start(run_folder, "--overwrite", before=watch_code(notes))
        (notes / "resumed.txt").write_text(finished.output)
        if finished.status != 0:
            outcome.faults.append(f"it did not go on: {last_line(finished.output)}")
            return
        resumed = notes / RESUMED
        step = int(json.loads(resumed.read_text())) if resumed.is_file() else -1
        outcome.resumed_from = "its beginning" if fresh else "its end" if step < 0 else f"step {step}"
        least = int(struck["steps"]) if cell.signal != "SIGKILL" and cell.phase != "start" else newest
        if 0 <= step < max(newest, least):
            outcome.faults.append(f"steps were lost: it went on from {step}, not from {max(newest, least)}")
        outcome.faults += differences(self.straight, run_folder, self.kind.axis)


def ending(cell: Cell, finished: Finished, took: float) -> tuple[str, list[str]]:
    """How a struck run ended, and what is wrong with that."""
    faults = []
    if took > SECONDS_TO_END or "Timeout (0:" in finished.output:
        faults.append(f"it hung: {took:.0f} s from the signal to the end")
    if cell.signal == "SIGKILL":
        if finished.status == 0:
            faults.append("a killed run ended as if all were well")
        return f"status {finished.status} after {took:.0f} s", faults
    told = [
        line for line in GO_ON.findall(finished.output) if "python" in line or "launch" in line or "recipes" in line
    ]
    if has_bare_traceback(finished.output) and not cell.real_launcher:
        faults.append("a bare traceback")
    if not told and not (cell.phase in LOADING and NOTHING_YET in finished.output):
        faults.append("no line says how to go on")
    return f"{'not orderly' if faults else 'stopped'}, status {finished.status} after {took:.0f} s", faults


def launched(task: Task, arguments: list[str], code: str, notes: Path) -> Finished:
    """The recipe under accelerate launch; its ranks arm themselves as Python starts."""
    hook = f"import os\nif 'LOCAL_RANK' in os.environ:\n    {code}\n"
    (notes / "sitecustomize.py").write_text(hook)
    command = [str(ACCELERATE), "launch", "--config_file", str(task.launch_config), str(task.kind.script), *arguments]
    return run(command, seconds=SECONDS, PYTHONPATH=os.pathsep.join(map(str, (notes, ROOT, ROOT / "src"))))


def survivors(notes: Path) -> list[str]:
    """Ranks that outlived their run."""
    pids = [(path.name, int(path.read_text())) for path in notes.glob("pid-*")]
    return [f"{name.replace('pid-', 'rank ')} (process {pid})" for name, pid in pids if _is_running(pid)]


def _is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def has_bare_traceback(output: str) -> bool:
    """Whether a stack is shown that is not what another rank is said to have failed with."""
    return "Traceback (most recent call last)" in TOLD_OF_A_RANK.sub("", output)


def last_line(output: str) -> str:
    """The last line of an output that says something."""
    return next((line for line in reversed(output.splitlines()) if line.strip()), "")[-300:]


def cells_of(kind: Kind, phases: tuple[str, ...] = PHASES) -> list[Cell]:
    """Every cell of a kind. An interrupt of the real launcher is one cell: the others are of one that forks its ranks
    and hands the signal on as torchrun does."""
    cells = []
    for phase in (phase for phase in phases if phase not in kind.without):
        signals = ("SIGKILL",) if phase == "renamed" else ("SIGKILL", "SIGTERM", "SIGINT")
        cells += [Cell(kind.name, phase, name, rank) for name in signals for rank in ("0", "1")]
        cells.append(Cell(kind.name, phase, "SIGINT", LAUNCHER))
        if phase == "update":
            cells.append(Cell(kind.name, phase, "SIGINT", LAUNCHER, real_launcher=True))
    return cells


if sys.platform != "linux":
    raise ImportError("processes are looked for in /proc")
