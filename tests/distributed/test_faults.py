"""Faults planted into runs of two real ranks: memory that runs out, errors in the middle of a layer, signals, a rank
that stalls. Nothing waits for a collective's timeout, and what goes on goes on as if nothing had been."""

from __future__ import annotations

import json
import re
import time
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
        self,
        name: str,
        *faults: dict[str, Any],
        stage: int = 3,
        resume: bool = False,
        changes: dict[str, Any] | None = None,
    ) -> Finished:
        """Run it as ``name`` on two ranks."""
        task = merged(self.task, {"run.output_dir": str(self.folder / name), **(changes or {})})
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

    def assert_same(self, name: str, other: str, **tolerance: Any) -> None:
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
    fault(0, "roles", 1, "memory"),  # of the first rollout
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
    changes = {**changes, "update.micro_batch_tokens": 128}  # room for three halvings
    finished = runs.start(name, *MEMORY, stage=stage, changes=changes).succeeded()
    runs.assert_same(name, "straight", rtol=1e-5, atol=1e-5)
    records = runs.records(name)
    assert [record.get("perf/rollout_retries") for record in records] == [2.0, None, None, None]
    assert sum(record.get("perf/update_retries", 0) for record in records) == 2
    said = [line for line in finished.output.splitlines() if re.search(r"is (made|sampled|run) again", line)]
    assert len(said) == 4 and all("out of memory" in line for line in said), "rank 0 says each once"


def last_lines(finished: Finished) -> list[str]:
    """The line with which each rank has ended, rank 0's first, without the name of the other."""
    found = re.findall(r"^(\[rank 1\] )?(\w*Error: .*|stopped .*)$", finished.output, flags=re.M)
    return [line for _, line in sorted(found)]


def assert_both_told(finished: Finished, phase: str, runs: Runs) -> None:
    """Rank 1 has failed with an error of its own, and rank 0 with what that was, long before a timeout."""
    assert finished.status not in (0, -9), finished.output[-3000:]
    own = [line for line in finished.output.splitlines() if line == "LookupError: nobody knows"]
    told = f"RLHFError: rank 1 failed in {phase}: LookupError: nobody knows"
    assert own and last_lines(finished).count(told) == 1, finished.output[-3000:]
    assert "Connection closed by peer" not in finished.output


@pytest.mark.parametrize(
    ("where", "phase", "changes"),
    [
        ("update", "the update", {}),
        ("backward", "the update", {}),
        ("sampling", "the first pass", {"rollout.mode": "stream"}),
        ("roles", "the role pass", {"rollout.mode": "stream"}),
        ("roles", "the role pass", {}),
    ],
    ids=["update", "backward", "streamed sampling", "streamed role pass", "role pass"],
)
def test_an_error_in_the_middle_of_a_layer_reaches_the_other_rank(
    runs: Runs, where: str, phase: str, changes: dict[str, Any]
) -> None:
    name = f"{where} {len(changes)}"
    assert_both_told(runs.start(name, fault(1, where, 0, "raise"), changes=changes), phase, runs)


def test_an_error_where_nobody_agrees_reaches_the_other_rank_as_well(runs: Runs) -> None:
    """While the model is built, one rank fails and the other waits in a collective of ZeRO's."""
    finished = runs.start("built", fault(1, "build", 0, "raise"))
    assert finished.status not in (0, -9), finished.output[-3000:]
    assert "RLHFError: rank 1 failed: LookupError: nobody knows; continue with --resume" in last_lines(finished)


@pytest.mark.parametrize(("rank", "where", "number"), [(1, "update", 2), (0, "sampling", 9)])
def test_a_signal_on_one_rank_stops_both_with_a_checkpoint(runs: Runs, rank: int, where: str, number: int) -> None:
    """From which the run goes on to the bits of the one that was not stopped."""
    name = f"stopped in {where}"
    finished = runs.start(name, fault(rank, where, number, "term"))
    assert finished.status == 128 + 15, finished.output[-3000:]
    lines = last_lines(finished)
    assert len(lines) == 1, "rank 0 alone says it"
    done = re.fullmatch(
        r"stopped by SIGTERM after update (\d), with a checkpoint; continue with (.*) --resume", lines[0]
    )
    assert done is not None and 0 < int(done[1]) < 4 and f"--config {runs.folder}" in done[2].replace("'", ""), lines
    assert not (runs.folder / name / "policy").exists()
    runs.start(name, resume=True).succeeded()
    runs.assert_same(name, "straight", rtol=0, atol=0)


def test_a_signal_before_the_first_update_has_nothing_to_save(runs: Runs) -> None:
    finished = runs.start("early", fault(1, "sampling", 1, "term"))
    assert finished.status == 128 + 15, finished.output[-3000:]
    assert re.match(
        r"stopped by SIGTERM before the first update: there is nothing to save; .* --overwrite$",
        last_lines(finished)[0],
    )
    assert not list((runs.folder / "early").glob("checkpoint-*"))


def test_a_rank_that_stalls_is_named_with_its_place_and_ends_the_run(runs: Runs) -> None:
    began = time.monotonic()
    finished = runs.start("stalled", fault(1, "update", 1, "stall"), changes={"run.stall_minutes": 0.05})
    assert finished.status not in (0, -9) and time.monotonic() - began < 60
    lines = last_lines(finished)
    assert len(lines) == 2 and len(set(lines)) == 1, finished.output[-3000:]
    assert re.match(
        r"StallError: rank 1 has not moved for \d+ s, in the update, forward \(models/shared_base", lines[0]
    ), lines
    assert 'tests/support/faulty.py", line' in finished.output, "its stack"


def test_a_rank_that_is_killed_is_no_riddle_to_the_other(runs: Runs) -> None:
    finished = runs.start("killed", fault(1, "update", 1, "die"))
    assert [
        line for line in last_lines(finished) if re.match("RLHFError: another rank.* has ended without a word", line)
    ], finished.output
