"""Rows that are read while they are used: for what does not fit into memory or onto a disk as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import datasets

from rlhf_toolkit.errors import DataError


class StreamedRows:
    """The first ``max_rows`` rows of ``source``, or all of them; each iteration opens it anew and begins at the first.

    What goes wrong becomes ``fault(error, count)``, with the count of rows that were read before. ``first`` is the
    first row, None where there is none; all rows have its columns.
    """

    def __init__(
        self,
        source: str,
        opened: Callable[[], datasets.IterableDataset],
        fault: Callable[[Exception, int], DataError],
        max_rows: int | None,
    ) -> None:
        self.max_rows, self.fault = max_rows, fault
        try:
            self.stream = opened()
        except Exception as error:  # network, hub, datasets, pyarrow and pandas fail in many ways
            raise fault(error, 0) from error
        self.first: dict[str, Any] | None = next(iter(self), None)
        self.column_names: list[str] = list(self.first or ())
        if self.first and self.stream.features is None and self.stream.info.builder_name == "json":
            # datasets leaves values of such a file encoded where a column is of mixed types
            raise DataError(
                f"{source}: json that is not one object on each line cannot be streamed; write it so, or set "
                "data.streaming to false"
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count = 0
        try:
            for row in islice(self.stream, self.max_rows):
                yield row
                count += 1
        except Exception as error:
            raise self.fault(error, count) from error


Rows: TypeAlias = datasets.Dataset | StreamedRows
"""What can be tokenised: rows in memory or on disk, or a stream of them."""


def first_row(rows: Rows) -> dict[str, Any] | None:
    """The first row; None where there is none."""
    if isinstance(rows, StreamedRows):
        return rows.first
    return rows[0] if len(rows) else None
