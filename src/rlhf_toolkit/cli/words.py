"""What a command of ``rlhf`` is made of: its name, its help, the function that runs it, and its arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_toolkit.errors import shortened

Options = argparse.Namespace


class Argument:
    """What ``add_argument`` is given."""

    def __init__(self, *names: str, **options: Any) -> None:
        self.names, self.options = names, options


@dataclass(frozen=True)
class Command:
    """What is typed, what ``--help`` says of it, the function that runs it, and the arguments it takes."""

    name: str
    help: str
    run: Callable[[Options], None]
    arguments: tuple[Argument, ...]
    light: bool = False
    """Whether it answers before torch and the libraries on it are imported, if it needs them at all."""
    settings: bool = False
    """Whether ``section.key=value`` among its words replaces a setting of its file, in any of three spellings."""
    more: Callable[[], str] | None = None
    """What its ``--help`` ends with."""


def at_least_1(text: str) -> int:
    """A whole number from 1 up."""
    return _whole(text, 1)


def from_0(text: str) -> int:
    """A whole number from 0 up."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not (text.isdecimal() and len(text) <= 18 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{shortened(text, 40)} is no whole number from {least} up")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    return _number(text, 0.0, 1.0)


def penalty(text: str) -> float:
    """What a repetition penalty may be."""
    return _number(text, 0.01, 100.0)


def _number(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least < value <= most:
        raise argparse.ArgumentTypeError(f"{shortened(text, 40)} is no number above {least:g} and up to {most:g}")
    return value
