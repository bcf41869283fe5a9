"""What stands on a terminal after a program has written to it: an independent reading of carriage returns, line feeds
and the few escape sequences that progress bars use."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PIECES = re.compile(r"\x1b\[(\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)|(\x1b)")


def shown(text: str) -> list[str]:
    """The lines of a screen without a right edge, on which a written character takes the place of the one there."""
    lines, row, column = [""], 0, 0
    for found in PIECES.finditer(text):
        count, letter, back, down, plain, odd = found.groups()
        assert not odd and letter in (None, "A", "K"), f"a sequence that no bar of ours uses: {found[0]!r}"
        if letter == "A":
            row = max(0, row - int(count or 1))
        elif letter == "K":
            lines[row] = lines[row][:column]
        elif back:
            column = 0
        elif down:
            row, column = row + 1, column if letter else 0
            lines += [""] * (row + 1 - len(lines))
        elif plain:
            lines[row] = lines[row].ljust(column)[:column] + plain + lines[row][column + len(plain) :]
            column += len(plain)
    return [line.rstrip() for line in lines]


@contextmanager
def terminal() -> Iterator[list[str]]:
    """Inside, stdout and stderr are one terminal; afterwards the list holds all that was written to it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    written, pieces = list[str](), list[bytes]()

    def read() -> None:
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # Linux's way of saying that the other side is closed
                return
            if not piece:
                return
            pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    before, stream = (sys.stdout, sys.stderr), os.fdopen(slave, "w", encoding="utf-8", buffering=1)
    sys.stdout = sys.stderr = stream
    try:
        yield written
    finally:
        sys.stdout, sys.stderr = before
        stream.close()
        reader.join(10)
        os.close(master)
        written.append(b"".join(pieces).decode())
