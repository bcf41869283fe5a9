"""Two machines on one: network namespaces joined by a cable, each with a folder of its own at the same path.

What stands under ``Hosts.DISK`` on one of them is not there on the other, so nothing can rest on a shared disk. Needs
no root, only a kernel that lets users make namespaces; ``reason_against`` says where it does not.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.processes import ROOT, Finished, environment_of_tests

TOOLS = ("unshare", "nsenter", "ip", "mount", "sleep")
ADDRESSES = ("10.13.0.1", "10.13.0.2")
SEARCHED = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
NEW_USER = ("unshare", "--user", "--map-root-user")
START_SECONDS = 10.0


@functools.cache
def reason_against() -> str | None:
    """Why this machine cannot be two, or None where it can."""
    missing = [name for name in TOOLS if shutil.which(name, path=SEARCHED) is None]
    if missing:
        return f"needs the commands {', '.join(missing)}"
    attempt = "ip link set lo up && ip link add name a type veth peer name b && mount -t tmpfs none /mnt"
    tried = subprocess.run(
        [*NEW_USER, "--net", "--mount", "sh", "-c", attempt], env=_environment(), capture_output=True, text=True
    )
    if tried.returncode:
        return f"the kernel does not let this user make network namespaces: {' '.join(tried.stderr.split())[:200]}"
    return None


@dataclass
class Command:
    """Something that runs on a host; ``log`` takes what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    def finished(self, seconds: float) -> Finished:
        """Wait for its end, at most ``seconds``; then all of it is killed, and the status is -9."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            status = -9
        return Finished(status, self.log.read_text(errors="replace"))

    def descendants(self) -> list[psutil.Process]:
        """Every process that it has started and that still runs."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL to all of it, the way a host ends whose power fails."""
        for process in [*self.descendants(), self.process]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self.process.wait()


class Hosts:
    """Two hosts below ``folder``; each sees its own ``folder/host0`` or ``folder/host1`` as ``folder/disk``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, folder / "disk"
        self.commands: list[Command] = []
        self.roots = [folder / f"host{number}" for number in range(2)]
        for path in (self.disk, *self.roots):
            path.mkdir()
        self.holders = [_holder([*NEW_USER, "--net", "--mount"])]
        inside = ["nsenter", "--preserve-credentials", "--user", f"--target={self.holders[0].pid}"]
        self.holders.append(_holder([*inside, "unshare", "--net", "--mount"]))
        self._on(0, f"ip link add name cable type veth peer name cable netns {_sleeper(self.holders[1])}")
        for number, address in enumerate(ADDRESSES):
            self._on(number, f"ip link set lo up && ip addr add {address}/24 dev cable && ip link set cable up")
            self._on(number, f"mount --bind '{self.roots[number]}' '{self.disk}'")

    def start(self, host: int, command: Sequence[str], **environment: str) -> Command:
        """Start ``command`` on a host. Its output goes to a file that both share, outside of their disks."""
        log = self.folder / f"command{len(self.commands)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._enter(host), *command],
                cwd=ROOT,
                env={**_environment(), **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.commands.append(Command(process, log))
        return self.commands[-1]

    def accelerate(self, host: int, config: Path, *words: str, machines: int = 2, **environment: str) -> Command:
        """``accelerate launch`` on a host, one process on each of ``machines``, as docs say it."""
        where = ["--main_process_ip", ADDRESSES[0], "--machine_rank", str(host)] if machines > 1 else []
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
        return self.start(host, [*launcher, *where, "--num_processes", str(machines), *words], **environment)

    def cut_the_cable(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        self._on(0, "ip link set cable down")

    def close(self) -> None:
        """End whatever still runs; the namespaces go with their last process."""
        for command in self.commands:
            command.kill()
        for holder in reversed(self.holders):
            for child in psutil.Process(holder.pid).children(recursive=True):
                child.kill()
            holder.kill()
            holder.wait()

    def _enter(self, host: int) -> list[str]:
        target = _sleeper(self.holders[host])
        where = [f"--wd={ROOT}", f"--target={target}"]
        return ["nsenter", "--preserve-credentials", "--user", "--net", "--mount", *where, "--"]

    def _on(self, host: int, script: str) -> None:
        command = [*self._enter(host), "sh", "-c", script]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{script}: {done.stderr}"


def _holder(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that keeps namespaces alive; ``command`` makes them and becomes it."""
    process = subprocess.Popen([*command, "sleep", "infinity"], env=_environment(), start_new_session=True)
    deadline = time.monotonic() + START_SECONDS
    while psutil.Process(process.pid).name() != "sleep":
        assert process.poll() is None and time.monotonic() < deadline, f"{' '.join(command)} did not start"
        time.sleep(0.01)
    return process


def _sleeper(holder: subprocess.Popen[bytes]) -> int:
    return holder.pid


def _environment() -> dict[str, str]:
    return {**environment_of_tests(), "PATH": SEARCHED, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "src")))}
