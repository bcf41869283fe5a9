"""Faults planted into runs of two real ranks: memory that runs out, errors in the middle of a layer, signals, a rank
that stalls. Nothing waits for a collective's timeout, and what goes on goes on as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch import ROOT, Finished, launch
from tests.support.tiny import merged, write_experiment, write_task
from tests.support.values import named

SECONDS = 120
"""Of a launch, beyond which it hangs: these faults would wait for run.timeout_minutes, two hours."""


class Runs:
    """Runs of one experiment in a folder, each with faults of its own."""

    def __init__(self, folder: Path, changes: dict[str, Any]) -> None:
        self.folder = folder
        self.task = merged(write_task(folder), {"ppo.num_rollouts": 4, "rollout.responses_per_prompt": 2, **changes})

    def start(
        self, name: str, *faults: dict[str, Any], stage: int = 3, resume: bool = False, **changes: Any
    ) -> Finished:
        """Run it as ``name`` on two ranks."""
        task = merged(self.task, {"run.output_dir": str(self.folder / name), **changes})
        path = write_experiment(self.folder / f"{name}.yaml", task)
        (self.folder / "faults.json").write_text(json.dumps(faults))
        script = [str(ROOT / "tests/support/faulty.py"), str(ROOT / "recipes/ppo.py"), "--config", str(path)]
        more = ["--resume"] if resume else []
        return launch([*script, *more], self.folder, processes=2, stage=stage, seconds=SECONDS)

    def trained(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors that a run has left."""
        files = sorted((self.folder / name).glob("[pv]*/*.safetensors"))
        return {f"{file.parent.name}:{key}": value for file in files for key, value in load_file(file).items()}

    def records(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's log."""
        return [json.loads(line) for line in (self.folder / name / "log.jsonl").read_text().splitlines()]

    def assert_same(self, name: str, other: str, **tolerance: float) -> None:
        """Both runs have trained the same."""
        ours, theirs = self.trained(name), self.trained(other)
        assert ours and ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, msg=named(f"{name}: {key}"), **tolerance)


def fault(rank: int, where: str, number: int, deed: str) -> dict[str, Any]:
    return {"rank": rank, "where": where, "number": number, "deed": deed}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Four updates, one of each rollout, and one that nothing has disturbed."""
    made = Runs(tmp_path_factory.mktemp("faults"), {"run.save_every": 0})
    made.start("straight").succeeded()
    return made


MEMORY = (
    fault(1, "sampling", 3, "memory"),
    fault(1, "update", 1, "memory"),  # a whole micro-batch is done, and dropped
    fault(0, "backward", 6, "memory"),
)


@pytest.mark.parametrize(
    ("name", "stage", "changes"),
    [
        ("ZeRO-3", 3, {}),
        ("ZeRO-3, streamed", 3, {"rollout.mode": "stream"}),
        ("ZeRO-2, recomputed", 2, {"model.gradient_checkpointing": True}),
    ],
)
def test_where_memory_runs_out_on_one_rank_all_try_again_with_less(
    runs: Runs, name: str, stage: int, changes: dict[str, Any]
) -> None:
    """And train what is trained without: the numbers of all updates are equal but for rounding."""
    finished = runs.start(name, *MEMORY, stage=stage, **changes).succeeded()
    runs.assert_same(name, "straight", rtol=1e-5, atol=1e-5)
    records = runs.records(name)
    assert [record.get("perf/rollout_retries") for record in records] == [1.0, None, None, None]
    assert sum(record.get("perf/update_retries", 0) for record in records) == 2
    said = [line for line in finished.output.splitlines() if "is made again" in line or "is sampled again" in line]
    assert len(said) == 3 and all("out of memory" in line for line in said), "rank 0 says each once"
