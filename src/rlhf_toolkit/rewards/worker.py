"""What runs in a worker process: it loads one function, then answers one call at a time. Nothing here imports torch."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from rlhf_toolkit.errors import ConfigError, described
from rlhf_toolkit.plugins import load_function
from rlhf_toolkit.rewards.calls import Batch, Fault, Outcome, asked, outcome_of, to_json
from rlhf_toolkit.rewards.confinement import leave_network

PR_SET_PDEATHSIG = 1


def serve(descriptor: int) -> None:
    """Answer what arrives on the socket ``descriptor`` until the other side closes it.

    First come ``(function, setting, kwargs, network)``; the answer is what the function asks for, or why it could not
    be loaded. Then come batches, each answered by its Outcome. What arrives is pickled, by the rank from its own data;
    what is answered is JSON, since a response may have taken this process over.
    """
    os.set_inheritable(descriptor, False)
    if sys.platform == "linux":  # the kernel kills this process when the thread that started it ends, however it ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(descriptor)
    spec, setting, kwargs, network = pickle.loads(connection.recv_bytes())
    try:
        if not network:
            try:
                leave_network()
            except OSError as error:
                place = f"{setting.removesuffix('.function')}.network=false"
                raise ConfigError(f"{place} cannot be kept: {described(error)}; take it away") from error
        function = load_function(spec, setting)
    except ConfigError as error:
        connection.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    asks = asked(function)
    described_asks = {
        "tokens": asks.tokens,
        "options": sorted(asks.options),
        "texts": sorted(asks.texts),
        "turns": asks.turns,
    }
    connection.send_bytes(json.dumps(described_asks).encode())
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(to_json(outcome_in_worker(function, message, kwargs)))


def outcome_in_worker(function: Any, message: bytes, kwargs: dict[str, Any]) -> Outcome:
    """Call ``function`` with the batch that ``message`` holds. Nothing is raised: neither what the function raises nor
    what reading the batch does."""
    try:
        batch: Batch = pickle.loads(message)
    except Exception as error:  # a column's type may be defined where no worker finds it
        way_out = "give the dataset columns of plain values"
        return Fault(f"got columns that a worker cannot read: {described(error)}", way_out, cause=error)
    try:
        return outcome_of(function, batch, kwargs)
    except KeyboardInterrupt as error:  # its own: a terminal's goes to the rank alone
        return Fault(f"raised {described(error)}", "repair the function (see its traceback)", again=True, cause=error)
