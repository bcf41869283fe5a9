"""The window's hooks and the vote of ranks in step, in one process. Real shards: ``test_zero3_on_two_ranks.py``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_toolkit.distributed import collectives, streaming, zero3
from rlhf_toolkit.distributed.streaming import InStep, streamed
from rlhf_toolkit.distributed.zero3 import (
    element_count,
    full_shape,
    gathered,
    is_here,
    is_partitioned,
    is_sharded,
    offloads_optimizer,
    whole,
    zero_stage,
)
from rlhf_toolkit.errors import DataError

# ---- the window's hooks ----------------------------------------------------------------------------------------------


class Hooked:
    """What ``gathered`` sees of an engine: a plain module with real hooks that note each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        for parameter in self.model.parameters():
            parameter.ds_persist = True  # type: ignore[attr-defined]
        offload = SimpleNamespace(module=self.model, forward_hooks=[], backward_hooks=[])
        offload.fwd_pre_hook = self.model.register_forward_pre_hook(self.note("start"))
        for number, layer in enumerate(self.model):
            offload.forward_hooks.append(layer.register_forward_pre_hook(self.note(f"fetch {number}")))
            offload.forward_hooks.append(layer.register_forward_hook(self.note(f"release {number}")))
            offload.backward_hooks.append(layer.register_forward_hook(self.note(f"backward {number}")))
        monkeypatch.setattr(zero3, "parameter_offload_of", lambda model: offload)

    def note(self, name: str) -> Callable[..., None]:
        return lambda *_: self.calls.append(name)

    def heard(self) -> list[str]:
        """The hooks that a pass calls, in order."""
        self.calls.clear()
        self.model(torch.zeros(1, 2))
        return list(self.calls)


HEARD = ["start", "fetch 0", "release 0", "backward 0", "fetch 1", "release 1", "backward 1"]


def test_hooks_come_off_and_go_back_on_once_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked = Hooked(monkeypatch)
    assert hooked.heard() == HEARD
    for _ in range(2):
        with gathered(hooked.model):
            assert hooked.heard() == []
        assert hooked.heard() == HEARD


@pytest.mark.parametrize("error", [DataError("a bad row"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_hooks_go_back_on_after_an_exception(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked = Hooked(monkeypatch)
    with pytest.raises(type(error)), gathered(hooked.model):
        raise error
    assert hooked.heard() == HEARD


def test_hooks_go_back_on_where_the_gather_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out."""
    hooked = Hooked(monkeypatch)

    @contextmanager
    def out_of_memory(parameters: Any) -> Iterator[None]:
        raise MemoryError("no room for the base")
        yield

    monkeypatch.setattr(zero3, "whole", out_of_memory)
    with pytest.raises(MemoryError), gathered(hooked.model):
        pytest.fail("there is no window")
    assert hooked.heard() == HEARD


def test_without_zero_3_there_is_nothing_to_do() -> None:
    model = nn.Linear(3, 2)
    with gathered(model), whole(model.parameters(), write=True), streamed(model) as pace, pace.together():
        with pace.forward_pass():
            model(torch.zeros(1, 3))
        pace.until_others_finish(lambda: pytest.fail("nobody is waiting"))
    assert (zero_stage(model), is_sharded(model), offloads_optimizer(model)) == (0, False, False)
    weight: Any = model.weight
    assert not is_partitioned(weight) and is_here(weight)
    assert full_shape(weight) == (2, 3) and element_count(weight) == 6


# ---- in step: ranks that are threads ---------------------------------------------------------------------------------


class Threads:
    """Ranks that are threads of this process; whoever waits longer than a few seconds fails."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.mine, self.values = count, threading.local(), [None] * count
        self.barrier = threading.Barrier(count, timeout=10)
        monkeypatch.setattr(streaming, "largest", lambda value: max(self.all_gather(value)))
        monkeypatch.setattr(collectives, "all_gather", self.all_gather)

    def all_gather(self, value: Any) -> list[Any]:
        self.values[self.mine.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What ``work`` returned or raised on each rank."""
        found: list[Any] = [None] * self.count

        def rank(number: int) -> None:
            self.mine.rank = number
            try:
                found[number] = work(number)
            except BaseException as error:
                found[number] = error

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("passes", [(1, 1), (0, 3), (4, 0, 2), (5, 1, 1, 5)])
def test_all_ranks_run_as_many_passes_as_the_busiest(passes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, announced = Threads(len(passes), monkeypatch), [0] * len(passes)

    def work(number: int) -> tuple[int, int]:
        def new_pass() -> None:
            announced[number] += 1

        pace, idle = InStep(new_pass), []
        with pace.together():
            for _ in range(passes[number]):
                with pace.forward_pass():
                    pass
            pace.until_others_finish(lambda: idle.append(1))
        return passes[number], len(idle)

    most = max(passes)
    assert ranks.run(work) == [(own, most - own) for own in passes]
    assert announced == [most] * len(passes), "each pass is announced to ZeRO, also an idle one"


def test_streamed_passes_are_announced_to_zeros_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts modules from the root, where a pass of decoding does not begin."""
    announced: list[str] = []
    coordinator = SimpleNamespace(reset_step=lambda: announced.append("reset"))
    offload = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    monkeypatch.setattr(streaming, "parameter_offload_of", lambda model: offload)
    with streamed(nn.Linear(1, 1)) as pace:
        assert announced == []
        for number in (1, 2):
            with pace.forward_pass():
                assert announced == ["reset"] * number, "before the pass, not behind it"


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failure_between_passes_is_raised_by_all(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the others are: before a pass, or keeping company."""
    passes = (1, 3, 5)
    ranks, ran = Threads(3, monkeypatch), [0, 0, 0]

    def work(number: int) -> None:
        def one() -> None:
            ran[number] += 1

        pace = InStep(lambda: None)
        with pace.together():
            for done in range(passes[number]):
                if number == 2 and done == after:
                    raise DataError("a bad row")
                with pace.forward_pass():
                    one()
            pace.until_others_finish(one)

    first, second, own = ranks.run(work)
    assert isinstance(own, DataError) and str(own) == "a bad row"
    for other in (first, second):
        assert isinstance(other, DataError) and str(other) == "rank 2 failed in sampling: a bad row"
    assert ran == [after] * 3


def test_a_failure_within_a_pass_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait in the middle of a layer: a vote would wait for them for ever."""
    votes: list[int] = []

    def vote(mine: int) -> int:
        votes.append(mine)
        return mine

    monkeypatch.setattr(streaming, "largest", vote)
    monkeypatch.setattr(streaming, "raise_together", lambda *_: pytest.fail("a collective"))
    pace = InStep(lambda: None)
    with pytest.raises(MemoryError), pace.together(), pace.forward_pass():
        raise MemoryError("in a layer")
    assert votes == [streaming.GOES_ON]

    def idle() -> None:
        raise MemoryError("in a layer")

    company = InStep(lambda: None)
    monkeypatch.setattr(streaming, "largest", lambda mine: streaming.GOES_ON)
    with pytest.raises(MemoryError), company.together():
        company.until_others_finish(idle)
