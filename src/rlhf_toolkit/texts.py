"""Text of strangers on its way to a person: a response, a column, a tensor, a setting, what an exception says.

A terminal obeys what is written to it: an escape sequence moves its cursor, sets its title or answers for the user; a
line break forges a line of the log; controls of direction turn a name around. Whatever is shown goes through
``printable``, the one function that says what may pass: the toolkit's errors do by themselves, the lines that a command
or a run prints by ``say`` or this function.

It also keeps secrets: what ``rlhf_toolkit.secrets`` has read from the environment or found in a setting is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

LINES = "\n\t"
"""What may stay in a text of several lines."""
WORDS = LINES + "\u00a0\u3000\u200c\u200d"
"""And in one that is read: spaces of other scripts, and what joins letters and parts the words of some."""
HIDDEN = "********"
around_lines: Callable[[], AbstractContextManager[object]] = nullcontext
"""What takes a progress bar off the terminal while a line is written: who shows bars sets it."""
_secrets: set[str] = set()


def keep_secret(value: str) -> None:
    """Replace ``value`` from now on wherever ``printable`` meets it in this process. One of fewer than four characters
    is left, since words would hold it by chance."""
    if len(value) >= 4:
        _secrets.update((value, repr(value)[1:-1]))


def without_secrets(text: str) -> str:
    """``text`` with every secret that this process knows replaced."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def printable(text: str, keep: str = "", *, longest: int | None = None) -> str:
    """``text`` with every character that does not print written as Python would escape it, but for those in ``keep``:
    control characters, line breaks, controls of direction, lone surrogates, spaces that look like none.

    Printable text, of any language, comes back as it is. Secrets are replaced. Of more than ``longest`` characters the
    rest is left out.
    """
    shown = without_secrets(text) if _secrets else text
    if longest is not None and len(shown) > longest:
        shown = shown[:longest] + "..."
    if shown.isprintable():
        return shown
    return "".join(each if each.isprintable() or each in keep else repr(each)[1:-1] for each in shown)


def say(text: str, file: TextIO | None = None) -> None:
    """Print ``text``, of one line or several, at once, on a line of its own where a bar stands on the terminal."""
    with around_lines():
        print(printable(text, LINES), file=file or sys.stdout, flush=True)


def quoted(value: Any, length: int) -> str:
    """``repr(value)`` on one line, of some ``length`` characters, without ever making a longer one: a list that holds
    itself, or a thousand times another, is cut where it gets long."""
    text = " ".join("".join(_pieces(value, length + 1, 0)).split())
    return printable(text if len(text) <= length else text[:length] + "...")


DEEPEST = 6


def _pieces(value: Any, room: int, depth: int) -> list[str]:
    """The parts of ``repr(value)``, no more than ``room`` characters need."""
    if isinstance(value, str | bytes):
        return [repr(value[: room + 1])]
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4000:
        return [f"a whole number of {value.bit_length()} bits"]
    if type(value) not in (list, tuple, set, frozenset, dict) or not value:
        try:
            return [repr(value)]
        except Exception as error:  # the repr of a stranger's object
            return [f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"]
    opening, closing = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
    if depth >= DEEPEST:
        return [opening, "...", closing]
    found, used = [opening], 0
    for number, item in enumerate(value):
        if used > room:
            return [*found, "..."]
        part = [", "] if number else []
        part += _pieces(item, room - used, depth + 1)
        if isinstance(value, dict):
            part += [": ", *_pieces(value[item], room - used, depth + 1)]
        found += part
        used += sum(map(len, part))
    ending = "," if isinstance(value, tuple) and len(value) == 1 else ""
    return [*found, ending, closing]
