"""Sample responses as they are logged: beside text and score what each reward gave, the prompt's columns, and why a
response was dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_toolkit.errors import shortened

Sample = dict[str, Any]
FIRST = ("kind", "prompt", "response", "score")
LONGEST = 2000
"""Characters of a column's value in a log; an image or a whole document would fill the disk."""


def with_columns(samples: Sequence[Sample], columns: Mapping[int, Mapping[str, Any]]) -> list[Sample]:
    """``samples`` with the dataset's ``columns`` of their prompts, which a sample's ``row`` names."""
    return [{**each, "columns": logged(columns.get(each.get("row", -1), {}))} for each in samples]


def logged(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns as values of JSON: what JSON cannot hold, or would make long, becomes a text of what it is."""
    return {name: value if _is_short(value) else shortened(value, LONGEST) for name, value in columns.items()}


def table(samples: Sequence[Sample], axis: str) -> tuple[list[str], list[list[Any]]]:
    """The heading and the rows of a table of ``samples``: a column for each reward, for each column of the dataset and
    for the reason of dropping. All rows of a column have one type: lists and dicts are their JSON."""
    flat = [_flat(each, axis) for each in samples]
    heading = list(dict.fromkeys([axis, *FIRST, *(name for row in flat for name in row)]))
    return heading, [[row.get(name) for name in heading] for row in flat]


def _flat(sample: Sample, axis: str) -> dict[str, Any]:
    found = {name: sample[name] for name in (axis, *FIRST)}
    found |= {f"reward/{name}": value for name, value in sample.get("rewards", {}).items()}
    found["dropped"] = sample.get("dropped")
    for name, value in sample.get("columns", {}).items():
        found[f"column/{name}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
    return found


def _is_short(value: Any) -> bool:
    if value is None or isinstance(value, bool | int):
        return True
    try:
        return len(json.dumps(value, allow_nan=False)) <= LONGEST
    except (TypeError, ValueError, RecursionError):
        return False
