"""A run that was asked to stop: who asked, and where a rank may stop so that all do.

A signal reaches one rank or all. It only leaves a note here; ``watch`` tells the other ranks. Ranks stop where they can
tell one another: at the end of an ``agreement`` and of a micro-batch, before the next mini-batch, and, because what is
raised there reaches all ranks, within the work of one rank that an ``agreement`` surrounds.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_toolkit.errors import StopAskedError

ONE_REQUEST = 3.0
"""Seconds within which signals are one request: a terminal's Ctrl-C reaches a rank twice, by the launcher too."""


class _Interrupted(BaseException):
    """Ends a wait of this rank. Not an Exception, which a user's code might catch."""


NOTHING_YET = "before the first update: there is nothing to save; start it again, a new run with --overwrite"


class _Request:
    number = 0
    training = False
    since = 0.0
    held = 0
    may_interrupt = False


def ask(number: int) -> bool:
    """Note that signal ``number`` asks the run to stop; whether it is a second request, to stop at once."""
    if _Request.number == 0:
        _Request.number, _Request.since = number, time.monotonic()
    return time.monotonic() - _Request.since > ONE_REQUEST


def requested() -> int:
    """The signal that has asked for a stop, 0 if none has."""
    return _Request.number


def asked() -> int:
    """The same, but 0 inside ``held``: whether to stop here."""
    return 0 if _Request.held else _Request.number


def forget() -> None:
    """Begin afresh: a new run in this process."""
    _Request.number, _Request.since, _Request.held, _Request.training = 0, 0.0, 0, False


def training_begins() -> None:
    """From here on a stop is one with a checkpoint."""
    _Request.training = True


def training() -> bool:
    """Whether there is something that a stop could save."""
    return _Request.training


def request(number: int = 0) -> StopAskedError:
    """What to raise where a run stops, because of signal ``number`` or the one that was noted."""
    name = signal.Signals(number or _Request.number or signal.SIGTERM).name
    error = StopAskedError(f"stopped by {name}" if _Request.training else f"stopped by {name} {NOTHING_YET}")
    error.status = 128 + (number or _Request.number or signal.SIGTERM)
    return error


def check() -> None:
    """Raise StopAskedError where a stop was asked for. Only where what one rank raises, all raise."""
    if asked():
        raise request()


def hold() -> None:
    """From here on nothing stops this run but a second signal."""
    _Request.held += 1


@contextmanager
def held() -> Iterator[None]:
    """No rank stops inside: a checkpoint is written to its end."""
    _Request.held += 1
    try:
        yield
    finally:
        _Request.held -= 1


@contextmanager
def interruptible() -> Iterator[None]:
    """Work of this rank that a signal cuts off with StopAskedError, wherever in it the main thread is."""
    try:
        try:
            _Request.may_interrupt = True
            check()
            yield
        finally:
            _Request.may_interrupt = False
    except _Interrupted:
        raise request() from None


def interrupt() -> None:
    """Called in the main thread when a signal has come: cut off what is ``interruptible``."""
    if _Request.may_interrupt and asked():
        _Request.may_interrupt = False
        raise _Interrupted
