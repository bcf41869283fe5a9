"""``python -m tests.reliability.soak``: a run of 300 updates on two ranks that is struck every few updates and goes on.

Its end has the bits of a run that nobody struck, and neither of them grows: in memory, open files, processes, or files
of the run folder.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.cells import last_line, survivors
from tests.reliability.kinds import KINDS, Task, differences
from tests.reliability.strike import STRUCK, Strike
from tests.support.forked import Processes
from tests.support.processes import Finished

SECONDS = 900
PHASES = ("rollout", "scoring", "update", "write", "rename", "renamed")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LARGEST_GROWTH = 0.02
FEWEST, MOST = 3, 10
"""Updates between two strikes."""
WITHOUT_ALL_CHECKPOINTS = 2
"""So many starts end before there are as many checkpoints as are kept."""
FILES_OF_A_CHECKPOINT = 18
"""At most; a strike may leave a broken one, which goes when the next is whole."""


@dataclass(frozen=True)
class Sample:
    """What a rank holds as a training step begins. ``age``: how many steps its process has begun."""

    rank: str
    step: int
    age: int
    memory: int
    files: int
    processes: int


# ---- in a rank -------------------------------------------------------------------------------------------------------


def sample_steps(path: str) -> None:
    """Append a Sample to ``path`` at the beginning of each training step."""
    import os

    import psutil

    from rlhf_toolkit.trainers.ppo import PPOTrainer

    real: Callable[..., Any] = PPOTrainer.training_step
    own, age, rank = psutil.Process(), 0, os.environ["RANK"]

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal age
        age += 1
        counted = own.num_fds(), len(own.children(recursive=True)) + own.num_threads()
        line = [rank, self.state.global_step, age, own.memory_info().rss, *counted]
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return real(self, *args, **kwargs)

    PPOTrainer.training_step = step  # type: ignore[method-assign]


# ---- in the tests' process -------------------------------------------------------------------------------------------


class Soak:
    """The two runs in a folder, and what is seen of them."""

    def __init__(self, folder: Path, processes: Processes, updates: int, seed: int) -> None:
        changes = {"ppo.num_rollouts": updates // 2, "run.evaluate_every": 0, "data.evaluation": None}
        self.task = Task(KINDS["PPO"], folder / "task", changes)
        self.folder, self.processes, self.updates = folder, processes, updates
        self.random = random.Random(seed)
        self.faults: list[str] = []
        self.folder_files: list[int] = []
        self.starts = 0

    def run(self, name: str, *more: str, strike: Strike | None = None) -> Finished:
        """One start of the run ``name``, which is sampled and may be struck."""
        code = f"from tests.reliability.soak import sample_steps; sample_steps({str(self.samples_of(name))!r})\n"
        return self.processes.run(
            str(self.task.kind.script),
            *self.task.arguments(self.folder / name),
            *more,
            launch_config=self.task.launch_config,
            seconds=SECONDS,
            before=code + (strike.code() if strike else ""),
        )

    def samples_of(self, name: str) -> Path:
        """Where the samples of a run are."""
        return self.folder / f"{name}.samples"

    def strike_until_done(self) -> None:
        """Start, strike, go on, until a start comes to its end. A fault ends it."""
        resume: tuple[str, ...] = ()
        while not self.faults and self.starts < self.updates:
            self.starts += 1
            notes = self.folder / f"notes_{self.starts}"
            notes.mkdir()
            finished = self.run("broken", *resume, strike=self.next_strike(notes))
            self.faults += [f"start {self.starts}: {each} is alive" for each in survivors(notes)]
            if "Timeout (0:" in finished.output:
                self.faults.append(f"start {self.starts} hung")
            if not (notes / STRUCK).is_file():
                if finished.status != 0:
                    self.faults.append(f"start {self.starts} failed: {last_line(finished.output)}")
                return
            found = list((self.folder / "broken").rglob("*"))
            self.folder_files.append(sum(path.is_file() for path in found))
            resume = ("--resume",) if self.has_checkpoint() else ("--overwrite",)

    def next_strike(self, notes: Path) -> Strike:
        """Some updates from where the run stands, in a phase, by a signal, at a rank; all drawn."""
        phase, number = self.random.choice(PHASES), self.random.choice(SIGNALS)
        step = self.last_step() + self.random.randint(FEWEST, MOST)
        moment = self.random.randint(1, 2) if phase == "rollout" else 1  # elsewhere one pass may be all there is
        return Strike(phase, int(number), self.random.choice("01"), str(notes), step=step, moment=moment)

    def last_step(self) -> int:
        """The step that the struck run has begun last."""
        return max((sample.step for sample in read(self.samples_of("broken"))), default=0)

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return any((self.folder / "broken").glob("checkpoint-*/manifest.json"))


def read(path: Path) -> list[Sample]:
    """The samples of a run; a line that a kill has cut is left out."""
    samples = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            samples.append(Sample(*json.loads(line)))
        except (ValueError, TypeError):
            continue
    return samples


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth."""
    tenth = max(1, len(values) // 10)
    return statistics.mean(values[:tenth]), statistics.mean(values[-tenth:])


def growth_faults(name: str, samples: Sequence[Sample]) -> list[str]:
    """What has grown from the first tenth of the samples to the last; prints every figure."""
    faults = []
    for rank in ("0", "1"):
        own = [sample for sample in samples if sample.rank == rank]
        first, last = ends([sample.memory for sample in own])
        growth = last / first - 1
        print(f"{name}, rank {rank}: {first / 2**20:.0f} MiB, then {last / 2**20:.0f}: {growth:+.2%}")
        if growth > LARGEST_GROWTH:
            faults.append(f"{name}, rank {rank}: memory grew by {growth:.2%}")
        for what in ("files", "processes"):
            before, after = ends([getattr(sample, what) for sample in own])
            print(f"{name}, rank {rank}: {what} {before:.1f}, then {after:.1f}")
            if after > before + 0.5:
                faults.append(f"{name}, rank {rank}: {what} grew from {before:.1f} to {after:.1f}")
    return faults


def soaked(folder: Path, processes: Processes, updates: int, seed: int) -> list[str]:
    """Both runs, and every fault found."""
    soak = Soak(folder, processes, updates, seed)
    soak.run("straight").succeeded()
    soak.strike_until_done()
    print(f"{updates} updates, {soak.starts} starts")
    steady = [sample for sample in read(soak.samples_of("straight")) if sample.step >= 2]
    faults = [*soak.faults, *growth_faults("uninterrupted", steady)]
    faults += growth_faults(
        "struck, second step of each start", [s for s in read(soak.samples_of("broken")) if s.age == 2]
    )
    before, after = ends(soak.folder_files[WITHOUT_ALL_CHECKPOINTS:] or [0])
    print(f"files in the run folder after a strike: {before:.1f}, then {after:.1f}")
    if after > before + FILES_OF_A_CHECKPOINT:
        faults.append(f"the run folder has {after:.1f} files, {before:.1f} at the beginning")
    different = differences(folder / "straight", folder / "broken", "rollout")
    print("parameters and records: " + (f"{len(different)} differ" if different else "equal"))
    return faults + different[:3]


def main() -> int:
    """The soak; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(Path(folder))
        try:
            faults = soaked(Path(folder), processes, options.updates, options.seed)
        finally:
            processes.close()
    print("\n".join(f"FAILED: {fault}" for fault in faults) or "all is as it must be")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    return min(len(faults), 1)


if __name__ == "__main__":
    raise SystemExit(main())
