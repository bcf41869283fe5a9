"""A reward server that answers with whatever it likes, or does not; and addresses that lead nowhere."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_toolkit.rewards import http as client
from rlhf_toolkit.rewards.compose import Rewards
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.types import Prompt
from tests.strangers import frame, ground, payloads

COUNT, LIMIT = 160, 12.0
HEAVY = ("rlhf_toolkit.rewards.compose",)
Talk = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Case:
    """What the server says: bytes, or a function of the connection. ``url`` is another address to ask instead."""

    name: str
    says: bytes | Talk = b""
    url: str = ""
    policy: str = "score"
    good: bool = False


def answer(body: bytes, headers: str = "", status: str = "200 OK", length: bool = True) -> bytes:
    """An answer of HTTP."""
    own = f"Content-Length: {len(body)}\r\n" if length else ""
    return f"HTTP/1.1 {status}\r\n{own}{headers}\r\n".encode() + body


def scores(value: object) -> bytes:
    return answer(json.dumps({"scores": value}).encode())


def endless(piece: bytes, beginning: bytes, pause: float = 0.0) -> Talk:
    """``beginning``, then ``piece`` for ever."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(beginning)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return talk


OPEN = b"HTTP/1.1 200 OK\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
GOOD = b'{"scores": [0.5]}'
SAID: dict[str, bytes | Talk] = {
    "nothing": b"",
    "silence": lambda connection: time.sleep(60),
    "gigabytes": endless(b" " * 2**20, OPEN),
    "gigabytes in chunks": endless(b"100000\r\n" + b" " * 2**20 + b"\r\n", CHUNKED),
    "gigabytes of headers": endless(b"X-A: " + b"x" * 60000 + b"\r\n", b"HTTP/1.1 200 OK\r\n"),
    "an endless header": endless(b"x" * 2**16, b"HTTP/1.1 200 OK\r\nX: "),
    "an endless status": endless(b"x" * 2**16, b"HTTP/1.1 "),
    "many small headers": endless(b"A: b\r\n", b"HTTP/1.1 200 OK\r\n"),
    "100 for ever": endless(b"HTTP/1.1 100 Continue\r\n\r\n", b""),
    "a byte now and then": endless(b" ", OPEN, 0.05),
    "a header now and then": endless(b"A: b\r\n", b"HTTP/1.1 200 OK\r\n", 0.3),
    "small chunks for ever": endless(b"1\r\n \r\n", CHUNKED),
    "length 10^18": answer(GOOD, f"Content-Length: {10**18}\r\n", length=False),
    "length 10^18 and silence": endless(b"", answer(b"", f"Content-Length: {10**18}\r\n", length=False), 60),
    "length beyond 64 bits": answer(GOOD, "Content-Length: " + "9" * 40 + "\r\n", length=False),
    "length of many digits": answer(GOOD, "Content-Length: " + "9" * 5000 + "\r\n", length=False),
    "a negative length": answer(GOOD, "Content-Length: -5\r\n", length=False),
    "a length that is none": answer(GOOD, "Content-Length: x\r\n", length=False),
    "a length in other digits": answer(GOOD, "Content-Length: \u0661\u0667\r\n", length=False),
    "two lengths": answer(GOOD, "Content-Length: 3\r\nContent-Length: 99\r\n", length=False),
    "too short": answer(GOOD, "Content-Length: 99\r\n", length=False),
    "a huge chunk": CHUNKED + b"f" * 17 + b"\r\n" + GOOD,
    "a chunk of no number": CHUNKED + b"zz\r\n" + GOOD,
    "a negative chunk": CHUNKED + b"-5\r\n" + GOOD + b"\r\n0\r\n\r\n",
    "a long chunk size": CHUNKED + b"0" * 70000 + b"\r\n",
    "cut in a chunk": CHUNKED + b"50\r\n" + GOOD,
    "no HTTP": b"SSH-2.0-OpenSSH\r\n",
    "HTTP 0.9": GOOD,
    "HTTP 9": b"HTTP/9.9 200 OK\r\n\r\n" + GOOD,
    "random bytes": bytes(random.Random(1).randrange(256) for _ in range(5000)),
    "NULs": b"\0" * 5000,
    "status 99": answer(GOOD, status="99 x"),
    "status 1000": answer(GOOD, status="1000 x"),
    "status of letters": answer(GOOD, status="abc x"),
    "status of other digits": answer(GOOD, status="\u0662\u0660\u0660 OK"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "101": answer(GOOD, status="101 Switching Protocols"),
    "500 with ESC": answer(b"\x1b[2J\x1b]0;x\x07\r\n\x9b\xff", status="500 \x1b[2J"),
    "404": answer(b"x" * 100000, status="404 Not Found"),
    "a redirect to a file": answer(b"", "Location: file:///etc/passwd\r\n", status="302 Found"),
    "a redirect elsewhere": answer(b"", "Location: http://127.0.0.1:1/x\r\n", status="307 x"),
    "gzip": answer(b"\x1f\x8b\x08" + b"\0" * 100, "Content-Encoding: gzip\r\n"),
    "deep": answer(b"[" * 500_000),
    "deep scores": answer(b'{"scores": ' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
    "many empty lists": answer(b'{"scores": [' + b"[]," * 2**21 + b"[]]}"),
    "many keys": answer(json.dumps({f"k{i}": 0 for i in range(60_000)}).encode()),
    "many scores": scores([0.5] * 200_000),
    "a long number": answer(b'{"scores": [' + b"9" * 100_000 + b"]}"),
    "a long fraction": answer(b'{"scores": [0.' + b"9" * 100_000 + b"]}"),
    "1e9999999": answer(b'{"scores": [1e9999999]}'),
    "UTF-16": answer('{"scores": [0.5]}'.encode("utf-16")),
    "a BOM": answer(b"\xef\xbb\xbf" + GOOD),
    "surrogates": answer(b'{"scores": ["\\ud800"], "\\udfff": 1}'),
    "a pickle": answer(b"cos\nsystem\n(S'" + payloads.COMMAND.encode() + b"'\ntR."),
    "an object": scores({"__class__": "x"}),
    "ESC in a text": scores(["\x1b[2J\n\u202e"]),
    "nothing in JSON": answer(b"null"),
    "a list": answer(b"[0.5]"),
    "an empty answer": answer(b""),
    "another key": answer(b'{"score": [0.5]}'),
    "the same key twice": answer(b'{"scores": [0.5], "scores": "x"}'),
}
ADDRESSES = (
    *(
        "http://a..b/x",
        "http://.a/x",
        "http://" + "a" * 64 + ".b/x",
        "http://" + "a." * 200 + "b/x",
        "http://h:99999/x",
    ),
    *(
        "http://h:0/x",
        "http://h:x/x",
        "http://[::1/x",
        "http://[zz]/x",
        "http://\u0430.b/x",
        "http://a b/x",
        "file:///x",
    ),
    *("ftp://h/x", "http:///x", "http://u:p@h/x", "http://h/x\r\nA: b", "http://h\x00/x", "//h/x", "javascript:x", "x"),
    *("http://-/x", "http://127.0.0.1:1/x", "http://0/x", "http://[::]:1/x", "https://127.0.0.1:1/", "http://%41/x"),
    *("http://xn--/x", "http://xn--a/x", "http://1.2.3.4.5.6/x", "http://0x7f.1:1/x", "http://h/x#y", "http://?x"),
)
GIVEN = ({"scores": [value]} for value in payloads.VALUES)


def cases(seed: int, count: int) -> list[Case]:
    """All answers under a policy each, all addresses, then answers of which bytes are changed."""
    chance = random.Random(f"http {seed}")
    fixed = [Case(name, says, policy=chance.choice(["score", "drop", "error"])) for name, says in SAID.items()]
    fixed += [Case(f"address {url[:60]!a}", url=url) for url in ADDRESSES]
    fixed += [Case(f"scores {value!a:.50}", scores([value])) for value in payloads.VALUES]
    if count < len(fixed):
        quick = [case for case in fixed if isinstance(case.says, bytes)]
        return chance.sample(quick, min(count, len(quick)))
    for number in range(count - len(fixed)):
        content = bytearray(scores([0.5]) if chance.random() < 0.5 else CHUNKED + b"11\r\n" + GOOD + b"\r\n0\r\n\r\n")
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        fixed.append(Case(f"{number}: changed", bytes(content), good=True))
    return fixed


def run(case: Case) -> str:
    """Ask for one score. Right is a finite number, or the policy's consequence."""
    client.BACKOFF = 0.01
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=_serve, args=(server, case.says), daemon=True).start()
        url = case.url or f"http://127.0.0.1:{port}/score"
        entry = {"url": url, "name": "judge", "timeout": 1.5, "on_failure": case.policy}
        rewards = Rewards([RewardSpec.parse(entry)], warn=lambda line: _lines.append(line))
        try:
            result = rewards.collect([Prompt(0, "p", (1,), {})], ["r"], [[1]])
        finally:
            rewards.close()
            ground.noticed[:] = [each for each in ground.noticed if not _asked_for(each, port, case.url)]
    failed = result.failures["judge"] == 1
    if any("\n" in line or len(line) > 3000 for line in _lines):
        return frame.WRONGLY
    if failed:
        return frame.REFUSED
    return frame.RIGHTLY if abs(result.totals[0]) <= 1e308 else frame.WRONGLY


_lines: list[str] = []


def _asked_for(noted: str, port: int, url: str) -> bool:
    """Whether a connection is the one that the case is about; an address may be asked, and nothing else."""
    return noted.startswith("fetched") and (str(port) in noted or bool(url) or "127.0.0.1" in noted)


def _serve(server: socket.socket, says: bytes | Talk) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_talk, args=(connection, says), daemon=True).start()


def _talk(connection: socket.socket, says: bytes | Talk) -> None:
    with connection:
        try:
            connection.recv(2**16)
            if callable(says):
                says(connection)
            else:
                connection.sendall(says)
        except OSError:  # the client has gone away
            pass
