"""Reward functions in processes of their own, with a time limit that holds whatever the function does.

A process is not made by ``multiprocessing``, on which process pools are built: that imports the main script again in
each child, and with it torch and all of a recipe. A worker is a fresh Python that imports the user's function and
little else, leads a session of its own, so that what it has started can be killed with it, and sees of the
environment and of the network what ``confinement`` leaves it.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection

from rlhf_toolkit.errors import ConfigError, described
from rlhf_toolkit.rewards.calls import Asked, Batch, Fault, Outcome, from_json, most_bytes, too_slow
from rlhf_toolkit.rewards.confinement import environment_of_workers
from rlhf_toolkit.rewards.lanes import JOIN_SECONDS, Lanes, deadline
from rlhf_toolkit.rewards.specification import RewardSpec

START_SECONDS = 600.0
"""A worker may take this long to import the function's file; some load a model there."""
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); descriptor = int(sys.argv[2]); del sys.argv[1:]; "
    "from rlhf_toolkit.rewards.worker import serve; serve(descriptor)"
)


def worker_pool(spec: RewardSpec) -> Lanes:
    """``spec.workers`` processes that have loaded ``spec.function``. ConfigError where it cannot be loaded."""
    for name in spec.environment:
        if name not in os.environ:
            raise ConfigError(f"{spec.setting}.environment names {name}, which is not set; set it, or take it away")
    callers = [PoolCaller(spec) for _ in range(spec.workers)]
    lanes = Lanes(callers)
    try:
        asks = [caller.ready.result() for caller in callers]  # they agree
    except BaseException:
        lanes.close()
        raise
    lanes.asks = asks[0]
    return lanes


class PoolCaller:
    """Keeps one worker process for one thread of ``Lanes``: starts it, calls it, replaces it when it is gone.

    ``ready`` is what the function asks for, or the ConfigError with which the first start failed.
    """

    def __init__(self, spec: RewardSpec) -> None:
        self.ready: Future[Asked] = Future()
        self._spec = spec
        self._worker: WorkerProcess | None = None
        self._fault: Fault | None = None
        self._lock = threading.Lock()
        self._closed = False

    def prepare(self) -> None:
        """Have a worker that has loaded the function. Where the last one could not, the next call tries again."""
        if self._fault is None:
            self._ensure()

    def _ensure(self) -> None:
        with self._lock:
            is_good = self._worker is not None and self._worker.alive and self._fault is None
            if self._closed or is_good:
                return
            try:
                self._worker = worker = WorkerProcess(self._spec.environment)
            except (OSError, RuntimeError) as error:  # too many processes or threads, or no memory for one
                self._settle(ConfigError(f"{self._spec.setting}.workers: {described(error)}; use fewer workers"))
                return
        self._settle(worker.load(self._spec))

    def _settle(self, answer: Asked | ConfigError) -> None:
        if isinstance(answer, Asked):
            self._fault = None
        else:
            self._fault = Fault(f"could not be started again: {answer}", "repair its file", again=True)
        if not self.ready.done():
            if isinstance(answer, Asked):
                self.ready.set_result(answer)
            else:
                self.ready.set_exception(answer)

    def call(self, batch: Batch) -> Outcome:
        """The outcome of a call, made again up to ``retries`` times when none was to be had."""
        try:
            message = pickle.dumps(batch)
        except Exception as error:  # whatever a column's own pickling raises
            way_out = "give the dataset columns of plain values"
            return Fault(f"got columns that cannot be sent to a worker: {described(error)}", way_out, cause=error)
        for _ in range(self._spec.retries):
            outcome = self._once(message, batch)
            if isinstance(outcome, list) or not outcome.again or self._closed:
                return outcome
        return self._once(message, batch)

    def close(self) -> None:
        """Kill the worker, in the middle of a call if need be."""
        with self._lock:
            self._closed = True
            worker = self._worker
        if worker is not None:
            worker.kill()
            worker.join(JOIN_SECONDS)

    def _once(self, message: bytes, batch: Batch) -> Outcome:
        self._ensure()
        if self._fault is not None or self._worker is None:
            return self._fault or Fault("was closed", "call it before close()")
        return self._worker.call(message, [len(each) for each in batch.tokens], self._spec.timeout)


class WorkerProcess:
    """One process. It lives until ``kill``, until a call exceeds its limit, or until the function ends it.

    The kernel ends it when the thread that created it ends, so that nothing of it outlives a killed parent.
    """

    def __init__(self, named: Sequence[str] = ()) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            folders = json.dumps([folder for folder in sys.path if isinstance(folder, str)])
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", BOOT, folders, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environment_of_workers(named),
                start_new_session=True,
            )
        self._connection = Connection(os.dup(self._socket.fileno()))
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def alive(self) -> bool:
        """Whether the process has not ended; asked of the kernel, since the watcher learns of it a moment later."""
        if not self._watcher.is_alive():
            return False
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
        except ChildProcessError:  # the watcher has been quicker
            return False

    def load(self, spec: RewardSpec) -> Asked | ConfigError:
        """Have it load the function: what that asks for, or why it could not be loaded."""
        request = pickle.dumps((spec.function, f"{spec.setting}.function", dict(spec.kwargs), spec.network))
        answer = self._exchange(request, START_SECONDS, most_bytes([]))
        if isinstance(answer, Fault):
            way_out = "see what it printed, and try to import the file with python"
            return ConfigError(f"{spec.setting}.function={spec.function!r}: its worker {answer.what}; {way_out}")
        content = json.loads(answer)
        if "error" in content:
            return ConfigError(content["error"])
        return Asked(content["tokens"], frozenset(content["options"]), frozenset(content["texts"]), content["turns"])

    def call(self, message: bytes, counts: Sequence[int], timeout: float | None) -> Outcome:
        """Send a pickled batch, whose responses have ``counts`` tokens, and wait for its outcome, ``timeout`` seconds
        at most; then the process is killed."""
        answer = self._exchange(message, timeout, most_bytes(counts))
        return answer if isinstance(answer, Fault) else from_json(answer, counts)

    def kill(self) -> None:
        """End the process now; ``_watch`` does the rest."""
        self._process.kill()

    def join(self, seconds: float | None = None) -> None:
        """Wait until it has ended and all that it started with it."""
        self._watcher.join(seconds)

    def _exchange(self, message: bytes, timeout: float | None, most: int) -> bytes | Fault:
        """An answer to ``message`` of at most ``most`` bytes, or how the process came to its end. The time limit counts
        sending and reading, too."""
        answer = None
        with deadline(timeout, self.kill) as expired:
            try:
                self._connection.send_bytes(message)
                answer = self._connection.recv_bytes(most)
            except (EOFError, OSError):  # the watcher shuts the socket when the process ends; or the answer is too long
                self.kill()  # it may have closed the socket and live on
        if answer is None or expired.is_set():
            self.join()
        if answer is not None:
            return answer
        return too_slow(timeout) if expired.is_set() else crashed(self._process.returncode)

    def _watch(self) -> None:
        """When the process has ended: kill what it leaves behind, then wake whoever waits for its answer."""
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)  # its number stays taken until wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def crashed(returncode: int) -> Fault:
    """The fault of a call whose process ended with ``returncode``, negative where a signal killed it."""
    if returncode >= 0:
        how = f"ended its process with status {returncode}"
    else:
        names = {each.value: each.name for each in signal.Signals}
        how = f"had its process killed by {names.get(-returncode, f'signal {-returncode}')}"
    return Fault(how, "repair the function (SIGKILL may mean that memory ran out)", again=True)
