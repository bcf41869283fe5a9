"""The threads that hear what the main thread cannot, where the store that ranks meet through never answers: its process
is stopped, which to the others is what a cut cable is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from rlhf_toolkit.distributed.watch import SIGNALS, Watch
from rlhf_toolkit.errors import at_a_failure
from tests.support.processes import ROOT, environment_of_tests

SERVER = """
import time
from torch.distributed import TCPStore

store = TCPStore("127.0.0.1", 0, 1, True)
print(store.port, flush=True)
time.sleep(100)
"""
RANK = """
import os, signal, sys, time
from datetime import timedelta
from torch.distributed import PrefixStore, TCPStore
from rlhf_toolkit.distributed import stopping, watch

port, server, answer, deed = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
watch.ANSWER, stopping.ONE_REQUEST = answer, 0.5
stopping.training_begins()
mine = watch.Watch(stall_seconds=0)
mine._store = PrefixStore("watch", TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=1)))
mine.begin()
time.sleep(1.5)
os.kill(server, signal.SIGSTOP)
if deed == "signals":
    for _ in range(2):
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
if deed == "failure":
    time.sleep(1)
    began = time.monotonic()
    print(mine.told("an end of its own"), time.monotonic() - began < 10)
    os._exit(7)
time.sleep(60)
"""
STOPPED_RANK = """
import sys, time
from torch.distributed import PrefixStore, TCPStore
from rlhf_toolkit.distributed import watch

watch.ASLEEP = 3.0
mine = watch.Watch(stall_seconds=6)
mine._store = PrefixStore("watch", TCPStore("127.0.0.1", int(sys.argv[1]), None, False))
mine.begin()
print("begins", flush=True)
for _ in range(40):  # at least four seconds of this process's own time, at one place
    time.sleep(0.1)
print("goes on", flush=True)
mine.close()
"""


@pytest.fixture
def server() -> Iterator[tuple[int, int]]:
    """Port and process number of a store."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, env=environment_of_tests(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process.pid
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize(
    ("answer", "deed", "status", "said"),
    [
        (2.0, "nothing", 1, "StallError: the process through which the ranks have met has not answered for 2 s: it is"),
        (500.0, "signals", 128 + signal.SIGTERM, "stopped at once by a second SIGTERM"),
        (500.0, "failure", 7, "an end of its own True"),
    ],
)
def test_a_store_that_never_answers_holds_nobody(
    server: tuple[int, int], answer: float, deed: str, status: int, said: str
) -> None:
    arguments = [str(server[0]), str(server[1]), str(answer), deed]
    began = time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-c", RANK, *arguments],
        cwd=ROOT,
        env=environment_of_tests(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == status and said in finished.stdout + finished.stderr, finished.stderr[-3000:]
    assert time.monotonic() - began < 45


@pytest.mark.thorough
def test_a_run_that_was_stopped_for_a_while_goes_on(server: tuple[int, int]) -> None:
    """As by Ctrl-Z and fg: longer than a rank may stand still, but nothing has stalled."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED_RANK, str(server[0])],
        cwd=ROOT,
        env=environment_of_tests(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
        time.sleep(2)  # it has been looked at
        process.send_signal(signal.SIGSTOP)
        time.sleep(8)
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and said == "goes on\n", said
    finally:
        process.kill()


def test_a_watch_that_is_closed_leaves_no_pipe_and_no_handler() -> None:
    handlers, files, told = [signal.getsignal(n) for n in SIGNALS], len(os.listdir("/proc/self/fd")), len(at_a_failure)
    for _ in range(3):
        watch = Watch(stall_seconds=0)
        watch.begin()
        watch.close()
    assert [signal.getsignal(n) for n in SIGNALS] == handlers and len(at_a_failure) == told
    assert len(os.listdir("/proc/self/fd")) == files
