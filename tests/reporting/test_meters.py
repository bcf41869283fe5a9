"""Means over micro-batches and ranks, weighted by what they are means of."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_toolkit.reporting import meters
from rlhf_toolkit.reporting.meters import Clock, Meter, combined


def test_the_mean_is_weighted_by_counts_over_all_ranks() -> None:
    first, second = Meter(), Meter()
    first.add("a", 3.0, 2)
    first.add("a", 1.0, 1)
    second.add("a", 20.0, 5)
    second.add("only here", 8.0, 4)
    assert combined([first.take(), second.take()]) == {"a": 24.0 / 8, "only here": 2.0}


def test_tensors_are_read_once_and_count_as_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the meter is read nothing asks a tensor for its number, which is what makes a CPU wait for a GPU."""
    draw, plain, held = random.Random(0), Meter(), Meter()
    reads, names = [], ("item", "tolist", "__float__", "__int__", "__bool__", "cpu")
    for name in names:
        real = getattr(torch.Tensor, name)

        def watched(self: Any, *args: Any, name: str = name, real: Any = real) -> Any:
            reads.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)
    for number in range(60):
        total, count = torch.tensor(draw.gauss(0, 1e3), requires_grad=True), draw.randint(1, 10**7)
        held.add(f"metric {number % 7}", total, torch.tensor(count) if number % 2 else count)
        assert not reads
        plain.add(f"metric {number % 7}", total.item(), float(count))
        reads.clear()
    taken = held.take()
    assert reads == ["tolist"]
    assert taken == plain.take(), "to the last bit: sums are in float64 as Python's are"


def test_taking_empties_the_meter() -> None:
    meter = Meter()
    meter.add("a", 1.0, 1)
    meter.take()
    assert combined([meter.take()]) == {}


def test_a_count_of_zero_is_not_divided_by() -> None:
    meter = Meter()
    meter.add("a", 0.0, 0)
    assert combined([meter.take()]) == {"a": 0.0}


def test_the_clock_adds_up_phases_and_starts_anew() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.phase("work"):
            time.sleep(0.02)
    with pytest.raises(ValueError), clock.phase("failed"):
        raise ValueError
    seconds = clock.take()
    assert seconds["work"] >= 0.04 and seconds["step"] >= seconds["work"] and "failed" in seconds
    assert set(clock.take()) == {"step"}


def test_what_is_apart_belongs_to_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation between two rollouts: neither the step nor any of its phases counts it."""
    ticks = iter([0.0, 1.0, 3.0, 10.0, 11.0, 12.0, 15.0, 18.0, 20.0, 30.0])
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    clock, heard = Clock(), list[tuple[str, ...]]()
    clock.onlooker = SimpleNamespace(
        begins=lambda name, count: heard.append((name, str(count))),
        advances=lambda: heard.append(("one",)),
        ends=lambda name: heard.append((name, "ends")),
    )
    with clock.phase("gen", 2):
        clock.advance()
    with clock.apart("testing") as seconds, clock.phase("gen"):
        pass
    assert seconds == {"testing": 10.0}
    assert clock.take() == {"gen": 2.0, "step": 20.0}
    nested = [("testing", "0"), ("gen", "0"), ("gen", "ends"), ("testing", "ends")]
    assert heard == [("gen", "2"), ("one",), ("gen", "ends"), *nested]


def test_a_step_is_the_time_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the steps of a run add up to the run."""
    ticks = iter([0.0, 1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    clock = Clock()
    with clock.phase("work"):
        pass
    assert [clock.take(), clock.take()] == [{"work": 2.0, "step": 10.0}, {"step": 4.0}]
