"""Calling a reward function in this process, and what it may return."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_toolkit.rewards.calls import (
    LARGEST,
    Batch,
    Fault,
    Outcome,
    checked,
    from_json,
    is_async,
    outcome_of,
    to_json,
)
from rlhf_toolkit.rewards.signatures import Asked, asked
from tests.support import misbehaving
from tests.support.offenders import for_each

RESPONSES = ["r0", "r1"]
BATCH = Batch(["one\nline", "two"], RESPONSES, [[11, 12, 13], [14]], {"label": [5, 7], "x": ["a", "b"]})


def called(function: Callable[..., Any], batch: Batch = BATCH, **kwargs: Any) -> Outcome:
    return outcome_of(function, batch, kwargs)


def fault_of(outcome: Outcome, position: int | None = None) -> Fault:
    """The fault of a call, or of the response at ``position``, whose texts have to be one line."""
    found = outcome[position] if isinstance(outcome, list) and position is not None else outcome
    assert isinstance(found, Fault) and "\n" not in found.what + found.way_out
    return found


# ---- calling ---------------------------------------------------------------------------------------------------------


def test_texts_columns_and_kwargs_arrive_by_name() -> None:
    def function(
        prompts: list[str], responses: list[str], *, label: list[int], x: list[str], scale: float
    ) -> list[float]:
        assert (prompts, responses, x) == (["one\nline", "two"], ["r0", "r1"], ["a", "b"])
        return [scale * number for number in label]

    assert called(function, scale=0.5) == [2.5, 3.5]


def test_any_names_for_prompts_and_responses() -> None:
    assert called(lambda p, r, **_: [len(p), len(r)]) == [2.0, 2.0]


def test_a_function_cannot_change_what_it_is_given() -> None:
    def function(prompts: list[str], responses: list[str], tokens: list[list[int]], **_: Any) -> list[float]:
        prompts.clear()
        responses.clear()
        tokens[0].clear()
        tokens.clear()
        return [0.0, 0.0]

    called(function)
    assert (len(BATCH.prompts), RESPONSES, BATCH.tokens) == (2, ["r0", "r1"], [[11, 12, 13], [14]])


def test_tokens_go_to_a_function_that_names_them_and_to_no_other() -> None:
    def asks(prompts: list[str], responses: list[str], tokens: list[list[int]], **_: Any) -> list[int]:
        return [len(each) for each in tokens]

    def open_ended(prompts: list[str], responses: list[str], **columns: Any) -> list[bool]:
        return ["tokens" in columns] * 2

    assert called(asks) == [3.0, 1.0]
    assert called(open_ended) == [0.0, 0.0]


# ---- what it returns -------------------------------------------------------------------------------------------------


@for_each(
    "scores",
    [
        [1, 0.5],
        (1, 0.5),
        [True, 0.5],
        np.array([1, 0.5]),
        np.array([1, 0.5], dtype=np.float32),
        [np.int64(1), np.float32(0.5)],
        [np.bool_(True), np.array(0.5)],
        torch.tensor([1, 0.5]),
        torch.tensor([1, 0.5], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1), torch.tensor(0.5)],
    ],
    ids=repr,
)
def test_any_kind_of_number(scores: Any) -> None:
    result = checked(scores, [3, 1])
    assert result == [1.0, 0.5]
    assert [type(score) for score in result] == [float, float]


@for_each(
    "row",
    [
        [1, True, 0.5],
        (1, 1, 0.5),
        np.array([1, 1, 0.5]),
        torch.tensor([1, 1, 0.5]),
        [torch.tensor(1.0), 1, np.int64(0)],
    ],
    ids=repr,
)
def test_numbers_for_tokens(row: Any) -> None:
    result = checked([row, 7], [3, 1])
    assert result == [[1.0, 1.0, float(row[2])], 7.0]
    assert isinstance(result, list) and isinstance(result[0], list)
    assert [type(number) for number in result[0]] == [float] * 3


@for_each(
    "score, shown",
    [
        (None, "None (NoneType)"),
        ("1.0", "'1.0' (str)"),
        (float("nan"), "nan (float)"),
        (float("inf"), "inf (float)"),
        (-float("inf"), "-inf (float)"),
        (1e39, "1e+39 (float)"),
        (10**400, "1" + "0" * 199 + "... (int)"),
        (1j, "1j (complex)"),
        ({0: 1.0}, "{0: 1.0} (dict)"),
        (torch.tensor(float("nan")), "tensor(nan) (Tensor)"),
        (np.float32("inf"), "np.float32(inf) (float32)"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_score_that_is_no_finite_number(score: Any, shown: str) -> None:
    outcome = called(lambda *texts, **columns: [0.0, score])
    assert isinstance(outcome, list) and outcome[0] == 0.0
    fault = fault_of(outcome, 1)
    assert fault.what == f"gave score {shown}"
    assert fault.way_out == "return a finite number for each response, or one for each of its tokens"


@for_each(
    "score, what",
    [
        ([0.5], "gave 1 numbers for a response of 3 tokens"),
        ([], "gave 0 numbers for a response of 3 tokens"),
        (torch.zeros(4), "gave 4 numbers for a response of 3 tokens"),
        ([0.5, float("nan"), 0.5], "gave nan (float) for token 1"),
        ([0.5, 0.5, None], "gave None (NoneType) for token 2"),
        ([0.5, [0.5], 0.5], "gave [0.5] (list) for token 1"),
        (np.zeros((3, 1)), "gave [0.0] (list) for token 0"),
        (torch.tensor([0.0, 0.0, float("inf")]), "gave inf (float) for token 2"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_numbers_that_do_not_fit_the_tokens(score: Any, what: str) -> None:
    assert fault_of(checked([score, 0.0], [3, 1]), 0).what == what


def test_the_largest_number_of_float32() -> None:
    assert torch.finfo(torch.float32).max == LARGEST
    assert checked([LARGEST, -LARGEST], [1, 1]) == [LARGEST, -LARGEST]
    assert fault_of(checked([LARGEST * (1 + 1e-9)], [1]), 0).what.startswith("gave score 3.4")


@pytest.mark.parametrize("scores", [[], [1.0], [1.0] * 3, torch.zeros(5)])
def test_the_wrong_number_of_scores(scores: Any) -> None:
    fault = fault_of(called(lambda *texts, **columns: scores))
    assert fault.what == f"returned {len(scores)} scores"
    assert fault.way_out == "return one number for each of the 2 responses"


@for_each(
    "scores, shown",
    [
        (None, "None (NoneType)"),
        (1.0, "1.0 (float)"),
        ("ab", "'ab' (str)"),
        (b"ab", "b'ab' (bytes)"),
        ({"a": 1, "b": 2}, "{'a': 1, 'b': 2} (dict)"),
        ({1.0, 2.0}, "{1.0, 2.0} (set)"),
        (torch.tensor(1.0), "tensor(1.) (Tensor)"),
    ],
)
def test_something_else_than_a_list(scores: Any, shown: str) -> None:
    fault = fault_of(called(lambda *texts, **columns: scores))
    assert fault.what == f"returned {shown}"
    assert fault.way_out == "return one number for each of the 2 responses"


# ---- raising ---------------------------------------------------------------------------------------------------------


def test_a_function_that_raises() -> None:
    original = ZeroDivisionError("by\nzero")

    def function(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        raise original

    fault = fault_of(called(function))
    assert fault.what == "raised ZeroDivisionError: by zero"
    assert fault.way_out == "repair the function (see its traceback)"
    assert fault.cause is original
    assert traceback.extract_tb(original.__traceback__)[-1].name == "function"


def test_a_function_that_takes_no_columns() -> None:
    fault = fault_of(called(lambda prompts, responses: [0.0, 0.0]))
    assert "unexpected keyword argument 'label'" in fault.what
    assert fault.way_out == "columns and kwargs arrive by name, so let it take **columns"


def raising(raised: type[BaseException]) -> Callable[..., list[float]]:
    def function(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        raise raised

    return function


def test_an_interrupt_is_not_an_error_of_the_reward() -> None:
    with pytest.raises(KeyboardInterrupt):
        called(raising(KeyboardInterrupt))


@pytest.mark.parametrize("raised", [SystemExit, GeneratorExit, asyncio.CancelledError])
def test_an_exit_is_an_error_of_the_reward_and_not_of_the_run(raised: type[BaseException]) -> None:
    assert fault_of(called(raising(raised))).what.startswith(f"raised {raised.__name__}")


# ---- what columns may be called --------------------------------------------------------------------------------------


def test_what_a_function_asks_for() -> None:
    def options(p: list[str], r: list[str], label: list[int], *, scale: float = 1.0, **columns: Any) -> list[float]:
        return []

    def tokens(prompts: list[str], responses: list[str], /, tokens: Any = None) -> list[float]:
        return []

    assert asked(options) == Asked(
        "options", options=frozenset({"scale"}), texts=frozenset({"p", "r"}), needs=frozenset({"label"})
    )
    assert asked(tokens) == Asked("tokens", tokens=True, open=False)
    assert asked(lambda *texts, **columns: []) == Asked("<lambda>")


# ---- what a worker sends ---------------------------------------------------------------------------------------------


def test_an_outcome_comes_back_as_it_went() -> None:
    outcome: Outcome = [0.1, [1e-30, 2.0], Fault("gave x", "repair it"), -LARGEST]
    assert from_json(to_json(outcome), [1, 2, 1, 1]) == outcome
    try:
        raise LookupError("nobody")
    except LookupError as error:
        fault = Fault("raised", "repair it", again=True, cause=error)
    found = from_json(to_json(fault), [1])
    assert isinstance(found, Fault) and (found.what, found.way_out, found.again) == ("raised", "repair it", True)
    assert "LookupError: nobody" in str(found.cause)


@for_each(
    "sent",
    [
        *(b"", b"\x80\x04N.", b"null", b"[]", b"{}", b'{"scores": 3}', b'{"scores": [NaN]}', b'{"scores": [1e999]}'),
        *(b'{"scores": [1, 2]}', b'{"scores": [[1, 2]]}', b'{"scores": [{"what": 1}]}', b'{"fault": 3}', b"[" * 9**5),
        *(b'{"scores": ["1"]}', b'{"fault": {"what": "x"}}', b"\xff\xfe", b'{"scores": [null]}'),
    ],
)
def test_whatever_a_worker_sends_is_a_number_or_a_fault(sent: bytes) -> None:
    found = from_json(sent, [1])
    assert isinstance(found, Fault) or isinstance(found[0], Fault)


def test_what_it_returns_may_raise_when_it_is_read() -> None:
    class Lazy(list[float]):
        def __iter__(self) -> Any:
            raise OSError("the file is gone")

    assert fault_of(called(lambda *texts, **columns: Lazy([1.0, 2.0]))).what == "raised OSError: the file is gone"


# ---- async -----------------------------------------------------------------------------------------------------------


def limited(function: Callable[..., Any], timeout: float) -> Outcome:
    return outcome_of(function, BATCH, {}, timeout=timeout)


def test_an_async_function_is_awaited_and_so_is_what_a_plain_one_returns() -> None:
    async def function(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0, 2.0]

    assert limited(function, 60) == called(function) == [1.0, 2.0]
    assert called(lambda *texts, **columns: function(*texts, **columns)) == [1.0, 2.0]
    assert is_async(function) and not is_async(called)


def test_an_object_with_an_async_call() -> None:
    class Judge:
        async def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
            return [1.0, 2.0]

    assert is_async(Judge()) and called(Judge()) == [1.0, 2.0]


def test_an_async_function_is_cancelled_at_its_limit() -> None:
    cancelled = []

    async def function(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return [1.0, 2.0]

    assert fault_of(limited(function, 0.05)).what == "took longer than its 0.05 s"
    assert cancelled == [True]


def test_a_timeout_error_of_the_functions_own_is_not_the_limit() -> None:
    async def function(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        raise TimeoutError("the database")

    assert fault_of(limited(function, 60)).what == "raised TimeoutError: the database"


@pytest.mark.parametrize(("name", "shown"), [("generates", "(generator)"), ("generates_gently", "(async_generator)")])
def test_a_generator_is_no_list(name: str, shown: str) -> None:
    fault = fault_of(called(getattr(misbehaving, name)))
    assert fault.what.startswith("returned <") and fault.what.endswith(shown)
