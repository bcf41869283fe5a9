"""What every kind of training row shares: which columns it has, of which type, and why some rows are left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_toolkit.errors import DataError, shortened

TOO_LONG = "too long"
EMPTY_RESPONSE = "empty response"
CHOSEN_IS_REJECTED = "chosen equals rejected"


class ColumnTypes:
    """Raises DataError where a column holds strings in one row and lists in another: two kinds of data in one file."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, str]] = {}

    def check(self, value: Any, *, index: int, column: str) -> None:
        """Remember the type of ``column`` in its first row, compare all others with it."""
        kind = "a string" if isinstance(value, str) else "a list" if isinstance(value, list) else type(value).__name__
        row, first = self._first.setdefault(column, (index, kind))
        if kind != first:
            raise DataError(
                f"row {index}: {column} {shortened(value)} is {kind}, but in row {row} it is {first}; "
                "give the column one type, or split the file in two"
            )


def unknown_columns(columns: Sequence[str], understood: Sequence[str]) -> DataError:
    """The error of a dataset whose columns are none of the sets ``understood``."""
    return DataError(
        f"the columns {', '.join(columns) or '(none)'} are not of a known shape; rename them to one of: "
        f"{'; '.join(understood)}"
    )


class DropCount:
    """Counts the rows that are left out, by reason."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.reasons: Counter[str] = Counter()
        self._shortest = math.inf

    def add(self, reason: str) -> None:
        """Count one row more that is left out for ``reason``."""
        self.reasons[reason] += 1

    def fits(self, tokens: int) -> bool:
        """Whether a row of ``tokens`` is kept; one beyond ``max_tokens`` is counted, never truncated."""
        if tokens > self.max_tokens:
            self.add(TOO_LONG)
            self._shortest = min(self._shortest, tokens)
        return tokens <= self.max_tokens

    def nothing_left(self) -> DataError:
        """The error where all rows were left out."""
        total = sum(self.reasons.values())
        way_out = (
            f"set max_tokens={self.max_tokens} to {self._shortest} or more"
            if self.reasons[TOO_LONG]
            else "repair the rows"
        )
        return DataError(f"none of the {total} rows is left: {dropped_text(self.reasons)}; {way_out}")


def dropped_text(dropped: Mapping[str, int]) -> str:
    """The counts in words: ``dropped 2 too long, 1 empty response``, or ``none dropped``."""
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return f"dropped {counts}" if counts else "none dropped"


def span_text(lengths: Sequence[int]) -> str:
    """The smallest and the largest of ``lengths``, as ``3 to 9``."""
    return f"{min(lengths)} to {max(lengths)}"
