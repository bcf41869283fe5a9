"""Whether a reward or an environment can be called is said before anything calls it, and by the same rules as Python's
own binding of arguments."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.rewards.signatures import Asked, asked
from rlhf_toolkit.rollout.turns import Environment
from tests.support.offenders import for_each
from tests.support.rewards import prompts_for, rewards_of


def said(function: Any, *columns: str, kwargs: dict[str, Any] | None = None, **more: Any) -> str | None:
    """The message for these columns; None where there is none."""
    try:
        asked(function, **more).require("reward.function", columns, {} if kwargs is None else kwargs)
    except ConfigError as error:
        return str(error)
    return None


def accuracy(completions: Any, **kwargs: Any) -> Any: ...
def by_trl(completions: Any, answer: Any, **kwargs: Any) -> Any: ...
def alone(text: Any) -> Any: ...
def bare(prompts: Any, responses: Any) -> Any: ...
def open_ended(prompts: Any, responses: Any, **columns: Any) -> Any: ...
def exact(prompts: Any, responses: Any, answer: Any, *, strict: Any = False) -> Any: ...
def of_tokens(prompts: Any, responses: Any, tokens: Any, **columns: Any) -> Any: ...
def starred(*args: Any, **kwargs: Any) -> Any: ...
def trls_other(prompts: Any, completions: Any, **kwargs: Any) -> Any: ...
def positional(a: Any, b: Any, /, level: Any) -> Any: ...
def tool(prompts: Any, responses: Any, turn: Any, **columns: Any) -> Any: ...
def untold(prompts: Any, responses: Any, answer: Any) -> Any: ...


class Judge:
    def __call__(self, prompts: Any, responses: Any, answer: Any) -> Any: ...


RIGHT = "(prompts, responses, **columns)"


@for_each(
    "function, columns, message",
    [
        (
            accuracy,
            (),
            "reward.function: accuracy(completions, **kwargs) takes the responses first, as TRL has it; here prompts "
            f"come first: def accuracy{RIGHT}",
        ),
        (
            by_trl,
            ("answer",),
            "reward.function: by_trl(completions, answer, **kwargs) takes the responses first, as TRL has it; here "
            f"prompts come first: def by_trl{RIGHT}",
        ),
        (alone, (), f"reward.function: alone(text) cannot take prompts and responses; write def alone{RIGHT}"),
        (
            bare,
            ("answer", "level"),
            "reward.function: bare does not take the dataset's answer, level; columns arrive by name, so let it end "
            "with **columns",
        ),
        (
            exact,
            ("solution",),
            "reward.function: exact needs answer, which no column of the dataset is called (beside the prompt's: "
            "solution); rename one of them, or give it a default, or set it in reward.kwargs",
        ),
        (
            Judge(),
            (),
            "reward.function: Judge needs answer, which no column of the dataset is called (beside the prompt's: "
            "none); rename one of them, or give it a default, or set it in reward.kwargs",
        ),
    ],
)
def test_what_cannot_be_called_is_said_in_one_line(function: Any, columns: tuple[str, ...], message: str) -> None:
    assert said(function, *columns) == message


def test_kwargs_that_the_function_does_not_have() -> None:
    assert said(exact, "answer", kwargs={"strcit": True}) == (
        "reward.kwargs.strcit: exact has no such parameter; did you mean strict?; it takes answer, strict"
    )
    assert said(exact, kwargs={"answer": 1}) is None


def test_an_environment_is_given_its_turn() -> None:
    function: Callable[..., Any] = untold
    assert asked(function, besides=("turn",)).misfit == (
        "untold(prompts, responses, answer) does not take turn, which it is given by name; write def untold(prompts, "
        "responses, turn, **columns)"
    )
    with pytest.raises(ConfigError) as caught:
        Environment(lambda prompts, responses, turn, answer: [], 2).require_columns(["question"])
    assert str(caught.value) == (
        "rollout.environment: <lambda> needs answer, which no column of the dataset is called (beside the prompt's: "
        "question); rename one of them, or give it a default"
    )
    Environment(tool, 2).require_columns(["question"])


FUNCTIONS = (
    alone,
    bare,
    open_ended,
    exact,
    of_tokens,
    starred,
    trls_other,
    positional,
    Judge(),
    partial(exact, answer=1),
)


@for_each("function", FUNCTIONS, ids=str)
@for_each("columns", [(), ("answer",), ("level",), ("answer", "level")])
@for_each("kwargs", [{}, {"strict": True}, {"other": 1}])
def test_it_says_what_python_would_at_the_first_call(
    function: Any, columns: tuple[str, ...], kwargs: dict[str, Any]
) -> None:
    """An independent way: ``Signature.bind`` of the call that scoring makes."""
    tokens = {"tokens": 0} if "tokens" in inspect.signature(function).parameters else {}
    try:
        inspect.signature(function).bind("prompts", "responses", **dict.fromkeys(columns), **tokens, **kwargs)
        fits = True
    except TypeError:
        fits = False
    assert (said(function, *columns, kwargs=kwargs) is None) == fits, (columns, kwargs)


def test_what_a_worker_tells_is_the_same() -> None:
    for function in FUNCTIONS:
        told = json.loads(json.dumps(asked(function).plain()))
        assert Asked.of(told) == asked(function)


@pytest.mark.parametrize("workers", [0, 1])
def test_rewards_in_and_outside_of_this_process_say_it(workers: int) -> None:
    entry = {"function": f"{__name__}:exact", **({"workers": 1} if workers else {})}
    (prompt,) = prompts_for(1, solution=3)
    with rewards_of(entry) as rewards, pytest.raises(ConfigError, match=r"^reward\.functions\[0\]\.function: exact ne"):
        rewards.require_columns(prompt)
    said = r"^reward\.functions\[0\]\.function: accuracy\(completions, \*\*kwargs\) "
    with pytest.raises(ConfigError, match=said), rewards_of({**entry, "function": f"{__name__}:accuracy"}):
        pass
