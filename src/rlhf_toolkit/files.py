"""Files whose names, links or folders may come from strangers: what is read stays in its folder, what is written goes
through no link."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import IO

NAME = re.compile(r"[^/\\\x00-\x1f\x7f]+")
"""One part of a path: no separator of any system, no control character."""
WANDB_LOGS = "wandb/*run-*/logs/*"
"""In a run folder: W&B links its own log to its cache in the home folder. A run that goes on gets a new folder there,
so that nothing is written through the link of an earlier one."""
MOST_BYTES_OF_JSON = 2**28
"""The index of the largest models has some 20 MB."""
DRIVE = re.compile(r"[A-Za-z]:")


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is the name of a file in a folder and of nothing beyond it: text without a folder part, a drive
    or a control character, not empty, ``.`` or ``..``, at most 255 bytes."""
    if not isinstance(name, str) or name in (".", "..") or not NAME.fullmatch(name) or DRIVE.match(name):
        return False
    return len(name.encode(errors="surrogatepass")) <= 255


def leads_outside(path: Path, folder: Path, *also: Path) -> bool:
    """Whether ``path``, in ``folder``, is a link, or lies behind one, to something outside of it and of ``also``.

    The hub's cache is one folder: ``snapshots/<revision>`` holds links to ``blobs`` beside it.
    """
    root = Path(os.path.realpath(folder))
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    roots += [Path(os.path.realpath(other)) for other in also]
    target = Path(os.path.realpath(path))  # unlike resolve, also of a link to itself
    return not any(target.is_relative_to(allowed) for allowed in roots)


def link_outside(folder: Path, *also: Path, passing_over: str | None = None) -> Path | None:
    """The first link in ``folder``, at any depth, that leads out of it and of ``also``; None where there is none. No
    link is followed. A link whose path below ``folder`` is of the pattern ``passing_over`` is passed over."""
    for place, folders, names in os.walk(folder, followlinks=False):
        for name in sorted([*folders, *names]):
            path = Path(place, name)
            if path.is_symlink() and leads_outside(path, folder, *also):
                below, pattern = path.relative_to(folder), passing_over or ""
                same_depth = len(below.parts) == pattern.count("/") + 1  # match alone would compare the last parts
                if not (pattern and same_depth and below.match(pattern)):
                    return path
    return None


def special_file(folder: Path) -> Path | None:
    """The first thing in ``folder``, at any depth, that is neither a file nor a folder: a pipe, at which a reader would
    wait for ever, a socket, a device. None where there is none."""
    for place, _, names in os.walk(folder, followlinks=False):
        for name in sorted(names):
            mode = os.lstat(Path(place, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                return Path(place, name)
    return None


def created(path: Path) -> IO[str]:
    """``path`` opened for writing text as a new file: what stood there, a link among these, is removed and never
    written through. Raises OSError."""
    path.unlink(missing_ok=True)
    return open(path, "x", encoding="utf-8", newline="\n")


def appended(path: Path) -> IO[str]:
    """``path`` opened for adding text at its end, made where it is missing. Raises OSError where it is a link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8", newline="\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part, and through no link.

    A link at ``path`` is replaced by the file. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with created(temporary) as file:
        file.write(text)
    os.replace(temporary, path)
