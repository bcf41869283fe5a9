"""What the columns of a CSV file hold: numbers only where nothing of the text is lost.

pandas, which reads CSV for ``datasets``, takes ``0012`` for 12 and the text ``NA`` for nothing at all.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import datasets

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
"""A number as JSON writes it: ``12``, ``-0.50``, ``1e-4``; not ``0012``, ``+1``, ``1_000``, ``nan``."""
WORDS = frozenset(("True", "False", "TRUE", "FALSE", "true", "false"))
MOST_DIGITS = 17
"""Of a number, which 64 bits then tell from every other one."""
LONGEST_FIELD = 2**28


class Column:
    """What has been seen of a column."""

    def __init__(self) -> None:
        self.integers = self.numbers = self.booleans = True
        self.empty = self.filled = False

    def add(self, text: str) -> None:
        """Look at one more cell."""
        if text == "":
            self.empty = True
            return
        self.filled = True
        exact = NUMBER.fullmatch(text) is not None and sum(map(str.isdecimal, text)) <= MOST_DIGITS
        self.numbers = self.numbers and exact
        self.integers = self.integers and text.lstrip("-").isdecimal()
        self.booleans = self.booleans and text in WORDS

    @property
    def type(self) -> str:
        """The name of its type for ``datasets``. Integers with an empty cell among them become floats, as in pandas."""
        if not self.filled:
            return "string"
        if self.numbers:
            return "int64" if self.integers and not self.empty else "float64"
        return "bool" if self.booleans and not self.empty else "string"


def csv_features(path: Path) -> datasets.Features | None:
    """A type for each column, from all of the file; None where it has no header that can be used, or is no sound CSV,
    which is left to its reader to say."""
    previous = csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _features(csv.reader(file))
    except (csv.Error, UnicodeDecodeError):
        return None
    finally:
        csv.field_size_limit(previous)


def _features(lines: Iterator[list[str]]) -> datasets.Features | None:
    names = [name or f"Unnamed: {place}" for place, name in enumerate(next(lines, []))]
    if len(set(names)) < len(names):
        return None
    columns = [Column() for _ in names]
    for cells in lines:
        if len(cells) > len(names):
            return None
        for column, text in zip(columns, [*cells, *[""] * (len(names) - len(cells))] if cells else (), strict=False):
            column.add(text)
    return datasets.Features({n: datasets.Value(column.type) for n, column in zip(names, columns, strict=True)})
