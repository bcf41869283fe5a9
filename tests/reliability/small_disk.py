"""``python -m tests.reliability.small_disk``: the disk of a run folder fills up while the run writes to it.

The disk is a tmpfs in a mount namespace of its own, which needs no rights (``unshare -rm``). The run must end in one
line, keep what it had, and go on to the bits of an undisturbed run once there is room.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.cells import SECONDS_TO_END, Bench, has_bare_traceback, last_line
from tests.reliability.kinds import KINDS, differences
from tests.reliability.strike import STRUCK, Strike
from tests.support.forked import Processes

MEBIBYTES = 320
"""A run asks for 256 before it starts."""


@dataclass(frozen=True)
class Filling:
    """When the disk fills up, and the bytes that stay free."""

    kind: str
    phase: str
    step: int
    leave: int
    rank: str = "0"

    def __str__(self) -> str:
        return f"{self.kind:5} {self.phase:11} step {self.step}, {self.leave:6} bytes left"


FILLINGS = tuple(
    Filling(kind, phase, step, leave)
    for kind in ("PPO", "SFT")
    for phase, step, leave in (("write", 4, 0), ("write", 4, 40_960), ("update", 3, 0), ("evaluation", 6, 0))
)


def judge(filling: Filling, bench: Bench, disk: Path) -> list[str]:
    """What is wrong with how a run meets its full disk."""
    run_folder, filler = disk / "run", disk / "filler"
    notes = bench.folder / f"{filling.phase}_{filling.step}_{filling.leave}_disk"
    notes.mkdir()
    subprocess.run(["rm", "-rf", str(run_folder), str(filler)], check=True)
    strike = Strike(
        filling.phase, 0, filling.rank, str(notes), step=filling.step, fill=str(filler), leave=filling.leave
    )
    finished = bench.start(run_folder, before=strike.code())
    (notes / "full.txt").write_text(finished.output)
    if not filler.is_file():
        return [f"the disk was never filled: {last_line(finished.output)}"]
    faults = []
    took = time.time() - (notes / STRUCK).stat().st_mtime
    if took > SECONDS_TO_END or "Timeout (0:" in finished.output:
        faults.append(f"it hung: {took:.0f} s")
    if finished.status == 0:
        faults.append("it ended as if all were well")
    if has_bare_traceback(finished.output):
        faults.append("a bare traceback")
    if "No space left on device" not in finished.output or "--resume" not in finished.output:
        faults.append(f"no line names the full disk and the way on: {last_line(finished.output)}")
    filler.unlink()
    resumed = bench.start(run_folder, "--resume")
    (notes / "resumed.txt").write_text(resumed.output)
    if resumed.status != 0:
        return [*faults, f"it did not go on: {last_line(resumed.output)}"]
    return faults + differences(bench.straight, run_folder, bench.kind.axis)[:3]


def inside(disk: Path, fillings: Sequence[Filling], keep: Path | None) -> int:
    """Every filling, in the namespace that has ``disk``; the number of those that failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        processes = Processes(folder)
        benches: dict[str, Bench] = {}
        try:
            for filling in fillings:
                if filling.kind not in benches:
                    benches[filling.kind] = Bench(KINDS[filling.kind], folder / filling.kind, processes)
                    benches[filling.kind].start(benches[filling.kind].straight).succeeded()
                faults = judge(filling, benches[filling.kind], disk)
                failed += bool(faults)
                print(f"{filling} | {'; '.join(faults) or 'ok'}", flush=True)
        finally:
            processes.close()
    print(f"{len(fillings) - failed} passed, {failed} failed")
    return failed


def in_namespace(arguments: Sequence[str], seconds: int = 1800) -> subprocess.CompletedProcess[str]:
    """This module in a namespace with a small disk."""
    with tempfile.TemporaryDirectory() as disk:
        mount = 'mount -t tmpfs -o size="$2"m none "$1" && shift 2 && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", disk, str(MEBIBYTES)]
        own = [sys.executable, "-m", "tests.reliability.small_disk", "--inside", disk, *arguments]
        return subprocess.run([*command, *own], text=True, timeout=seconds, stdout=subprocess.PIPE, check=False)


def main() -> int:
    """All fillings; the number of those that failed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inside", type=Path, help="where the small disk is mounted")
    parser.add_argument("--keep", type=Path, help="a new folder for what the runs print")
    parser.add_argument("--kinds", nargs="+", choices=("PPO", "SFT"), default=("PPO", "SFT"))
    parser.add_argument("--phases", nargs="+", default=("write", "update", "evaluation"))
    options = parser.parse_args()
    if options.inside:
        chosen = [f for f in FILLINGS if f.kind in options.kinds and f.phase in options.phases]
        return min(inside(options.inside, chosen, options.keep), 1)
    finished = in_namespace(sys.argv[1:])
    print(finished.stdout, end="")
    return finished.returncode


if __name__ == "__main__":
    raise SystemExit(main())
