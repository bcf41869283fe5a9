"""A thread of each rank that hears what the main thread cannot: signals, failures of other ranks, and ranks that stall.

The main thread of a rank spends its time in computations and collectives, where it runs no handler and from which only
an answer of the other ranks brings it back. The thread reads signals from a pipe, and has a connection of its own to
the store through which the ranks have found one another. There a second thread leaves what this rank has to say and
reads, every ``POLL`` seconds, what the others say. It may wait for ever, where the first machine's cable is cut: no
timeout of the store's holds for that. The first thread ends the run then.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from rlhf_toolkit.distributed import stopping
from rlhf_toolkit.distributed.collectives import barrier, rank, world_size
from rlhf_toolkit.distributed.main_thread import MainThread
from rlhf_toolkit.errors import (
    DISK_FULL,
    RLHFError,
    StallError,
    at_a_failure,
    at_a_good_end,
    in_script,
    shortened,
)
from rlhf_toolkit.last_words import launcher_is_gone, say_at_once, say_last

POLL = 0.5
LOOKS = 20
"""How often the main thread is looked at within the time it may stand still."""
GRACE = 10.0
"""Seconds in which a rank may end by itself, with its own message, after another has failed."""
ANSWER = 60.0
"""Seconds in which the store has to answer. They count only while this process runs, not while it is stopped."""
ASLEEP = 20.0
"""Seconds without a look around after which this process counts as stopped for a while: by Ctrl-Z, or with its
container. What stood still meanwhile is no stall."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP, HEARD, AT_ONCE, FAILURE, STALL = "stop", "heard", "at_once", "failure", "stall"
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say on a rank whose partner has ended."""


class Watch:
    """The threads. ``stall_seconds`` is how long a rank may stand still; 0: for ever.

    Before training begins there is nothing that a stop could save, and a signal ends the run where it is.
    """

    def __init__(self, *, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self._rank, self._ranks, self._rounds = rank(), world_size(), 0
        self._store: Store | None = None
        if self._ranks > 1:  # a connection of its own: one that is shared would wait while the main thread waits in it
            self._store = PrefixStore("watch", distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
        self._main = MainThread(interval=max(POLL, stall_seconds / LOOKS))
        self._beats = dict[int, tuple[Any, float]]()
        self._read, self._write = os.pipe()
        self._closed, self._heard, self._ending = threading.Event(), 0.0, False
        self._before: dict[int, Any] = {}
        self._deciding = threading.Lock()
        names = {"watch": self._listen, "watch's talk": self._talk}
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in names.items()]

    def begin(self) -> None:
        """Take the signals and start. Only in the main thread. A collective."""
        os.set_blocking(self._write, False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, lambda *_: stopping.interrupt())
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        at_a_failure.append(self.told)
        for thread in self._threads:
            thread.start()
        barrier()

    def close(self) -> None:
        """Stop looking and give the signals back."""
        if self._closed.is_set():
            return
        self._closed.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        at_a_failure.remove(self.told)
        os.write(self._write, b"\0")
        for thread in self._threads:
            thread.join(5 * POLL)
        if not self._threads[0].is_alive():
            os.close(self._read)
            os.close(self._write)

    def told(self, line: str) -> str:
        """Tell the other ranks that this one ends with ``line``, and give the line that it should end with: where it
        failed only because another rank had ended, what that one said."""
        self._ending = True
        lost = self._ranks > 1 and any(words in line for words in LOST_PEER)
        found = [silent_end(line) if lost else line]

        def exchange() -> None:
            if not lost:
                self._say(FAILURE, json.dumps([self._rank, line]))
                return
            deadline = time.monotonic() + 3.0
            while not (failure := self._get(FAILURE)) and time.monotonic() < deadline:
                time.sleep(0.1)
            if failure:
                found[:] = [self._after(failure)]

        within(6.0, exchange)
        return found[0]

    def _listen(self) -> None:
        """Hear signals, and whether the store still answers and the launcher is still there."""
        waited, rounds, orphaned = 0.0, 0, False
        while not self._closed.is_set():
            ready, _, _ = select.select([self._read], [], [], POLL)
            for number in os.read(self._read, 256) if ready else b"":
                if number not in SIGNALS or self._fails():
                    continue
                with self._deciding:
                    first = stopping.requested() == 0
                    at_once = stopping.ask(number)  # a first signal asks all ranks to stop, another one ends them
                within(4 * POLL, partial(self._say, AT_ONCE if at_once else STOP, str(number)))
                if at_once:
                    self._end(f"stopped at once by a second {signal.Signals(number).name}", 128 + number)
                if first:
                    self._stop(number)
            if not orphaned and launcher_is_gone():  # nobody else could end this run any more
                orphaned = True
                os.kill(os.getpid(), signal.SIGTERM)
            waited = waited + POLL if rounds == self._rounds and not ready else 0.0
            rounds = self._rounds
            if waited > ANSWER and self._store is not None:
                self._end(_line_of(StallError(NO_ANSWER.format(seconds=ANSWER))), 1)

    def _fails(self) -> bool:
        """Whether a rank has failed already: a launcher's signal, which follows, must not put another end over it."""
        found = [self._ending]
        within(4 * POLL, lambda: found.append(bool(self._get(FAILURE))))
        return any(found)

    def _talk(self) -> None:
        """Hear what the other ranks say, and let them hear where this one is."""
        looked = time.monotonic()
        while self._store is not None and not self._closed.wait(POLL):
            looked, before = time.monotonic(), looked
            if looked - before > ASLEEP:
                self._main.rest()
                self._beats.clear()
            try:
                if number := self._get(AT_ONCE):
                    self._end(f"stopped at once by a second {signal.Signals(int(number)).name}", 128 + int(number))
                if number := self._get(STOP):
                    with self._deciding:
                        first = stopping.requested() == 0
                        stopping.ask(int(number))
                    if first:
                        signal.pthread_kill(threading.main_thread().ident or 0, int(number))  # it may wait for a reward
                        self._stop(int(number))
                if failure := self._get(FAILURE):
                    self._heard = self._heard or time.monotonic()
                    if time.monotonic() - self._heard > GRACE:
                        self._end(self._after(failure), 1)
                if self.stall_seconds:
                    self._watch_for_stalls()
            except RuntimeError:  # the store is gone, and with it whoever held it
                self._store = None
            self._rounds += 1

    def _stop(self, number: int) -> None:
        """Stop this rank because of signal ``number``, which it has got or has heard of."""

        def wait_for_main() -> None:
            """Rank 0 says it for all: a launcher ends the others as soon as one has ended."""
            deadline = time.monotonic() + GRACE
            while self._rank != 0 and not self._get(HEARD) and time.monotonic() < deadline:
                time.sleep(0.1)
            if self._rank == 0:
                self._say(HEARD, "yes")
            else:
                time.sleep(POLL)

        if not stopping.training():
            within(2 * GRACE, wait_for_main)
            self._end(str(stopping.request(number)), 128 + number, every_rank=False)
        if self._rank == 0:
            name = signal.Signals(number).name
            say_at_once(f"\n{name}: the run writes a checkpoint and stops; a second signal stops it at once")

    def _watch_for_stalls(self) -> None:
        """Say where this rank is; end the run with the name of one that stands still and waits for nobody."""
        assert self._store is not None
        position = self._main.look()
        stalls = position.seconds > self.stall_seconds
        said = [int(time.monotonic()), round(position.seconds, 1), position.waits, position.phase, position.place]
        self._store.set(f"beat{self._rank}", json.dumps([*said, self._main.stack() if stalls else ""]))
        verdict = self._get(STALL)
        if not verdict and (mine := self._verdict()):
            self._say(STALL, mine)
            verdict = self._get(STALL)
        if verdict:
            self._end(verdict, 1)

    def _verdict(self) -> str:
        """What is wrong with a rank, or nothing."""
        waiting = 0
        for number in range(self._ranks):
            found = self._get(f"beat{number}")
            if not found:
                continue
            beat, now = json.loads(found), time.monotonic()
            ticks, since = self._beats.get(number, (None, now))
            if ticks != beat[0]:
                self._beats[number] = (beat[0], now)
            elif now - since > self.stall_seconds:
                error = StallError(
                    f"rank {number} has given no sign for {now - since:.0f} s, in {beat[3]}, {beat[4]}: its process is "
                    f"stopped or its machine is gone; {WAY_OUT}"
                )
                return _line_of(error)
            _, seconds, waits, phase, place, stack = beat
            if seconds > self.stall_seconds:
                if not waits:
                    error = StallError(
                        f"rank {number} has not moved for {seconds:.0f} s, in {phase}, {place}; {WAY_OUT}"
                    )
                    return f"{_line_of(error)}\n{stack}"
                waiting += 1
        if waiting == self._ranks:
            seconds = f"{self.stall_seconds:.0f} s"
            return _line_of(StallError(f"all ranks have waited for one another for {seconds}; {WAY_OUT}"))
        return ""

    def _end(self, line: str, status: int, *, every_rank: bool = True) -> NoReturn:
        """End this process here and now: its main thread may never come back."""
        if every_rank or self._rank == 0:
            say_last(line)
        os._exit(status)

    def _after(self, failure: str) -> str:
        number, line = json.loads(failure)
        more = "" if DISK_FULL in line or "--resume" in line else "; continue with --resume"
        return _line_of(RLHFError(f"rank {number} failed: {shortened(line, 1000)[1:-1]}{more}"))

    def _get(self, key: str) -> str:
        if self._store is None or not self._store.check([key]):
            return ""
        return str(self._store.get(key).decode())

    def _say(self, key: str, value: str) -> None:
        """Leave ``value`` under ``key``, unless somebody was first."""
        if self._store is not None and not self._store.check([key]):
            self._store.compare_set(key, "", value)


NO_ANSWER = (
    "the process through which the ranks have met has not answered for {seconds:.0f} s: it is stopped, or its machine, "
    "the first one, is gone or cut off; look at it and at the network, then continue with --resume"
)
WAY_OUT = "it was ended there; continue with --resume, or raise run.stall_minutes where it needs so long"


def silent_end(line: str) -> str:
    """What is said where another rank has ended and left no word. ``line`` is what this rank failed with: gloo names
    the address of the other, which on several machines is the machine's."""
    found = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", line)
    place = f", at {found[1]}," if found else ""
    error = RLHFError(
        f"another rank{place} has ended without a word, as one does that is killed; its machine's log may say why; "
        "continue with --resume"
    )
    return _line_of(error)


def _line_of(error: RLHFError) -> str:
    return f"{type(error).__name__}: {error}"


def within(seconds: float, exchange: Callable[[], None]) -> None:
    """Do ``exchange``, with the store, in a thread of its own, and go on without its end after ``seconds``."""

    def run() -> None:
        with suppress(Exception):
            exchange()

    thread = threading.Thread(target=run, name="watch's exchange", daemon=True)
    thread.start()
    thread.join(seconds)


class _Now:
    watch: Watch | None = None


def begin_watching(*, stall_seconds: float) -> None:
    """Watch this process, where it is a script's, from now to ``end_watching``. A collective."""
    end_watching()
    stopping.forget()
    if in_script():
        _Now.watch = Watch(stall_seconds=stall_seconds)
        _Now.watch.begin()
        atexit.register(end_watching)  # before the process group goes, which holds the store
        at_a_good_end.insert(0, end_watching)


def end_watching() -> None:
    """Give the signals back."""
    if _Now.watch is not None:
        _Now.watch.close()
        _Now.watch = None
