"""Rows that a program brings, a ``datasets.Dataset`` or a list of dicts, read as they would be from a file."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from types import NoneType
from typing import Any

import datasets

from rlhf_toolkit.data.tables import check_values, stored
from rlhf_toolkit.errors import DataError, described, shortened

MOST_LOOKED_AT = 5
"""Names of splits or types that a message quotes."""
PLAIN = (NoneType, bool, int, float, str, bytes, datetime.date, datetime.time, datetime.timedelta, Decimal)
"""Values that a table holds as they are; of others ``datasets`` keeps what it likes."""


def rows_of(value: Any, setting: str) -> datasets.Dataset:
    """The rows of ``value``, whose values are read as they are stored. A row that lacks a column of another has None
    there, as in a file. DataError, by the name of the ``setting``, where these are no rows, or none."""
    if isinstance(value, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        splits = ", ".join(list(map(str, value))[:MOST_LOOKED_AT])
        raise DataError(f"{setting} is a {type(value).__name__} of splits ({splits}); give one of them")
    if isinstance(value, datasets.IterableDataset):
        raise DataError(
            f"{setting} is an IterableDataset, which cannot be looked at as a whole; give its name with "
            "streaming=True, or list(it.take(1000))"
        )
    try:
        rows = value if isinstance(value, datasets.Dataset) else _table(value, setting)
        rows = stored(rows)
        check_values(rows)
    except DataError:
        raise
    except Exception as error:  # whatever datasets and pyarrow raise about values of a stranger's
        raise DataError(
            f"{setting} cannot be read as rows: {described(error)}; give each column values of one type"
        ) from error
    if not len(rows):
        raise DataError(f"{setting} holds no rows; give it at least one")
    return rows  # type: ignore[no-any-return]


def _table(value: Any, setting: str) -> datasets.Dataset:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        hint = "; write Dataset.from_pandas(it)" if hasattr(value, "iloc") else ""
        raise DataError(
            f"{setting} is a {type(value).__name__}, not a datasets.Dataset, a list of dicts, a file or a name of the "
            f"hub{hint}"
        )
    for index, row in enumerate(value):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise DataError(f"{setting}: row {index} is {shortened(row)}, no dict with columns by name; give it as one")
        odd = next(_odd_values(row), None)
        if odd is not None:
            raise DataError(
                f"{setting}: row {index} holds {shortened(odd)} ({type(odd).__name__}); give texts, numbers, dates, "
                "lists and dicts of them"
            )
    names = dict.fromkeys(name for row in value for name in row)
    columns = {name: [row.get(name) for row in value] for name in names}
    return datasets.Dataset.from_dict(columns, on_mixed_types="use_json")


def _odd_values(row: Mapping[str, Any]) -> Iterator[Any]:
    """What of a row no table holds: arrays of numpy and torch count as lists."""
    waiting: list[Any] = list(row.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif not isinstance(value, PLAIN) and not hasattr(value, "tolist"):
            yield value
