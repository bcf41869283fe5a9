"""``python -m tests.reliability.kill_matrix``: every phase of every kind of run is struck by every signal.

A cell passes where the run ended within its time, went on from its newest checkpoint (after SIGTERM and SIGINT from the
last whole optimizer step, and told how), and has the bits of a run that nobody struck.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.reliability.cells import Bench, Cell, Outcome, cells_of
from tests.reliability.kinds import KINDS
from tests.reliability.strike import PHASES
from tests.support.forked import Processes


def main() -> int:
    """Run the cells that were asked for; the number of those that failed."""
    options = command_line().parse_args()
    kinds = [KINDS[name] for name in options.kinds]
    cells = [cell for kind in kinds for cell in cells_of(kind, tuple(options.phases))]
    cells = [
        cell
        for cell in cells
        if cell.signal in options.signals and (not options.targets or cell.target in options.targets)
    ]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = judge_all(cells, options.keep or Path(folder), options.jobs)
    failed = sum(bool(outcome.faults) for outcome in outcomes)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return failed


def judge_all(cells: Sequence[Cell], folder: Path, jobs: int) -> list[Outcome]:
    """All cells, ``jobs`` at a time, each printed as it is done. Each job has forks of a process of its own."""

    def share(number: int) -> list[Outcome]:
        own = [cell for position, cell in enumerate(cells) if position % jobs == number]
        place = folder / f"job_{number}"
        place.mkdir(parents=True)
        processes = Processes(place)
        try:
            return judge(own, place, processes)
        finally:
            processes.close()

    with ThreadPoolExecutor(jobs) as pool:
        return [outcome for part in pool.map(share, range(jobs)) for outcome in part]


def judge(cells: Sequence[Cell], folder: Path, processes: Processes) -> list[Outcome]:
    """These cells, one after another."""
    benches: dict[str, Bench] = {}
    outcomes = []
    for cell in cells:
        if cell.kind not in benches:
            benches[cell.kind] = Bench(KINDS[cell.kind], folder / cell.kind, processes)
            benches[cell.kind].prepare()
        outcomes.append(benches[cell.kind].judge(cell))
        print(outcomes[-1], flush=True)
    return outcomes


def command_line() -> argparse.ArgumentParser:
    """Parts of the matrix can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    signals = ("SIGKILL", "SIGTERM", "SIGINT")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--signals", nargs="+", choices=signals, default=signals)
    parser.add_argument("--targets", nargs="+", default=(), help="0, 1, launcher")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time (1)")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs and their outputs")
    return parser


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
