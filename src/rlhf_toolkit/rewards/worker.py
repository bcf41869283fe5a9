"""What runs in a worker process: it loads one function, then answers one call at a time. Nothing here imports torch."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from rlhf_toolkit.errors import ConfigError, described
from rlhf_toolkit.plugins import load_function
from rlhf_toolkit.rewards.calls import Batch, Fault, Outcome, WorkerTraceback, outcome_of, takes_tokens, with_text

PR_SET_PDEATHSIG = 1


def serve(descriptor: int) -> None:
    """Answer what arrives on the socket ``descriptor`` until the other side closes it.

    First come ``(function, setting, kwargs)``; the answer is whether the function takes tokens, or the ConfigError
    that loading it raised. Then come batches, each answered by its Outcome.
    """
    os.set_inheritable(descriptor, False)
    if sys.platform == "linux":  # the kernel kills this process when the thread that started it ends, however it ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(descriptor)
    spec, setting, kwargs = pickle.loads(connection.recv_bytes())
    try:
        function = load_function(spec, setting)
    except ConfigError as error:
        connection.send_bytes(pickle.dumps(error))
        return
    connection.send_bytes(pickle.dumps(takes_tokens(function)))
    while True:
        try:
            payload = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(outcome_in_worker(function, payload, kwargs)))


def outcome_in_worker(function: Any, payload: bytes, kwargs: dict[str, Any]) -> Outcome:
    """Call ``function`` with the batch that ``payload`` holds. Nothing is raised: neither what the function raises nor
    what reading the batch does."""
    try:
        batch: Batch = pickle.loads(payload)
    except Exception as error:  # a column's type may be defined where no worker finds it
        way_out = "give the dataset columns of plain values"
        return with_text(Fault(f"got columns that a worker cannot read: {described(error)}", way_out, cause=error))
    try:
        return with_text(outcome_of(function, batch, kwargs))
    except BaseException as error:  # SystemExit, or whatever else is no Exception
        cause = WorkerTraceback("".join(traceback.format_exception(error)))
        return Fault(f"raised {described(error)}", "repair the function (see its traceback)", again=True, cause=cause)
