"""The short form of ``python -m tests.strangers``: some cases of each door, others with every day's seed kept out."""

from __future__ import annotations

import importlib
import os
import time

import pytest

from rlhf_toolkit.errors import DataError
from tests.strangers import frame, ground
from tests.support.offenders import for_each

SEED = 20
COUNTS = {"yaml": 30, "adapters": 16, "bases": 14, "run_folders": 20, "templates": 5, "terminal": 15, "secrets": 11}
COUNTS |= {"data_files": 6, "rows": 15, "gym_answers": 40, "reward_returns": 8, "http": 12}


@for_each("door", sorted(COUNTS))
def test_a_door_keeps_strangers_out(door: str) -> None:
    results = frame.try_door(door, SEED, COUNTS[door])
    assert len(results) >= COUNTS[door] // 2
    assert [result for result in results if result.bad] == []


class Door:
    """A door that lets everything in, in each of the ways that a case may end."""

    LIMIT = 1.0

    @staticmethod
    def cases(seed: int, count: int) -> list[str]:
        return ["refused", "long", "bare", "taken", "hung", "executed", "outside", "fetched", "killed", "escape"]

    @staticmethod
    def run(case: str) -> str:
        if case == "refused":
            raise DataError("a line")
        if case == "long":
            raise DataError("x" * 3000)
        if case == "bare":
            raise ValueError("x")
        if case == "hung":
            time.sleep(60)
        if case == "executed":
            os.system(ground.here().filled("{COMMAND}"))
        if case == "outside":
            (ground.here().outside / "victim").write_text("other")
        if case == "fetched":
            import urllib.request

            urllib.request.urlopen(ground.here().url, timeout=0.2)
        if case == "killed":
            os.kill(os.getpid(), 11)
        if case == "escape":
            error = DataError()
            error.__class__ = type("Raw", (DataError,), {"__str__": lambda self: "\x1b[2J"})
            raise error
        return frame.WRONGLY


def test_the_frame_sees_whatever_a_stranger_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: Door)
    results = {result.case.strip("'"): result for result in frame.try_door("door", 0)}
    assert {case: result.ending for case, result in results.items()} == {
        "refused": frame.REFUSED,
        "long": frame.REFUSED,
        "bare": frame.BARE,
        "taken": frame.WRONGLY,
        "hung": frame.HUNG,
        "executed": frame.WRONGLY,
        "outside": frame.WRONGLY,
        "fetched": frame.BARE,
        "killed": frame.BARE,
        "escape": frame.WRONGLY,
    }
    harms = {case: {harm.partition(":")[0] for harm in result.harms} for case, result in results.items()}
    assert {case: kinds for case, kinds in harms.items() if kinds} == {
        "executed": {"executed"},
        "outside": {"written"},
        "fetched": {"fetched"},
    }
    assert frame.totals(list(results.values())).startswith("10 tried: 2 refused, 0 accepted rightly; 3 bare tracebacks")


def test_a_sound_folder_is_taken() -> None:
    """Or a door that refuses everything would pass."""
    for door in ("adapters", "bases", "run_folders"):
        module = __import__(f"tests.strangers.{door}", fromlist=["cases"])
        chosen = [case for case in module.cases(0, 300) if case.name.endswith(": nothing")]
        spy = type("Spy", (), {"cases": staticmethod(lambda seed, count, c=chosen: c), "run": staticmethod(module.run)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib, "import_module", lambda name, s=spy: s)
            assert {result.ending for result in frame.try_door(door, 0)} == {frame.RIGHTLY}
