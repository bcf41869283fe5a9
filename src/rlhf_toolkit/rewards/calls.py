"""One call of a reward function, and what became of it.

A reward is Python that others wrote: whatever it raises or returns becomes, for each response, a score or a ``Fault``
that says what went wrong. Nothing here imports torch, since worker processes run this too.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from rlhf_toolkit.errors import described, shortened
from rlhf_toolkit.rewards.signatures import Asked, asked

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
    """The responses that one call is about: position for position prompt, response, its token ids and columns, and the
    response as messages (``turns``), where the function asks for these."""

    prompts: list[str]
    responses: list[str]
    tokens: list[list[int]]
    columns: dict[str, list[Any]]
    turns: list[list[dict[str, Any]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.responses)


@dataclass(frozen=True)
class Fault:
    """Why there is no score: ``what`` continues the words "reward NAME ...", ``way_out`` says what to do.

    ``again``: another try may help, since nobody answered. ``cause`` is the exception behind it. ``not_finite``: the
    reward has answered, with NaN or a number that float32 cannot hold.
    """

    what: str
    way_out: str
    again: bool = False
    cause: BaseException | None = None
    not_finite: bool = False


Outcome = Fault | list[Score | Fault]
"""What comes of one call: a fault of the call as a whole, or for each response its score or its own fault."""


class Source(Protocol):
    """Where the scores of one reward come from."""

    early: bool
    """Whether calls run elsewhere, so that they can start while responses are still being decoded."""
    asks: Asked
    """What the parameters of its function say."""

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
        self.asks = asked(function)
        self._function, self._kwargs, self._timeout = function, kwargs, timeout

    def start(self, batch: Batch) -> Future[Outcome]:
        """Make the call here and now."""
        future: Future[Outcome] = Future()
        future.set_result(outcome_of(self._function, batch, self._kwargs, timeout=self._timeout))
        return future

    def close(self) -> None:
        """Do nothing: there is no process or thread to end."""


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling ``function`` gives something to await: ``async def``, or an object whose ``__call__`` is."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def outcome_of(
    function: Callable[..., Any], batch: Batch, kwargs: Mapping[str, Any], *, timeout: float | None = None
) -> Outcome:
    """Call ``function`` with texts, columns and ``kwargs``, await what is to be awaited, and check what it returns.

    ``timeout`` (seconds) cancels what is awaited; nothing can interrupt a function that is not ``async`` from within
    its own process. Only what says that somebody wants the whole run to stop, as KeyboardInterrupt does, is raised.
    """
    asks, more = asked(function), dict[str, Any]()
    if asks.tokens:
        more["tokens"] = [list(each) for each in batch.tokens]
    if asks.turns:
        more["turns"] = [list(each) for each in batch.turns]
    try:
        scores = function(list(batch.prompts), list(batch.responses), **batch.columns, **more, **kwargs)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_awaited(scores, timeout))
        return checked(scores, [len(each) for each in batch.tokens])
    except _TimeUpError:
        return too_slow(timeout)
    except (Exception, SystemExit, GeneratorExit, asyncio.CancelledError) as error:  # whatever a reward likes to raise
        way_out = "repair the function (see its traceback)"
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            way_out = "columns and kwargs arrive by name, so let it take **columns"
        return Fault(f"raised {described(error)}", way_out, again=True, cause=error)


# ---- outcomes on their way from a worker -----------------------------------------------------------------------------

LONGEST_TRACEBACK = 20_000
"""Characters of a traceback's end that a worker sends."""
LONGEST_FAULT = 2_000
"""Characters of each of a fault's two texts."""


def most_bytes(counts: Sequence[int]) -> int:
    """So long may an answer for responses of ``counts`` tokens be, from a worker or a server: a number takes up to 25
    characters and its comma, and there is room for texts."""
    return 2**20 + 64 * sum(counts) + 16 * LONGEST_FAULT * len(counts)


def to_json(outcome: Outcome) -> bytes:
    """``outcome`` as the text of JSON, which ``from_json`` reads; an exception is the text of its traceback."""
    if isinstance(outcome, Fault):
        return json.dumps({"fault": _fault_as_dict(outcome)}).encode()
    return json.dumps({"scores": [_fault_as_dict(x) if isinstance(x, Fault) else x for x in outcome]}).encode()


def from_json(text: bytes, counts: Sequence[int]) -> Outcome:
    """What ``to_json`` was given. A worker may have been taken over by a response that it ran: whatever it sends is
    read as numbers and texts alone, and checked like the answer of a server."""
    try:
        content = json.loads(text)
        if "fault" in content:
            return _fault_of(content["fault"])
        given = content["scores"]
        numbers = checked([0.0 if isinstance(each, dict) else each for each in given], counts)
        if isinstance(numbers, Fault):
            return numbers
        return [_fault_of(x) if isinstance(x, dict) else number for x, number in zip(given, numbers, strict=True)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return Fault("answered what is no outcome", "see what the function writes to its process", cause=error)


def _fault_as_dict(fault: Fault) -> dict[str, Any]:
    cause = None if fault.cause is None else "".join(traceback.format_exception(fault.cause))[-LONGEST_TRACEBACK:]
    what, way_out = fault.what[:LONGEST_FAULT], fault.way_out[:LONGEST_FAULT]
    return {"what": what, "way_out": way_out, "again": fault.again, "cause": cause, "not_finite": fault.not_finite}


def _fault_of(content: Mapping[str, Any]) -> Fault:
    what, way_out = (" ".join(str(content[key])[:LONGEST_FAULT].split()) for key in ("what", "way_out"))
    cause = content["cause"]
    error = None if cause is None else WorkerTraceback(str(cause))
    return Fault(what, way_out, content["again"] is True, error, content["not_finite"] is True)


# ---- what a reward returned ------------------------------------------------------------------------------------------


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
        return Fault(f"gave score {shortened(score)} ({type(score).__name__})", way_out, not_finite=_is_number(plain))
    if len(plain) != count:
        return Fault(f"gave {len(plain)} numbers for a response of {count} tokens", way_out)
    numbers = [number.tolist() if isinstance(number, _Array) else number for number in plain]
    bad = [position for position, number in enumerate(numbers) if not _is_finite(number)]
    if bad:
        said = f"gave {shortened(numbers[bad[0]])} ({type(numbers[bad[0]]).__name__}) for token {bad[0]}"
        return Fault(said, way_out, not_finite=all(_is_number(numbers[position]) for position in bad))
    return [float(number) for number in numbers]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) <= LARGEST
