"""What ranks tell each other: every value in rank order on every rank, and one rank's failure on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import _get_default_group

from rlhf_toolkit.distributed import collectives
from rlhf_toolkit.distributed.collectives import (
    Failure,
    agreement,
    all_gather,
    any_rank,
    barrier,
    failure_of,
    from_main,
    largest,
    on_main,
    raise_together,
    rank,
    told_by,
    world_size,
)
from rlhf_toolkit.distributed.topology import TIMEOUT_MINUTES, Topology, free_memory
from rlhf_toolkit.errors import DataError, RewardError, RLHFError, reported
from tests.support.launch import run_worker

LATE = 0.4  # seconds that rank 1 is late at the barrier


# ---- two ranks -------------------------------------------------------------------------------------------------------


class ForeignError(Exception):
    """An error whose class the other rank might not have."""


def values_of(number: int) -> list[Any]:
    """What rank ``number`` gives away: objects, and tensors of a shape and a dtype of its own."""
    own = torch.arange(3 + number, dtype=torch.float64).roll(number)
    return [number, f"rank {number}", {"rows": [number] * (number + 1)}, None if number else (), own, own.bfloat16()]


def failing(number: int, failures: dict[int, Exception]) -> Callable[[], None]:
    def work() -> None:
        if number in failures:
            raise failures[number]

    return work


def ending(work: Callable[[], None], phase: str = "the phase") -> tuple[str, str, list[str]]:
    """How ``agreement`` around ``work`` ends here: class, message and notes, or no error at all."""
    try:
        with agreement(phase):
            work()
    except Exception as error:
        return type(error).__name__, str(error), list(getattr(error, "__notes__", ()))
    return "", "", []


def told(topology: Topology) -> dict[str, Any]:
    """What every collective says on this rank. Each line is one collective, or one agreement, on all ranks."""
    me = topology.rank
    if me == 1:
        time.sleep(LATE)
    arrived = time.monotonic()  # one clock for all processes of a machine
    barrier()
    left = time.monotonic()
    return {
        "here": (rank(), world_size(), topology.is_main),
        "arrived": arrived,
        "left": left,
        "gathered": [all_gather(value) for value in values_of(me)],
        "from main": from_main(f"said by {me}"),
        "largest": [largest(value) for value in (me, -3 - me, 2**60 + me)],
        "any rank": [any_rank(flag) for flag in (False, me == 0, me == 1, True)],
        "nobody fails": ending(failing(me, {})),
        "rank 1 fails": ending(failing(me, {1: DataError("row 7 is empty")}), "reading"),
        "rank 0 fails with a foreign error": ending(failing(me, {0: ForeignError("no such thing")})),
        "both fail": ending(failing(me, {0: DataError("mine"), 1: RewardError("mine")})),
        "only rank 0 works": on_main(lambda: f"done by {me}"),
        "only rank 0 fails": ending(lambda: on_main(failing(me, {0: DataError("disk")})), "outside"),
        "patience": _get_default_group()._get_backend(torch.device("cpu")).options._timeout,  # type: ignore[attr-defined]
        "free": free_memory(torch.device("cpu")),
        "still in step": all_gather(me),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks were told."""
    return run_worker("tests.distributed.test_collectives:told", tmp_path_factory.mktemp("told"), seconds=300)


def test_every_rank_has_every_value_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    assert [found["here"] for found in ranks] == [(0, 2, True), (1, 2, False)]
    expected = list(zip(values_of(0), values_of(1), strict=True))
    for found in ranks:
        for values, (first, second) in zip(found["gathered"], expected, strict=True):
            if isinstance(first, torch.Tensor):
                assert torch.equal(values[0], first) and torch.equal(values[1], second)
                assert values[0].dtype == first.dtype
            else:
                assert values == [first, second]
        assert found["from main"] == "said by 0"


def test_the_largest_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["largest"] == [1, -3, 2**60 + 1], "also of integers that no float holds"
        assert found["any rank"] == [False, True, True, True]


def test_nobody_passes_a_barrier_before_the_last(ranks: list[dict[str, Any]]) -> None:
    assert max(found["arrived"] for found in ranks) <= min(found["left"] for found in ranks)


def test_what_one_rank_fails_with_all_raise(ranks: list[dict[str, Any]]) -> None:
    other, own = (found["rank 1 fails"] for found in ranks)
    assert own == ("DataError", "row 7 is empty", []), "the rank itself raises what it raised"
    assert other[:2] == ("DataError", "rank 1 failed in reading: row 7 is empty")
    (note,) = other[2]
    assert note.startswith("--- traceback of rank 1 ---") and "raise failures[number]" in note


def test_an_error_of_an_unknown_class_is_told_as_ours(ranks: list[dict[str, Any]]) -> None:
    own, other = (found["rank 0 fails with a foreign error"] for found in ranks)
    assert own == ("ForeignError", "no such thing", [])
    assert other[0] == RLHFError.__name__
    assert other[1].startswith("rank 0 failed in the phase: ") and "no such thing" in other[1]
    assert "ForeignError: no such thing" in other[2][0]


def test_a_rank_that_failed_raises_its_own_error(ranks: list[dict[str, Any]]) -> None:
    assert [found["both fail"][:2] for found in ranks] == [("DataError", "mine"), ("RewardError", "mine")]
    assert [found["nobody fails"] for found in ranks] == [("", "", [])] * 2


def test_what_only_rank_0_does_all_know(ranks: list[dict[str, Any]]) -> None:
    assert [found["only rank 0 works"] for found in ranks] == ["done by 0"] * 2
    first, second = (found["only rank 0 fails"] for found in ranks)
    assert first[:2] == ("DataError", "disk")
    assert second[:2] == ("DataError", "rank 0 failed in the work that only it does: disk")


def test_failures_leave_the_ranks_in_step(ranks: list[dict[str, Any]]) -> None:
    assert [found["still in step"] for found in ranks] == [[0, 1]] * 2


def test_once_they_have_met_ranks_wait_for_one_another_as_long_as_collectives_may(ranks: list[dict[str, Any]]) -> None:
    assert [found["patience"] for found in ranks] == [timedelta(minutes=TIMEOUT_MINUTES)] * 2


def test_free_memory_is_one_number_for_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["free"] == ranks[1]["free"] > 0


# ---- one process -----------------------------------------------------------------------------------------------------


def test_with_one_process_each_is_the_identity() -> None:
    value = object()
    assert (rank(), world_size()) == (0, 1)
    assert all_gather(value) == [value] and from_main(value) is value
    assert [largest(7), largest(-7)] == [7, -7] and [any_rank(True), any_rank(False)] == [True, False]
    barrier()
    raise_together("nothing", None)


def test_an_error_of_one_process_is_raised_as_it_is() -> None:
    error = ForeignError("as it is")
    with pytest.raises(ForeignError) as caught, agreement("alone"):
        raise error
    assert caught.value is error


def test_what_ends_a_process_is_not_told_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever presses Ctrl-C does not wait for a collective."""
    monkeypatch.setattr(collectives, "all_gather", lambda value: pytest.fail("a collective"))
    with pytest.raises(KeyboardInterrupt), agreement("alone"):
        raise KeyboardInterrupt


def test_the_first_rank_that_failed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several failures on other ranks, that of the lowest."""
    failures = [[None], [Failure(DataError, "first", "trace 1")], [Failure(RewardError, "second", "trace 2\n")]]
    monkeypatch.setattr(collectives, "all_gather", lambda value: failures)
    with pytest.raises(DataError) as caught:
        raise_together("sampling", None)
    assert str(caught.value) == "rank 1 failed in sampling: first"
    assert caught.value.__notes__ == ["--- traceback of rank 1 ---\ntrace 1"]


def test_of_a_reward_only_the_user_s_own_stack_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """And of what the toolkit raises on purpose the line alone, wherever it was raised."""
    raised = RewardError("reward f raised LookupError")
    raised.__cause__ = LookupError("nobody knows")
    unforeseen, unread = failure_of(ValueError("a bug")), failure_of(DataError("row 7 is empty"))
    for failure, above in (
        (failure_of(raised), ["--- traceback of rank 1 ---", "LookupError: nobody knows"]),
        (failure_of(RewardError("reward f returned None")), []),
        (unread, []),
        (unforeseen, ["--- traceback of rank 1 ---", "ValueError: a bug"]),
    ):
        with pytest.raises(SystemExit), reported():
            raise told_by(1, "the reward", failure)
        *stack, line = capsys.readouterr().err.splitlines()
        assert stack == above and line == f"{failure.kind.__name__}: rank 1 failed in the reward: {failure.message}"
