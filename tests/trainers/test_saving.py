"""Checkpoints are written beside the run by rank 0, and what goes wrong there reaches all ranks."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_toolkit.checkpoint_files import Contents, complete, newest_sound
from rlhf_toolkit.distributed.collectives import all_gather
from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.trainers import saving
from rlhf_toolkit.trainers.saving import CheckpointWriter
from tests.support.launch import run_worker


def contents(step: int) -> Contents:
    return Contents(step, {"step": step}, {"optimizer.safetensors": {"a": torch.ones(2)}})


def roles(place: Path) -> None:
    (place / "policy").mkdir(parents=True)


def full(place: Path) -> None:
    raise OSError(28, "No space left on device")


def full_at(folder: Path, contents: Contents) -> Path:
    raise OSError(28, "No space left on device")


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()

    def slow(*args: Any) -> Path:
        assert let_go.wait(20)
        return complete(*args)

    monkeypatch.setattr(saving, "complete", slow)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.write(3, partial(contents, 3), roles, at_once=True)
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint-3.tmp"] and writer.last == 3
    writer.look()
    let_go.set()
    writer.write(6, partial(contents, 6), roles)
    assert (tmp_path / "checkpoint-3").is_dir(), "the next one waits for it"
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    writer.finish()


def test_role_folders_are_written_beside_the_run_too(tmp_path: Path) -> None:
    let_go = threading.Event()

    def slow(place: Path) -> None:
        assert let_go.wait(20)
        roles(place)

    writer = CheckpointWriter(tmp_path, keep=1)
    writer.write(3, partial(contents, 3), slow)
    writer.look()
    assert not list(tmp_path.iterdir()), "the run went on before anything was written"
    let_go.set()
    writer.finish()
    assert newest_sound(tmp_path)[0].step == 3 and (tmp_path / "checkpoint-3/policy").is_dir()


def ending(action: Any) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "went well"


def write_with_failures(topology: Topology, place: str) -> dict[str, Any]:
    """Rank 0 fails in the thread, which the next look or write brings to light, and before it."""
    writer, found = CheckpointWriter(Path(place), keep=2), dict[str, Any]()
    vars(saving)["complete"] = full_at
    writer.write(1, partial(contents, 1), roles)
    while writer._writing is not None and not writer._writing.done():
        time.sleep(0.01)
    found["look"] = ending(writer.look)
    writer.write(2, partial(contents, 2), roles)
    found["write"] = ending(lambda: writer.write(3, partial(contents, 3), roles))
    vars(saving)["complete"] = complete
    found["at once"] = ending(lambda: writer.write(4, partial(contents, 4), full, at_once=True))
    writer.write(6, partial(contents, 6), full)
    found["role folders beside the run"] = ending(writer.finish)
    writer.write(5, partial(contents, 5), roles)
    found["after that"] = ending(writer.finish)
    return {**found, "still in step": all_gather(topology.rank)}


def test_what_fails_on_rank_0_is_raised_on_all(tmp_path: Path) -> None:
    results = run_worker("tests.trainers.test_saving:write_with_failures", tmp_path, place=str(tmp_path))
    for rank, found in enumerate(results):
        for when, step in (("look", 1), ("write", 2), ("at once", 4), ("role folders beside the run", 6)):
            assert f"the checkpoint of step {step} could not be written to {tmp_path}" in found[when]
            assert "No space left on device" in found[when] and "\n" not in found[when]
            assert found[when].startswith("rank 0 failed in the writing of a checkpoint") == (rank == 1)
        assert found["after that"] == "went well" and found["still in step"] == [0, 1]
    assert newest_sound(tmp_path)[0].step == 5
    assert not list(tmp_path.glob(".checkpoint-*")), "what failed leaves nothing"
