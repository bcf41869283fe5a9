"""The short form of ``python -m tests.reliability.corruptions``: what damages do, how doors are judged, a few cases."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.reliability.corruptions import Case, cases_of, judge_case, sound_results, spoiling
from tests.reliability.damage import CANARY, JSON, SAFETENSORS, SILENT_FLIPS, Named, damages_of, pickled, torch_archive
from tests.reliability.doors import Door, World, judge
from tests.support.forked import shared

CHANGED_TENSORS = (
    "a tensor missing",
    "no tensors",
    "one tensor more",
    "tensors renamed",
    "another shape",
    "a scalar",
    "whole numbers",
    "NaN in it",
    "an empty header",
)
"""These can be read and say something else."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"), shared())
    made.make()
    return made


def weights(folder: Path) -> Path:
    save_file({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2)}, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize("named", SAFETENSORS, ids=lambda named: named.name)
def test_every_damage_of_weights_is_one(tmp_path: Path, named: Named) -> None:
    path = weights(tmp_path)
    sound = load_file(path)
    named.damage(path)
    if named.name not in CHANGED_TENSORS:
        with pytest.raises((SafetensorError, OSError)):
            load_file(path)
        return
    try:
        found = load_file(path)
    except SafetensorError:
        return
    same = found.keys() == sound.keys() and all(
        found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in sound.items()
    )
    assert not same


@pytest.mark.parametrize("named", JSON, ids=lambda named: named.name)
def test_every_damage_of_json_is_one(tmp_path: Path, named: Named) -> None:
    path, sound = tmp_path / "x.json", {"r": 4, "name": "a", "rate": 0.5, "inner": {"step": 3}}
    path.write_text(json.dumps(sound))
    named.damage(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    assert found != sound


def test_a_pickle_leaves_the_canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a door that loads one would pass for one that does not."""
    monkeypatch.setenv(CANARY, str(tmp_path / "canary"))
    pickle.loads(pickled())
    assert (tmp_path / "canary").read_text() == "executed"
    (tmp_path / "canary").unlink()
    (tmp_path / "state.pt").write_bytes(torch_archive())
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


BAD_DOORS = {
    "EXECUTED": f"import os; open(os.environ[{CANARY!r}], 'w').write('x')",
    "WRITTEN OUTSIDE": "import sys, pathlib; pathlib.Path(sys.argv[1], '../outside/x').write_text('x')",
    "TRACEBACK": "raise KeyError('r')",
    "refused": "from rlhf_toolkit.errors import *\nwith reported():\n    raise ModelError('r=-7 is not 1 or more')",
    "ACCEPTED": "print('another result')",
    "harmless": "print('sound')",
}


@pytest.mark.parametrize("word", BAD_DOORS)
def test_every_verdict_is_given(tmp_path: Path, word: str) -> None:
    world = World(tmp_path, shared())
    for place in (world.work, world.outside, world.notes):
        place.mkdir()
    script = tmp_path / "door.py"
    script.write_text(BAD_DOORS[word])
    door = Door("a door", str(script), lambda work: [str(work)], lambda world, finished: finished.output)
    assert judge(door, world, "sound\n").word == word


def test_there_are_enough_cases_of_every_kind(world: World) -> None:
    counts = Counter(case.door for case in cases_of(world))
    assert sum(counts.values()) >= 400 and min(counts.values()) >= 20, counts


def test_what_has_been_spoiled_is_not_taken(world: World) -> None:
    """One of each way: a door that reads JSON, one that reads weights, one that goes on from a checkpoint."""
    file = "run.json"
    named = next(each for each in damages_of(Path(file)) if each.name == "deep lists")
    cases = [
        Case(f"half/{file}", named.name, "--resume", spoiling(f"half/{file}", named)),
        Case("done/summary.json", named.name, "report", spoiling("done/summary.json", named)),
    ]
    sound = sound_results(world, ["--resume", "report"])
    assert [judge_case(case, world, sound).word for case in cases] == ["refused", "refused"]
    silent = SILENT_FLIPS[2]
    silent.damage(world.work / "half/log.jsonl")
    assert (world.work / "half/log.jsonl").read_bytes() != (world.pristine / "half/log.jsonl").read_bytes()


@pytest.fixture(autouse=True)
def _environment() -> Iterator[Any]:
    before = os.environ.get("RLHF_TESTS_OUTSIDE")
    yield
    if before is None:
        os.environ.pop("RLHF_TESTS_OUTSIDE", None)
