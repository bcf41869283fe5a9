"""Loading a reward function, calling it, and what it may return."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_toolkit.errors import ConfigError, RewardError, RLHFError
from rlhf_toolkit.rewards.functions import FunctionReward
from rlhf_toolkit.types import Prompt

PROMPTS = [Prompt(0, "one\nline", (1,), {"label": 5, "x": "a"}), Prompt(3, "two", (2,), {"label": 7, "x": "b"})]
RESPONSES = ["r0", "r1"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def message_of(caught: pytest.ExceptionInfo[Any]) -> str:
    """The text of an error, which has to be one line."""
    assert isinstance(caught.value, RLHFError)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- calling ---------------------------------------------------------------------------------------------------------


def reward_of(function: Callable[..., Any], **kwargs: Any) -> FunctionReward:
    return FunctionReward(function, kwargs, "file.py:f")


def returning(value: Any) -> FunctionReward:
    return reward_of(lambda prompts, responses, **columns: value)


def test_texts_columns_and_kwargs_arrive_by_name() -> None:
    def function(
        prompts: list[str], responses: list[str], *, label: list[int], x: list[str], scale: float
    ) -> list[float]:
        assert (prompts, responses, x) == (["one\nline", "two"], ["r0", "r1"], ["a", "b"])
        return [scale * number for number in label]

    assert reward_of(function, scale=0.5)(PROMPTS, RESPONSES) == [2.5, 3.5]


def test_any_names_for_prompts_and_responses() -> None:
    assert reward_of(lambda p, r, **_: [len(p), len(r)])(PROMPTS, RESPONSES) == [2.0, 2.0]


def test_a_function_cannot_change_the_responses() -> None:
    responses = ["r0", "r1"]
    reward_of(lambda p, r, **_: [r.pop() and 0.0, 0.0])(PROMPTS, responses)
    assert responses == ["r0", "r1"]


@pytest.mark.parametrize("name", ["prompts", "responses"])
def test_a_kwarg_that_is_an_argument(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reward_of(lambda *args, **kwargs: [], **{name: 1})
    assert message_of(caught) == (
        f"reward.kwargs.{name} of file.py:f is also an argument every reward gets; rename one of the two"
    )


def test_a_kwarg_that_is_a_column() -> None:
    with pytest.raises(ConfigError) as caught:
        reward_of(lambda *args, **kwargs: [0.0, 0.0], label=1)(PROMPTS, RESPONSES)
    assert (
        message_of(caught) == "reward.kwargs.label of file.py:f is also a column of the dataset; rename one of the two"
    )


@pytest.mark.parametrize(
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
    result = returning(scores)(PROMPTS, RESPONSES)
    assert result == [1.0, 0.5]
    assert [type(score) for score in result] == [float, float]


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (None, "None (NoneType)"),
        ("1.0", "'1.0' (str)"),
        (float("nan"), "nan (float)"),
        (float("inf"), "inf (float)"),
        (-float("inf"), "-inf (float)"),
        (1e39, "1e+39 (float)"),
        (10**400, "1" + "0" * 199 + "... (int)"),
        (1j, "1j (complex)"),
        ([0.5], "[0.5] (list)"),
        (torch.tensor([0.5]), "tensor([0.5000]) (Tensor)"),
        (torch.tensor(float("nan")), "tensor(nan) (Tensor)"),
        (np.float32("inf"), "np.float32(inf) (float32)"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_score_that_is_no_finite_number(score: Any, shown: str) -> None:
    with pytest.raises(RewardError) as caught:
        returning([0.0, score])(PROMPTS, RESPONSES)
    assert message_of(caught) == (
        f"reward file.py:f gave score {shown} at position 1; return a finite number for each response; "
        "its prompt was 'two'"
    )


def test_scores_as_large_as_float32_can_hold() -> None:
    assert all(torch.tensor(returning([3.4e38, -3.4e38])(PROMPTS, RESPONSES)).isfinite())


@pytest.mark.parametrize("scores", [torch.zeros(2, 1), np.zeros((2, 1)), torch.tensor([0.0, float("nan")])])
def test_arrays_of_another_shape_or_with_nan(scores: Any) -> None:
    with pytest.raises(RewardError, match=r"gave score (\[0\.0\] \(list\) at position 0|nan \(float\) at position 1);"):
        returning(scores)(PROMPTS, RESPONSES)


@pytest.mark.parametrize("scores", [[], [1.0], [1.0] * 3, torch.zeros(5)])
def test_the_wrong_number_of_scores(scores: Any) -> None:
    with pytest.raises(RewardError) as caught:
        returning(scores)(PROMPTS, RESPONSES)
    assert message_of(caught) == (
        f"reward file.py:f returned {len(scores)} scores; return one number for each of the 2 responses; "
        "the first of its 2 prompts was 'one\\nline'"
    )


@pytest.mark.parametrize(
    ("scores", "shown"),
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
    with pytest.raises(RewardError) as caught:
        returning(scores)(PROMPTS, RESPONSES)
    assert message_of(caught) == (
        f"reward file.py:f returned {shown}; return one number for each of the 2 responses; "
        "the first of its 2 prompts was 'one\\nline'"
    )


# ---- raising ---------------------------------------------------------------------------------------------------------


def test_a_function_that_raises() -> None:
    original = ZeroDivisionError("by\nzero")

    def function(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        raise original

    with pytest.raises(RewardError) as caught:
        reward_of(function)(PROMPTS, RESPONSES)
    assert message_of(caught) == (
        "reward file.py:f raised ZeroDivisionError: by zero; repair the function (see its traceback); "
        "the first of its 2 prompts was 'one\\nline'"
    )
    assert caught.value.__cause__ is original
    assert traceback.extract_tb(original.__traceback__)[-1].name == "function"


def test_a_function_that_takes_no_columns() -> None:
    def function(prompts: list[str], responses: list[str]) -> list[float]:
        return [0.0, 0.0]

    with pytest.raises(RewardError) as caught:
        reward_of(function)(PROMPTS, RESPONSES)
    assert "unexpected keyword argument 'label'" in message_of(caught)
    assert "columns and reward.kwargs arrive by name, so let it take **columns; " in message_of(caught)


def test_an_interrupt_is_not_an_error_of_the_reward() -> None:
    def function(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward_of(function)(PROMPTS, RESPONSES)


@pytest.mark.parametrize("scores", [[float("nan")], ZeroDivisionError("x" * 5000)])
def test_a_long_prompt_is_cut_in_the_message(scores: Any) -> None:
    def function(prompts: list[str], responses: list[str]) -> Any:
        if isinstance(scores, Exception):
            raise scores
        return scores

    with pytest.raises(RewardError) as caught:
        reward_of(function)([Prompt(0, "long " * 1000, (1,), {})], ["r"])
    assert "'long long" in message_of(caught)
    assert message_of(caught).endswith("...")
    assert len(message_of(caught)) < 900
