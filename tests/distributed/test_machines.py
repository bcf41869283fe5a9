"""The network between machines, and what they must have in common."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rlhf_toolkit.distributed import machines as module
from rlhf_toolkit.distributed.machines import GLOO_INTERFACE, interface_towards, meeting, name_interface, require_same
from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.distributed.watch import silent_end
from rlhf_toolkit.errors import TopologyError
from tests.support.launch import run_worker

TWO = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "10.13.0.1", "MASTER_PORT": "29500"}


def test_the_interface_is_the_one_that_holds_the_address_of_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SimpleNamespace(address="127.0.0.1")  # the source of what goes to the loopback
    other = SimpleNamespace(address="10.0.0.7")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [other], "cable": [other, own]})
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {"cable": SimpleNamespace(flags="up,running")})
    assert interface_towards("127.0.0.1") == "cable"
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {"cable": SimpleNamespace(flags="up,loopback,running")})
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("no.such.host.invalid") is None


def test_only_a_launch_over_machines_names_it_and_the_user_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "interface_towards", lambda address: f"towards {address}")
    environment = dict(TWO)
    name_interface(environment)
    assert environment[GLOO_INTERFACE] == "towards 10.13.0.1"
    for given in ({**TWO, GLOO_INTERFACE: "mine"}, {**TWO, "LOCAL_WORLD_SIZE": "4"}, {}):
        environment = dict(given)
        name_interface(environment)
        assert environment == given


def test_ranks_that_do_not_meet_say_what_to_check() -> None:
    with pytest.raises(TopologyError) as caught, meeting(dict(TWO)):
        raise RuntimeError("Gloo connectFullMesh failed\nwith [pair.cc]")
    assert str(caught.value).startswith("process 2 of 4 did not meet the others by 10.13.0.1:29500")
    assert "\n" not in str(caught.value) and "connectFullMesh" in str(caught.value)
    with pytest.raises(RuntimeError, match="as it is"), meeting({}):
        raise RuntimeError("as it is")


def test_ctrl_c_ends_a_process_that_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits in C++, where Python's own handler would be heard once the wait is over: ten minutes later."""
    before = signal.getsignal(signal.SIGINT)
    for script, environment, inside in ((True, TWO, signal.SIG_DFL), (True, {}, before), (False, TWO, before)):
        monkeypatch.setattr(module, "in_script", lambda script=script: script)
        with suppress(TopologyError), meeting(dict(environment)):
            assert signal.getsignal(signal.SIGINT) == inside
            if environment:
                raise RuntimeError("nobody came")
        assert signal.getsignal(signal.SIGINT) == before


def test_a_rank_that_ended_without_a_word_is_named_by_its_address() -> None:
    gloo = "RuntimeError: [/pytorch/pair.cc:537] Read error [10.13.0.2]:62625: Connection reset by peer. This is"
    assert silent_end(gloo).startswith("RLHFError: another rank, at 10.13.0.2, has ended without a word")
    assert silent_end("remote process exited").startswith("RLHFError: another rank has ended without a word")


def compared(topology: Topology, values: list[dict[str, Any]]) -> str:
    """What a rank is told about its entry of ``values``."""
    try:
        require_same("the setting", values[topology.rank])
    except TopologyError as error:
        return str(error)
    return ""


def test_what_differs_is_named_on_every_rank(tmp_path: Path) -> None:
    told = run_worker(f"{__name__}:compared", tmp_path, values=[{"a": 1, "b": 2}, {"a": 1, "b": 3}])
    assert told[0] == told[1]
    assert told[0].startswith("the setting b is 2 on rank 0 and 3 on rank 1; give every machine the same files")
    missing = run_worker(f"{__name__}:compared", tmp_path, values=[{"a": 1}, {"a": 1, "b": 3}])
    assert missing[0].startswith("the setting b is None on rank 0 and 3 on rank 1")
    assert run_worker(f"{__name__}:compared", tmp_path, values=[{"a": 1}, {"a": 1}]) == ["", ""]
