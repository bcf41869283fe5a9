"""Rewards from a server: one POST of JSON for each call.

The standard library does it, since no client library limits a request as a whole: their time limits are for each read,
so that a server which sends a byte now and then is never too slow.
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
from concurrent.futures import Future
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from rlhf_toolkit.errors import described, shortened
from rlhf_toolkit.rewards.calls import Batch, Fault, Outcome, checked, most_bytes, too_slow
from rlhf_toolkit.rewards.lanes import Lanes, deadline
from rlhf_toolkit.rewards.specification import RewardSpec

BACKOFF = 0.5
"""Seconds before the first retry; each further one waits twice as long."""
LONGEST_BACKOFF = 30.0
PIECE = 2**16
"""Bytes that are read at a time."""
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
        except Exception as error:  # whatever a column's own methods raise
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
                status, answer = self._post(body, expired, most_bytes([len(each) for each in batch.tokens]))
        except TooLongError as error:
            return Fault(f"got too long an answer from {self._url}: {error}", WANTED)
        except (OSError, HTTPException) as error:
            if expired.is_set() or (limit is not None and isinstance(error, TimeoutError)):
                return self._too_slow()
            way_out = "check that the server runs and that the address is right"
            return Fault(f"got no answer from {self._url}: {described(error)}", way_out, again=True, cause=error)
        except Exception as error:  # a host that is no name, an answer that no header announced
            if expired.is_set():  # a socket that is cut off in the middle may raise anything
                return self._too_slow()
            way_out = "check the address and what the server sends"
            return Fault(f"could not ask {self._url}: {described(error)}", way_out, cause=error)
        if expired.is_set():  # the end of an answer that has no length may be our cut
            return self._too_slow()
        return read_answer(self._url, status, answer, [len(each) for each in batch.tokens])

    def _post(self, body: bytes, expired: threading.Event, most: int) -> tuple[int, bytes]:
        """Status and body of the answer, of which one byte more than ``most`` is read at most."""
        parts = urlsplit(self._url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self._spec.timeout)
        try:
            connection.sock = self._connected(parts.scheme, connection.host, connection.port, expired)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", path, body, {"Content-Type": "application/json", "Accept": "application/json"})
            response = connection.getresponse()
            return response.status, read_body(response, most)
        finally:
            self._socket = None
            connection.close()

    def _connected(self, scheme: str, host: str, port: int, expired: threading.Event) -> socket.socket:
        """A connection to the first of the host's addresses that takes one; ``close`` and the limit can cut it off from
        its beginning. Raises OSError."""
        failure: OSError = ConnectionAbortedError("the host has no address")
        for family, address in addresses(host, port, self._spec.timeout):
            if expired.is_set() or self._closed.is_set():
                raise ConnectionAbortedError("cut off while connecting")
            self._socket = plain = socket.socket(family, socket.SOCK_STREAM)
            plain.settimeout(self._spec.timeout)
            try:
                plain.connect(address)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if scheme == "http":
                    return plain
                context = ssl.create_default_context()
                self._socket = safe = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
                safe.do_handshake()
                return safe
            except OSError as error:
                failure = error
                self._socket.close()
        raise failure

    def _too_slow(self) -> Fault:
        late = too_slow(self._spec.timeout)
        return Fault(f"{late.what} at {self._url}", late.way_out)

    def _cut(self) -> None:
        connected = self._socket
        if connected is not None:
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


def addresses(host: str, port: int, seconds: float | None) -> list[tuple[int, Any]]:
    """(family, address) of each address of ``host``. Raises TimeoutError where the system's resolver, which nothing
    can interrupt, takes longer than ``seconds``, and what it raises."""
    found: Future[list[Any]] = Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # OSError, and UnicodeError for what is no name
            found.set_exception(error)

    threading.Thread(target=look_up, daemon=True).start()
    return [(family, address) for family, _, _, _, address in found.result(seconds)]


class TooLongError(HTTPException):
    """An answer is longer than one that has the scores can be."""


def read_body(response: HTTPResponse, most: int) -> bytes:
    """The body, read in pieces, so that no length that a server announces is taken at its word. Raises TooLongError
    beyond ``most`` bytes, and IncompleteRead where it ends before its length."""
    body = bytearray()
    while piece := response.read(PIECE):
        body += piece
        if len(body) > most:
            raise TooLongError(f"it is longer than {most} bytes")
    if response.length:
        raise IncompleteRead(bytes(body[:100]), response.length)
    return bytes(body)


def read_answer(url: str, status: int, answer: bytes, counts: list[int]) -> Outcome:
    """What the server at ``url`` answered, as one score for each response of ``counts`` tokens."""
    text = answer.decode("utf-8", errors="replace")
    where = f"from {url} got status {status}: {shortened(text[:1000])}"
    if not 200 <= status < 300:
        return Fault(where, "see the server's log", again=status >= 500)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return Fault(f"{where}, which is not JSON", WANTED)
    if not isinstance(content, dict) or "scores" not in content:
        return Fault(f"{where}, which has no scores", WANTED)
    return checked(content["scores"], counts)
