"""Rewards from real servers on this machine: the protocol, and every way in which a server can fail."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_toolkit.errors import RewardError
from rlhf_toolkit.rewards import http
from rlhf_toolkit.rewards.compose import Rewards
from rlhf_toolkit.rewards.specification import RewardSpec
from tests.support.offenders import for_each
from tests.support.rewards import batch_of, rewards_of, wait_until

Answer = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Reads a request and has the server's ``behave`` answer it."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Content-Type"], body))  # type: ignore[attr-defined]
        self.server.behave(self, body)  # type: ignore[attr-defined]

    def say(self, content: Any, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behave: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.seen = behave, []  # type: ignore[var-annotated]

    def handle_error(self, *args: Any) -> None:
        """A client that has gone away is part of these tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score?kind=a"


@contextmanager
def served(behave: Answer) -> Iterator[Server]:
    with Server(behave) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def lengths(handler: Handler, body: dict[str, Any]) -> None:
    handler.say({"scores": [len(response) for response in body["responses"]]})


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF", 0.01)


def of(server: Server | str, **keys: Any) -> dict[str, Any]:
    return {"url": server if isinstance(server, str) else server.url, "name": "judge", **keys}


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_what_is_sent_and_what_is_read() -> None:
    with served(lengths) as server, rewards_of(of(server, batch_size=2, workers=1, weight=2)) as rewards:
        assert rewards.collect(*batch_of(["a", "bé", "ccc"], label=5)).totals == [2, 4, 6]
    assert server.seen == [
        (
            "/score?kind=a",
            "application/json",
            {"prompts": ["prompt\n0", "prompt\n1"], "responses": ["a", "bé"], "columns": {"label": [5, 5]}},
        ),
        (
            "/score?kind=a",
            "application/json",
            {"prompts": ["prompt\n2"], "responses": ["ccc"], "columns": {"label": [5]}},
        ),
    ]


def test_kwargs_are_sent_where_there_are_any() -> None:
    with served(lengths) as server, rewards_of(of(server, kwargs={"strict": True})) as rewards:
        rewards.collect(*batch_of(["a"]))
    assert server.seen[0][2]["kwargs"] == {"strict": True}


def test_numbers_for_tokens() -> None:
    with (
        served(lambda handler, body: handler.say({"scores": [[1, 2, 3]]})) as server,
        rewards_of(of(server)) as rewards,
    ):
        scores = rewards.collect(*batch_of(["abc"]))
    assert scores.token_rewards == [[1, 2, 3]] and scores.totals == [6]


def test_requests_are_made_at_the_same_time() -> None:
    """The server answers none of three before all are there."""
    barrier = threading.Barrier(3)

    def together(handler: Handler, body: dict[str, Any]) -> None:
        barrier.wait()
        lengths(handler, body)

    with served(together) as server, rewards_of(of(server, workers=3)) as rewards:
        assert rewards.collect(*batch_of(["a", "bb", "ccc", "d", "ee", "fff"])).totals == [1, 2, 3, 1, 2, 3]


def test_requests_start_when_a_response_is_submitted() -> None:
    with served(lengths) as server, rewards_of(of(server)) as rewards:
        prompts, responses, tokens = batch_of(["a", "bb"])
        rewards.submit(1, prompts[1], responses[1], tokens[1])
        wait_until(lambda: len(server.seen) == 1)
        assert rewards.collect(prompts, responses, tokens).totals == [1, 2]
    assert [body["responses"] for _, _, body in server.seen] == [["bb"], ["a"]]


# ---- failures --------------------------------------------------------------------------------------------------------


def silent(handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(30)


def dripping(handler: Handler, body: dict[str, Any]) -> None:
    """A byte now and then: each read is quick, the whole never ends."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def cut_short(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [')
    handler.close_connection = True


SAYING: dict[str, tuple[Any, int, str]] = {
    "500": (b"out of\nmemory", 500, r"from {url} got status 500: 'out of\nmemory'; see the server's log"),
    "404": (b"x" * 900, 404, "from {url} got status 404: '" + "x" * 199 + "...; see the server's log"),
    "301": (b"", 301, "from {url} got status 301: ''; see the server's log"),
    "not JSON": (
        b'{"scores": [1.0',
        200,
        """from {url} got status 200: '{{"scores": [1.0', which is not JSON; answer""",
    ),
    "not UTF-8": (b"\xff\xfe", 200, "from {url} got status 200: '\ufffd\ufffd', which is not JSON; answer"),
    "too deep": (b"[" * 200000, 200, "from {url} got status 200: '" + "[" * 199 + "..., which is not JSON; answer"),
    "no scores": (
        {"score": [1.0]},
        200,
        """from {url} got status 200: '{{"score": [1.0]}}', which has no scores; ans""",
    ),
    "a list": ([1.0], 200, "from {url} got status 200: '[1.0]', which has no scores; answer"),
    "wrong count": ({"scores": [1.0, 2.0]}, 200, "returned 2 scores; return one number for each of the 1 responses"),
    "no list": ({"scores": 1.0}, 200, "returned 1.0 (float); return one number"),
    "null": ({"scores": [None]}, 200, "gave score None (NoneType); return a finite number"),
    "text": ({"scores": ["1.0"]}, 200, "gave score '1.0' (str); return a finite number"),
    "NaN": (b'{"scores": [NaN]}', 200, "gave score nan (float); return a finite number"),
    "infinity": (b'{"scores": [1e400]}', 200, "gave score inf (float); return a finite number"),
}
DOING: dict[str, tuple[Answer, str]] = {
    "silent": (silent, "took longer than its 0.5 s at {url}; make it faster, or raise its timeout"),
    "dripping": (dripping, "took longer than its 0.5 s at {url}; make it faster, or raise its timeout"),
    "cut short": (cut_short, "got no answer from {url}: IncompleteRead: "),
    "hangs up": (lambda handler, body: None, "got no answer from {url}: RemoteDisconnected: "),
}
POLICIES: dict[str, dict[str, Any]] = {
    "error": {},
    "score": {"on_failure": "score", "failure_score": -1},
    "drop": {"on_failure": "drop"},
}


def misbehaving(name: str) -> tuple[Answer, str]:
    if name in DOING:
        return DOING[name]
    content, status, said = SAYING[name]
    return lambda handler, body: handler.say(content, status), said


@for_each("policy", POLICIES)
@for_each("name", [*SAYING, *DOING])
def test_each_failure_under_each_policy(name: str, policy: str) -> None:
    """Only the responses ``bad`` meet it."""
    spoil, said = misbehaving(name)

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        (spoil if body["responses"] == ["bad"] else lengths)(handler, body)

    limit = {"timeout": 0.5} if name in ("silent", "dripping") else {}
    with served(behave) as server, rewards_of(of(server, **limit, **POLICIES[policy])) as rewards:
        batch = batch_of(["a", "bad", "cccc"])
        if policy == "error" and name not in ("NaN", "infinity"):
            with pytest.raises(RewardError) as caught:
                rewards.collect(*batch)
            message = str(caught.value)
            assert message.startswith(f"reward judge {said.format(url=server.url)}") and "\n" not in message
            assert message.endswith(r"; its prompt was 'prompt\n1' (row 101 of the dataset)")
            return
        scores = rewards.collect(*batch)
        if policy == "error":  # a number that is not finite leaves its update out, as with on_failure: skip
            assert math.isnan(scores.totals[1])
            scores.totals[1] = 0
        assert scores.totals == [1, -1 if policy == "score" else 0, 4]
        assert scores.kept == [True, policy == "score", True]
        assert math.isnan(scores.parts["judge"][1]) and scores.failures == {"judge": 1}


def test_columns_that_json_cannot_hold() -> None:
    said = r"reward judge got columns that JSON cannot hold: TypeError: .* bytes "
    with served(lengths) as server, rewards_of(of(server)) as rewards, pytest.raises(RewardError, match=said):
        rewards.collect(*batch_of(["a"], label=b"x"))


def test_a_server_that_dies_in_mid_run() -> None:
    """After four answers its socket is closed: every later call fails, and the run goes on under its policy."""
    with served(lengths) as server:
        entry = of(server, workers=1, retries=1, on_failure="drop")
        with rewards_of(entry) as rewards:
            assert rewards.collect(*batch_of(["a", "bb"])).kept == [True, True]
            server.shutdown()
            server.server_close()
            scores = rewards.collect(*batch_of(["a", "bb", "ccc"]))
        assert (scores.kept, scores.failures) == ([False] * 3, {"judge": 3})
        with (
            rewards_of(of(server)) as rewards,
            pytest.raises(RewardError, match=r"got no answer from .*Refused.* check"),
        ):
            rewards.collect(*batch_of(["a"]))


# ---- retries ---------------------------------------------------------------------------------------------------------


def first_then_lengths(spoil: Answer, times: int) -> Answer:
    """``spoil`` for the first ``times`` requests."""
    left = [times]

    def behave(handler: Handler, body: dict[str, Any]) -> None:
        left[0] -= 1
        (spoil if left[0] >= 0 else lengths)(handler, body)

    return behave


@for_each("name", ["500", "cut short", "hangs up"])
@for_each("times, retries, good", [(1, 1, True), (2, 3, True), (2, 1, False), (1, 0, False)])
def test_a_call_that_fails_is_tried_again(name: str, times: int, retries: int, good: bool) -> None:
    with served(first_then_lengths(misbehaving(name)[0], times)) as server:
        with rewards_of(of(server, retries=retries, on_failure="drop")) as rewards:
            assert rewards.collect(*batch_of(["aa"])).kept == [good]
        assert len(server.seen) == min(times + 1, retries + 1)


@for_each("name", ["404", "301", "not JSON", "no scores", "wrong count", "NaN", "silent"])
def test_a_wrong_answer_is_not_asked_for_again(name: str) -> None:
    with served(misbehaving(name)[0]) as server:
        with rewards_of(of(server, retries=3, on_failure="drop", timeout=0.5)) as rewards:
            assert rewards.collect(*batch_of(["aa"])).kept == [False]
        assert len(server.seen) == 1


def test_each_retry_waits_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(http, "BACKOFF", 0.5)
    monkeypatch.setattr(http, "LONGEST_BACKOFF", 3.0)
    with served(misbehaving("500")[0]) as server:
        caller = http.HTTPCaller(RewardSpec.parse(of(server, retries=5)))
        monkeypatch.setattr(caller._closed, "wait", lambda seconds: waits.append(seconds))
        from rlhf_toolkit.rewards.calls import Batch, Fault

        assert isinstance(caller.call(Batch(["p"], ["r"], [[1]], {})), Fault)
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_close_cuts_off_requests_and_ends_their_threads() -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as never_accepts:
        rewards = Rewards([RewardSpec.parse({"url": f"http://127.0.0.1:{never_accepts.getsockname()[1]}/"})])
        for i, row in enumerate(zip(*batch_of(["r"] * 9), strict=True)):
            rewards.submit(i, *row)
        time.sleep(0.1)
        rewards.close()
        assert threading.active_count() <= before
