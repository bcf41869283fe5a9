"""Chat templates rendered in a process of their own, with limits on time, memory and length.

A chat template is a program that came with a model. transformers runs it in jinja's sandbox, which keeps it from the
machine but not from looping for days, from ``10 ** 10 ** 10`` or from a text of a terabyte, some of it in one operation
of Python that nothing interrupts. So each tokenizer's template is rendered by transformers in a fork of this process,
which holds nothing open but two pipes and is killed where it takes too long; the next one gets a new fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import pickle
import re
import resource
import select
import signal
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

SECONDS = 10.0
"""For one conversation; templates take some ten microseconds."""
MOST_CHARACTERS = 2**24
"""Of one rendered conversation."""
MOST_MEMORY = 2**30
"""Bytes that rendering may take beside what the process had."""
NOTHING: Mapping[str, Any] = MappingProxyType({})
SURROGATE = re.compile("[\ud800-\udfff]")
PR_SET_PDEATHSIG = 1
REQUEST, RESULT = 3, 4  # the child's file descriptors


class TemplateFailed(Exception):
    """What the template raised, or the limit that it met, in words."""


class _Ended(Exception):
    """The child is not there any more."""


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any] = NOTHING,
    *,
    add_generation_prompt: bool,
) -> str:
    """What ``apply_chat_template`` makes of ``messages`` and ``values``, as text. Raises TemplateFailed where the
    template raises, takes more than ``SECONDS`` or ``MOST_MEMORY``, or makes more than ``MOST_CHARACTERS``."""
    options = {**values, "add_generation_prompt": add_generation_prompt}
    request = pickle.dumps(([dict(message) for message in messages], options, _moment))
    with _lock:
        try:
            return _renderer(tokenizer).asked(request)
        except _Ended:  # killed from outside, or with the thread that had started it: once more
            return _renderer(tokenizer).asked(request, last=True)


def render_as_of(moment: str) -> None:
    """From now on have templates in this process that write the date take ``moment`` (ISO 8601) for now, so that a run
    renders what it renders again in the same words, the next day too. Raises ValueError for what is no moment."""
    global _moment
    _moment = datetime.fromisoformat(moment)


_moment: datetime | None = None
MOST_CHILDREN = 3
"""Of this process at a time: a run has one tokenizer, and one more for a reward model."""
_lock = threading.Lock()
_renderers: dict[int, _Renderer] = {}


def _renderer(tokenizer: PreTrainedTokenizerBase) -> _Renderer:
    """The tokenizer's, of this process and with the template that it has now."""
    key, wanted = id(tokenizer), (os.getpid(), repr(tokenizer.chat_template))
    found = _renderers.get(key)
    if found is not None and (found.made_for != wanted or found.ended):
        found.close()
        found = None
    if found is None:
        for oldest in list(_renderers)[: max(0, len(_renderers) - MOST_CHILDREN + 1)]:
            _renderers.pop(oldest).close()
        found = _Renderer.started(tokenizer, wanted)
        _renderers[key] = found
        weakref.finalize(tokenizer, _forget, key, found)
    return found


def _forget(key: int, renderer: _Renderer) -> None:
    renderer.close()
    if _renderers.get(key) is renderer:
        del _renderers[key]


@dataclass
class _Renderer:
    """A child that renders with one tokenizer. ``made_for`` is the process it belongs to and the template."""

    made_for: tuple[int, str]
    child: int
    request: int
    result: int
    ended: bool = False

    @classmethod
    def started(cls, tokenizer: PreTrainedTokenizerBase, made_for: tuple[int, str]) -> _Renderer:
        """Fork it."""
        request_in, request_out = os.pipe()
        result_in, result_out = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of threads: the child runs nothing that they may hold
            child = os.fork()
        if child == 0:
            _serve(tokenizer, request_in, result_out)
        os.close(request_in)
        os.close(result_out)
        return cls(made_for, child, request_out, result_in)

    def asked(self, request: bytes, *, last: bool = False) -> str:
        """The answer to one request."""
        deadline = time.monotonic() + SECONDS
        try:
            os.set_blocking(self.request, False)
            unsent = memoryview(struct.pack("<Q", len(request)) + request)
            while unsent:
                _, ready, _ = select.select([], [self.request], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError
                unsent = unsent[os.write(self.request, unsent) :]
            (size,) = struct.unpack("<Q", self._read(8, deadline))
            if size > 8 * MOST_CHARACTERS:
                raise TimeoutError
            ending, text = json.loads(self._read(size, deadline))
        except TimeoutError:
            self.close()
            raise TemplateFailed(f"no end within {SECONDS:g} seconds") from None
        except (EOFError, OSError):
            self.close()
            if last:
                raise TemplateFailed("the process that renders it has ended, for lack of memory perhaps") from None
            raise _Ended from None
        if ending != "text":
            raise TemplateFailed(text)
        return str(text)

    def close(self) -> None:
        """End the child. In a fork of the process that it belongs to, only let go of its pipes."""
        if self.ended:
            return
        self.ended = True
        for end in (self.request, self.result):
            with contextlib.suppress(OSError):
                os.close(end)
        if self.made_for[0] == os.getpid():
            with contextlib.suppress(OSError):
                os.kill(self.child, signal.SIGKILL)
                os.waitpid(self.child, 0)

    def _read(self, size: int, deadline: float) -> bytes:
        parts, left = [], size
        while left:
            ready, _, _ = select.select([self.result], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(self.result, min(left, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


# ---- in the child ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _StoppedClock:
    """What transformers' ``strftime_now`` asks instead of ``datetime``."""

    moment: datetime

    def now(self) -> datetime:
        """Always the same."""
        return self.moment


def _serve(tokenizer: PreTrainedTokenizerBase, request: int, result: int) -> NoReturn:
    """Render until the other end is closed. Whatever happens, this process returns to nobody's code."""
    gc.freeze()  # garbage of the parent would close files by number, which are others here
    try:
        _leave_everything(request, result)
        with os.fdopen(REQUEST, "rb") as asked:
            while head := asked.read(8):
                messages, options, moment = pickle.loads(asked.read(struct.unpack("<Q", head)[0]))
                if moment is not None:  # of this process alone, which does nothing else
                    vars(chat_template_utils)["datetime"] = _StoppedClock(moment)
                answer = json.dumps(_answer(tokenizer, messages, options)).encode()
                content = struct.pack("<Q", len(answer)) + answer
                while content:
                    content = content[os.write(RESULT, content) :]
    finally:
        os._exit(0)


def _leave_everything(request: int, result: int) -> None:
    """Keep two pipes and nothing else: no socket of a process group, no signal handler, no memory without end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(each, signal.SIG_IGN if each == signal.SIGINT else signal.SIG_DFL)
    kept = os.dup2(os.dup(request), 1000), os.dup2(os.dup(result), 1001)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.closerange(3, 1000)
    os.dup2(kept[0], REQUEST)
    os.dup2(kept[1], RESULT)
    os.closerange(5, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 2**20 else 2**20)
    had = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = had + MOST_MEMORY if hard == resource.RLIM_INFINITY else min(hard, had + MOST_MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _answer(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], options: dict[str, Any]
) -> tuple[str, str]:
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except MemoryError:
        return "failed", f"it takes more than {MOST_MEMORY // 2**20} MiB of memory"
    except BaseException as error:  # a template is a program: it may raise whatever it likes
        return "failed", f"{type(error).__name__}: {' '.join(str(error)[:2000].split())}"
    if len(text) > MOST_CHARACTERS:
        return "failed", f"it makes {len(text)} characters of one conversation; the most are {MOST_CHARACTERS}"
    if SURROGATE.search(text):
        return "failed", "it makes half a character, which no tokenizer takes"
    return "text", text
