"""Calls that run elsewhere, several at a time: for each a thread that waits for a worker process or a server."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Protocol

from rlhf_toolkit.rewards.calls import Batch, Outcome
from rlhf_toolkit.rewards.signatures import Asked

JOIN_SECONDS = 5.0
"""How long ``close`` waits for threads whose calls it has cut off."""


class Caller(Protocol):
    """Makes the calls of one thread of ``Lanes``."""

    def prepare(self) -> None:
        """Get ready before there is a call to make, so that it need not wait."""

    def call(self, batch: Batch) -> Outcome:
        """Make a call and wait for its outcome."""

    def close(self) -> None:
        """Called from another thread, perhaps in the middle of a call, which then has to end soon."""


class Lanes:
    """A Source that makes as many calls at a time as there are ``callers``, in the order in which they were started.

    Its threads are daemons and the end of the process closes it, so that a call that hangs delays no exit.
    """

    early = True

    def __init__(self, callers: Sequence[Caller]) -> None:
        self.asks = Asked()
        self._jobs: queue.SimpleQueue[tuple[Batch, Future[Outcome]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=_serve, args=(self._jobs, each), daemon=True) for each in callers]
        self._close = weakref.finalize(self, _close, os.getpid(), self._jobs, tuple(callers), self._threads)
        for thread in self._threads:
            thread.start()

    def start(self, batch: Batch) -> Future[Outcome]:
        """Put a call at the end of the queue."""
        if not self._close.alive:
            raise RuntimeError("a reward was called after it was closed")
        future: Future[Outcome] = Future()
        self._jobs.put((batch, future))
        return future

    def close(self) -> None:
        """Cut off the calls under way, cancel the others, end the threads."""
        self._close()


def _serve(jobs: queue.SimpleQueue[tuple[Batch, Future[Outcome]] | None], caller: Caller) -> None:
    while True:
        caller.prepare()
        job = jobs.get()
        if job is None:
            return
        batch, future = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(caller.call(batch))
        except BaseException as error:  # a defect of ours: to whoever waits, not to a thread that nobody watches
            future.set_exception(error)


def _close(
    owner: int,
    jobs: queue.SimpleQueue[tuple[Batch, Future[Outcome]] | None],
    callers: Sequence[Caller],
    threads: Sequence[threading.Thread],
) -> None:
    if os.getpid() != owner:  # a fork of the process that these threads and workers belong to
        return
    while not jobs.empty():
        try:
            job = jobs.get_nowait()
        except queue.Empty:  # a thread was faster
            break
        if job is not None:
            job[1].cancel()
    for caller in callers:
        caller.close()
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        thread.join(JOIN_SECONDS)


@contextmanager
def deadline(seconds: float | None, cut: Callable[[], object]) -> Iterator[threading.Event]:
    """Have ``cut`` called from another thread if the block takes longer than ``seconds``; None is no limit.

    The event says that it has been: after the block its answer is final.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        cut()

    if seconds is None:
        yield expired
        return
    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()
        timer.join()
