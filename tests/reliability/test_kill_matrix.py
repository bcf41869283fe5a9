"""The short form of ``python -m tests.reliability.kill_matrix``, and what its verdicts are worth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.reliability.cells import Bench, Cell, cells_of, ending, has_bare_traceback
from tests.reliability.kinds import KINDS, STEPS, differences, newest_checkpoint
from tests.reliability.strike import PHASES
from tests.support.forked import shared
from tests.support.processes import Finished

SHORT = (
    (Cell("SFT", "write", "SIGKILL", "0"), ("step 2",)),  # the checkpoint of step 4 is not whole when the run is killed
    (Cell("SFT", "update", "SIGTERM", "1"), ("step 3", "step 4")),  # the update is not made, or was at its end
)
"""Cells, and where the run must go on from. A rank killed in an update is in tests/distributed/test_resume.py."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(KINDS["SFT"], tmp_path_factory.mktemp("kills"), shared())
    made.start(made.straight).succeeded()
    return made


@pytest.mark.parametrize(("cell", "steps"), SHORT, ids=str)
def test_a_struck_run_goes_on_to_the_same_bits(bench: Bench, cell: Cell, steps: tuple[str, ...]) -> None:
    outcome = bench.judge(cell)
    assert not outcome.faults
    assert outcome.resumed_from in steps


def test_a_bit_a_record_and_a_file_that_differ_are_seen(bench: Bench, tmp_path: Path) -> None:
    assert newest_checkpoint(bench.straight) == STEPS
    broken = tmp_path / "run"
    shutil.copytree(bench.straight, broken)
    assert differences(bench.straight, broken, "step") == []
    path = broken / "policy/adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 2.0**-20
    save_file(tensors, path)
    lines = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    lines[-1]["eval/loss"] += 1e-9
    (broken / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(bench.straight, broken, "step") == [
        f"policy/adapter_model.safetensors: {name}",
        "log.jsonl: ('eval', 6)",
    ]
    path.unlink()
    assert differences(bench.straight, broken, "step")[0] == "policy/adapter_model.safetensors is missing"


@pytest.mark.parametrize(
    ("signal", "output", "took", "faults"),
    [
        ("SIGTERM", "stopped; go on with: python recipes/sft.py --config x --resume", 2.0, []),
        ("SIGTERM", "Terminated", 2.0, ["no line says how to go on"]),
        ("SIGINT", "Traceback (most recent call last):\n  python recipes/sft.py --resume", 2.0, ["a bare traceback"]),
        ("SIGINT", "python recipes/sft.py --resume", 500.0, ["it hung: 500 s from the signal to the end"]),
        ("SIGKILL", "", 500.0, ["it hung: 500 s from the signal to the end"]),
        ("SIGKILL", "Timeout (0:03:50)!", 1.0, ["it hung: 1 s from the signal to the end"]),
    ],
)
def test_how_a_run_must_end(signal: str, output: str, took: float, faults: list[str]) -> None:
    assert ending(Cell("SFT", "update", signal, "0"), Finished(1, output), took)[1] == faults


def test_a_killed_run_that_ends_well_is_a_fault() -> None:
    assert ending(Cell("SFT", "update", "SIGKILL", "0"), Finished(0, ""), 1.0)[1]


def test_what_another_rank_failed_with_is_no_bare_traceback() -> None:
    told = "RLHFError: rank 1 failed\n--- traceback of rank 1 ---\nTraceback (most recent call last):\n  x"
    assert not has_bare_traceback(told)
    assert has_bare_traceback(f"{told}\nTraceback (most recent call last):\n  y")


def test_every_phase_signal_and_rank_has_a_cell() -> None:
    cells = [cell for kind in KINDS.values() for cell in cells_of(kind)]
    assert len(set(cells)) == len(cells)
    for kind in KINDS.values():
        for phase in PHASES:
            found = {(cell.signal, cell.target) for cell in cells if (cell.kind, cell.phase) == (kind.name, phase)}
            assert (not found) == (phase in kind.without)
            if found and phase != "renamed":
                ranks = {(signal, rank) for signal in ("SIGKILL", "SIGTERM", "SIGINT") for rank in "01"}
                assert found == {*ranks, ("SIGINT", "launcher")}
