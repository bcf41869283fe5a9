"""What a process says last, so that it is the last on the screen, once, however many processes there are.

A rank's line also goes to the file that torchelastic names for it, which any launcher on top of that shows. Under
``rlhf train`` the rank then says nothing itself: the launcher does, for all of them, when they have ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rlhf_toolkit.texts import LINES, printable

COMMAND = "RLHF_COMMAND"
"""Environment variable with the words of the ``rlhf train`` that has started this process, as JSON."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable with the file in which torchelastic looks for the reason of a rank's end."""
LAUNCHER = "RLHF_LAUNCHER"
"""Environment variable with the id of the process that runs the launcher of ``rlhf train``."""
_PARENT = os.getppid()


def say_at_once(*lines: str) -> None:
    """Write lines to the terminal, which ranks share, in one piece, the last of them under this rank's name."""
    rank = os.environ.get("RANK", "0")
    *above, line = [printable(text, LINES) for text in lines]
    if rank != "0":  # not at the end of rank 0's progress bar
        above, line = ["", *above], f"[rank {rank}] {line}"
    sys.stderr.write("\n".join([*above, line, ""]))
    sys.stderr.flush()


def say_last(line: str, *more: str) -> None:
    """Say what this process ends with: ``more``, such as the stack of a user's function, and then the one ``line``."""
    left = leave(line, more)
    if not (left and says_it_for_us()):
        say_at_once(*more, line)


def says_it_for_us() -> bool:
    """Whether the launcher of ``rlhf train`` says what this process leaves behind."""
    return _has_launcher() and os.getppid() == _PARENT


def launcher_is_gone() -> bool:
    """Whether the launcher of ``rlhf train`` has ended before this process, as one does that is killed."""
    return _has_launcher() and os.getppid() != _PARENT


def _has_launcher() -> bool:
    """Whether this process is a rank of ``rlhf train``, and not one that a rank has started, as a reward function may:
    that has the environment of its rank."""
    return os.environ.get(LAUNCHER) == str(_PARENT) and bool(os.environ.get(ERROR_FILE))


def leave(line: str, more: Sequence[str] = ()) -> bool:
    """Put the line where the launcher looks for it, in torchelastic's words; whether it lies there. What a process has
    left before stays."""
    place = os.environ.get(ERROR_FILE)
    if not place or (LAUNCHER in os.environ and not _has_launcher()):
        return False
    now, shown, rank = time.time(), printable(line, LINES), os.environ.get("RANK", "0")
    about = {"py_callstack": shown, "timestamp": str(int(now)), "time": now, "rank": rank, "more": list(more)}
    # Whole from the start: another thread of this process may end it, and torchelastic fails on half a file.
    written = f"{place}.{os.getpid()}.{threading.get_ident()}"
    try:
        Path(written).write_text(json.dumps({"message": {"message": shown, "extraInfo": about}}), encoding="utf-8")
        with suppress(FileExistsError):
            os.link(written, place)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            os.unlink(written)
    return True


def command_of_rlhf() -> list[str]:
    """The words of the ``rlhf train`` that has started this process; nothing where it was another command."""
    words = json.loads(os.environ.get(COMMAND, "[]"))
    return [str(word) for word in words]


def left_in(folder: Path) -> tuple[str, list[str]]:
    """What the ranks whose files lie below ``folder`` have left: the first one's line, under its rank's name where
    others have not ended alike, and what belongs above it. An empty line where none has left anything."""
    found = []
    for place in folder.rglob("error.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # of a rank that was killed while it wrote
            said = json.loads(place.read_text(encoding="utf-8"))["message"]
            about = said["extraInfo"]
            found.append((about["time"], about["rank"], said["message"], about))  # of a rank among all machines'
    if not found:
        return "", []
    _, rank, line, about = min(found, key=lambda each: each[:2])
    named = rank != "0" and any(each[2] != line for each in found)
    return (f"[rank {rank}] {line}" if named else line), [str(text) for text in about.get("more", ())]
