"""The ground on which a case is tried: a folder of its own, victims outside of it, a server that nobody should ask, and
Python's audit events, which tell what was started, written and connected to, whatever library did it."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VICTIM = "what a stranger must neither read nor change\n"
PWNED = "pwned"
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


@dataclass(frozen=True)
class Ground:
    """``folder`` is the case's own; ``outside`` holds ``victim.safetensors`` and others of that text, and is where
    payloads leave ``pwned``; ``url`` is the server."""

    folder: Path
    outside: Path
    url: str

    def filled(self, text: str) -> str:
        """``text`` with ``{OUTSIDE}``, ``{URL}`` and ``{COMMAND}`` replaced."""
        command = f"touch {self.outside / PWNED}"
        return text.replace("{OUTSIDE}", str(self.outside)).replace("{URL}", self.url).replace("{COMMAND}", command)

    def harm(self) -> list[str]:
        """What has happened to the place outside: ``executed``, ``written`` and where."""
        found = [f"executed: {path}" for path in self.outside.glob(f"{PWNED}*")]
        for path in sorted(self.outside.iterdir()):
            whole = path.name.startswith("victim") and path.read_text() == VICTIM
            if not (whole or path.name.startswith(PWNED)):
                found.append(f"written: {path}")
        return found


_here: list[Ground] = []
noticed: list[str] = []
"""What the audit events of this process told since ``enter``."""


def here() -> Ground:
    """The ground of the case that runs in this process."""
    return _here[-1]


def prepare(folder: Path, url: str) -> Ground:
    """A fresh ground in ``folder``."""
    ground = Ground(folder / "inside", folder / "outside", url)
    for place in (ground.folder, ground.outside):
        place.mkdir(parents=True)
    for name in ("victim", "victim.safetensors", "victim.json", "victim.py"):
        (ground.outside / name).write_text(VICTIM)
    return ground


def enter(ground: Ground) -> None:
    """Go there, and notice from now on. An audit hook cannot be taken away: this is for a process of one case."""
    _here.append(ground)
    noticed.clear()
    os.chdir(ground.folder)
    allowed = (str(ground.folder.parent), os.devnull, "/dev/shm", "/dev/null")

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event in STARTS:
            noticed.append(f"executed: {event} {values[:2]!r:.200}")
        elif (event == "open" and _writes(values)) or event in CHANGES:
            place = values[1 if event in ("os.symlink", "os.link", "os.rename") else 0]
            if isinstance(place, (str, bytes, os.PathLike)) and not os.path.realpath(os.fsdecode(place)).startswith(
                allowed
            ):
                noticed.append(f"written: {event} {place!r:.200}")
        elif event == "socket.connect" and not isinstance(values[1], (str, bytes)):
            noticed.append(f"fetched: {values[1]!r:.200}")
        elif event == "socket.getaddrinfo":
            noticed.append(f"fetched: {values[0]!r:.200}")

    sys.addaudithook(hook)


def _writes(values: tuple[Any, ...]) -> bool:
    mode, flags = values[1], values[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


class Server:
    """Listens and never answers: ``connections`` counts who came."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.socket.setblocking(False)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._count = 0

    def connections(self) -> int:
        """So many came until now."""
        while True:
            try:
                self.socket.accept()[0].close()
            except BlockingIOError:
                return self._count
            self._count += 1
