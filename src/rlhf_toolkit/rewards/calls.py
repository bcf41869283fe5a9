"""One call of a reward function, and what became of it.

A reward is Python that others wrote: whatever it raises or returns becomes, for each response, a score or a ``Fault``
that says what went wrong. Nothing here imports torch, since worker processes run this too.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rlhf_toolkit.errors import described, shortened

LARGEST = 3.4028234663852886e38
"""Scores become float32, of which this is the largest; beyond it they would be infinite."""

Score = float | list[float]
"""What a reward gives one response: a number, or as many numbers as the response has tokens."""


@runtime_checkable
class _Array(Protocol):
    """What torch tensors, numpy arrays and the scalars of both have in common."""

    def tolist(self) -> Any: ...


class WorkerTraceback(Exception):
    """The text of a traceback from another process, as the ``__cause__`` of a RewardError."""

    def __str__(self) -> str:
        return f"\n{self.args[0].rstrip()}"


@dataclass(frozen=True)
class Batch:
    """The responses that one call is about: position for position prompt, response, its token ids and columns."""

    prompts: list[str]
    responses: list[str]
    tokens: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.responses)


@dataclass(frozen=True)
class Fault:
    """Why there is no score: ``what`` continues the words "reward NAME ...", ``way_out`` says what to do.

    ``again``: another try may help, since nobody answered. ``cause`` is the exception behind it.
    """

    what: str
    way_out: str
    again: bool = False
    cause: BaseException | None = None


Outcome = Fault | list[Score | Fault]
"""What comes of one call: a fault of the call as a whole, or for each response its score or its own fault."""


class Source(Protocol):
    """Where the scores of one reward come from."""

    early: bool
    """Whether calls run elsewhere, so that they can start while responses are still being decoded."""
    takes_tokens: bool
    """Whether token ids are passed under the name ``tokens``, which no column may then have."""

    def start(self, batch: Batch) -> Future[Outcome]:
        """Make a call. The future never raises for what the reward did."""

    def close(self) -> None:
        """End all processes and threads; calls under way come to nothing. May be called twice."""


class InProcess:
    """A Source in this process: a call has its outcome when ``start`` returns.

    ``timeout`` (seconds) limits functions that are ``async``.
    """

    early = False

    def __init__(self, function: Callable[..., Any], kwargs: Mapping[str, Any], timeout: float | None = None) -> None:
        self.takes_tokens = takes_tokens(function)
        self._function, self._kwargs, self._timeout = function, kwargs, timeout

    def start(self, batch: Batch) -> Future[Outcome]:
        """Make the call here and now."""
        future: Future[Outcome] = Future()
        future.set_result(outcome_of(self._function, batch, self._kwargs, timeout=self._timeout))
        return future

    def close(self) -> None:
        """Do nothing: there is no process or thread to end."""


def takes_tokens(function: Callable[..., Any]) -> bool:
    """Whether ``function`` names a parameter ``tokens``; ``**columns`` alone does not ask for them."""
    try:
        return "tokens" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling ``function`` gives something to await: ``async def``, or an object whose ``__call__`` is."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def outcome_of(
    function: Callable[..., Any], batch: Batch, kwargs: Mapping[str, Any], *, timeout: float | None = None
) -> Outcome:
    """Call ``function`` with texts, columns and ``kwargs``, await what is to be awaited, and check what it returns.

    ``timeout`` (seconds) cancels what is awaited; nothing can interrupt a function that is not ``async`` from within
    its own process. Only what is no ``Exception``, such as KeyboardInterrupt, is raised.
    """
    tokens = {"tokens": [list(each) for each in batch.tokens]} if takes_tokens(function) else {}
    try:
        scores = function(list(batch.prompts), list(batch.responses), **batch.columns, **tokens, **kwargs)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_awaited(scores, timeout))
        return checked(scores, [len(each) for each in batch.tokens])
    except _TimeUpError:
        return too_slow(timeout)
    except Exception as error:  # a reward may raise whatever it likes
        way_out = "repair the function (see its traceback)"
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            way_out = "columns and kwargs arrive by name, so let it take **columns"
        return Fault(f"raised {described(error)}", way_out, again=True, cause=error)


def with_text(outcome: Outcome) -> Outcome:
    """``outcome`` as it can go to another process: exceptions become the text of their tracebacks."""
    if isinstance(outcome, list) or outcome.cause is None:
        return outcome
    text = "".join(traceback.format_exception(outcome.cause))
    return Fault(outcome.what, outcome.way_out, outcome.again, WorkerTraceback(text))


def too_slow(timeout: float | None) -> Fault:
    """The fault of a call that was ended at its time limit."""
    return Fault(f"took longer than its {timeout:g} s", "make it faster, or raise its timeout", again=True)


class _TimeUpError(Exception):
    """Our own limit, not a TimeoutError that the function raised."""


async def _awaited(scores: Awaitable[Any], timeout: float | None) -> Any:
    try:
        async with asyncio.timeout(timeout) as limit:
            return await scores
    except TimeoutError as error:
        if limit.expired():
            raise _TimeUpError from error
        raise


def checked(scores: Any, counts: Sequence[int]) -> Outcome:
    """What a reward returned, as one score for each response; ``counts`` are the responses' numbers of tokens.

    A number becomes a float (bool is 0 or 1), a sequence or an array of ``counts[i]`` numbers a list of floats.
    """
    plain = scores.tolist() if isinstance(scores, _Array) else scores
    wanted = f"return one number for each of the {len(counts)} responses"
    if not _is_sequence(plain):
        return Fault(f"returned {shortened(scores)} ({type(scores).__name__})", wanted)
    if len(plain) != len(counts):
        return Fault(f"returned {len(plain)} scores", wanted)
    return [checked_score(score, count) for score, count in zip(plain, counts, strict=True)]


def checked_score(score: Any, count: int) -> Score | Fault:
    """What a reward gave one response of ``count`` tokens, as its score."""
    plain = score.tolist() if isinstance(score, _Array) else score
    if _is_finite(plain):
        return float(plain)
    way_out = "return a finite number for each response, or one for each of its tokens"
    if not _is_sequence(plain):
        return Fault(f"gave score {shortened(score)} ({type(score).__name__})", way_out)
    if len(plain) != count:
        return Fault(f"gave {len(plain)} numbers for a response of {count} tokens", way_out)
    numbers = [number.tolist() if isinstance(number, _Array) else number for number in plain]
    for position, number in enumerate(numbers):
        if not _is_finite(number):
            return Fault(f"gave {shortened(number)} ({type(number).__name__}) for token {position}", way_out)
    return [float(number) for number in numbers]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= LARGEST
