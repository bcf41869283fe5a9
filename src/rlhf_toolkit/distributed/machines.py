"""Launches over several machines: the network between them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from rlhf_toolkit.distributed.collectives import all_gather
from rlhf_toolkit.errors import TopologyError, described, in_script, shortened

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def spans_machines(environment: MutableMapping[str, str]) -> bool:
    """Whether the launch has processes that are not on this machine, by the variables that accelerate sets."""
    return int(environment.get("WORLD_SIZE", "1")) > int(environment.get("LOCAL_WORLD_SIZE", "1"))


def name_interface(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have gloo use the network that leads to the first machine, where a launch spans machines.

    Gloo would take the address that this machine's own name stands for, which in many an /etc/hosts is 127.0.0.1, and
    no other machine would reach it. What the user has set stays.
    """
    if not spans_machines(environment) or GLOO_INTERFACE in environment:
        return
    found = interface_towards(environment.get("MASTER_ADDR", ""))
    if found is not None:
        environment[GLOO_INTERFACE] = found


def interface_towards(address: str) -> str | None:
    """The name of this machine's interface that leads to ``address``, which may be its own; None where none does, or
    only the loopback. Nothing is sent."""
    with suppress(OSError):
        family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of a datagram socket: the kernel looks up the route
            own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            loopback = "loopback" in getattr(psutil.net_if_stats().get(name), "flags", "")
            if not loopback and any(each.address.partition("%")[0] == own for each in addresses):
                return name
    return None


@contextmanager
def meeting(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Around what makes the process group: where the processes of several machines do not find one another,
    TopologyError.

    A script's process waits here where no handler of Python's runs, for one that Ctrl-C may have ended: so Ctrl-C ends
    this one, too, and at once. Its launcher says so.
    """
    alone = int(environment.get("WORLD_SIZE", "1")) == 1
    before = None if alone or not in_script() else signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not spans_machines(environment):
            raise
        raise TopologyError(
            f"process {environment.get('RANK')} of {environment.get('WORLD_SIZE')} did not meet the others by "
            f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')} over "
            f"{GLOO_INTERFACE}={environment.get(GLOO_INTERFACE)} ({described(error)}); give every machine the same "
            f"--main_process_ip and port and a --machine_rank of its own, let them reach one another on all ports, or "
            f"set {GLOO_INTERFACE} to the interface between them"
        ) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def require_same(what: str, mine: Mapping[str, Any]) -> None:
    """Raise TopologyError, on all ranks, where ``mine`` is not the same on all of them: machines without a shared disk
    read files of their own. ``what`` is said of the keys. A collective."""
    found = all_gather(dict(mine))
    for other, theirs in enumerate(found):
        for name in sorted({*found[0], *theirs}):
            if found[0].get(name) != theirs.get(name):
                raise TopologyError(
                    f"{what} {name} is {shortened(found[0].get(name), 80)} on rank 0 and "
                    f"{shortened(theirs.get(name), 80)} on rank {other}; give every machine the same files at the same "
                    "paths and start all with the same command"
                )
