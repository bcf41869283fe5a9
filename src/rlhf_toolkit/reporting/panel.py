"""The frame of what a run says at its start: a title above and a rule below, across a terminal; in a log the title
alone."""

from __future__ import annotations

import shutil
import sys

from rlhf_toolkit.texts import printable, say

WIDEST = 100


def begin_panel(title: str) -> None:
    """Say what begins."""
    say(_rule(f"── {printable(title)} ") if _has_rules() else title)


def end_panel() -> None:
    """Close the frame, where there is one."""
    if _has_rules():
        say(_rule(""))


def _has_rules() -> bool:
    return sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf")


def _rule(text: str) -> str:
    return text + "─" * (min(shutil.get_terminal_size().columns, WIDEST) - len(text))
