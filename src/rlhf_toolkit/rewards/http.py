"""Rewards from a server: one POST of JSON for each call.

The standard library does it, since no client library limits a request as a whole: their time limits are for each read,
so that a server which sends a byte now and then is never too slow.
"""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from rlhf_toolkit.errors import described, shortened
from rlhf_toolkit.rewards.calls import Batch, Fault, Outcome, checked, too_slow
from rlhf_toolkit.rewards.lanes import Lanes, deadline
from rlhf_toolkit.rewards.specification import RewardSpec

BACKOFF = 0.5
"""Seconds before the first retry; each further one waits twice as long."""
LONGEST_BACKOFF = 30.0
WANTED = 'answer {"scores": [...]} with one number for each response'


def remote(spec: RewardSpec) -> Lanes:
    """``spec.workers`` requests at a time to ``spec.url``; nothing is sent before the first call."""
    return Lanes([HTTPCaller(spec) for _ in range(spec.workers)])


class HTTPCaller:
    """Makes one request at a time, each on its own connection. Reads no proxy settings, follows no redirect."""

    def __init__(self, spec: RewardSpec) -> None:
        assert spec.url is not None
        self._spec, self._url = spec, spec.url
        self._closed = threading.Event()
        self._socket: socket.socket | None = None

    def prepare(self) -> None:
        """Do nothing: every request makes its own connection."""

    def call(self, batch: Batch) -> Outcome:
        """The scores, asked for again up to ``retries`` times after a connection error or a status of 500 or more."""
        content: dict[str, Any] = {"prompts": batch.prompts, "responses": batch.responses, "columns": batch.columns}
        if self._spec.kwargs:
            content["kwargs"] = dict(self._spec.kwargs)
        try:
            body = json.dumps(content).encode()
        except (TypeError, ValueError, RecursionError) as error:
            way_out = "give the dataset columns of plain values"
            return Fault(f"got columns that JSON cannot hold: {described(error)}", way_out, cause=error)
        for attempt in range(self._spec.retries):
            outcome = self._once(body, batch)
            if isinstance(outcome, list) or not outcome.again:
                return outcome
            if self._closed.wait(min(BACKOFF * 2**attempt, LONGEST_BACKOFF)):
                return outcome
        return self._once(body, batch)

    def close(self) -> None:
        """Cut off the request under way."""
        self._closed.set()
        self._cut()

    def _once(self, body: bytes, batch: Batch) -> Outcome:
        limit = self._spec.timeout
        try:
            with deadline(limit, self._cut) as expired:
                status, answer = self._post(body, expired)
        except (OSError, HTTPException) as error:
            if expired.is_set() or (limit is not None and isinstance(error, TimeoutError)):
                return self._too_slow()
            way_out = "check that the server runs and that the address is right"
            return Fault(f"got no answer from {self._url}: {described(error)}", way_out, again=True, cause=error)
        except Exception:
            if expired.is_set():  # a socket that is cut off in the middle may raise anything
                return self._too_slow()
            raise
        if expired.is_set():  # the end of an answer that has no length may be our cut
            return self._too_slow()
        return read_answer(self._url, status, answer, [len(each) for each in batch.tokens])

    def _post(self, body: bytes, expired: threading.Event) -> tuple[int, bytes]:
        parts = urlsplit(self._url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self._spec.timeout)
        try:
            connection.connect()
            self._socket = connection.sock  # the connection lets go of it before the answer is read
            if expired.is_set() or self._closed.is_set():  # while there was no connection to cut
                raise ConnectionAbortedError("cut off while connecting")
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", path, body, {"Content-Type": "application/json", "Accept": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            self._socket = None
            connection.close()

    def _too_slow(self) -> Fault:
        late = too_slow(self._spec.timeout)
        return Fault(f"{late.what} at {self._url}", late.way_out)

    def _cut(self) -> None:
        connected = self._socket
        if connected is not None:
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


def read_answer(url: str, status: int, answer: bytes, counts: list[int]) -> Outcome:
    """What the server at ``url`` answered, as one score for each response of ``counts`` tokens."""
    text = answer.decode("utf-8", errors="replace")
    where = f"from {url} got status {status}: {shortened(text)}"
    if not 200 <= status < 300:
        return Fault(where, "see the server's log", again=status >= 500)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return Fault(f"{where}, which is not JSON", WANTED)
    if not isinstance(content, dict) or "scores" not in content:
        return Fault(f"{where}, which has no scores", WANTED)
    return checked(content["scores"], counts)
