"""What is wrong with a JSON file, found before ``datasets`` reads it.

Its reader, in C++, ends the process with a segmentation fault on ``null`` where an object should be, and on brackets
that are nested too deep. So each line goes through Python's own parser first, one line in memory at a time: some 25
seconds for a gigabyte (192 MiB in 4.6 s on a busy processor), where reading it takes minutes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_toolkit.errors import DataError, shortened

DEEPEST = 100
"""Lists and objects inside one another in a row."""
MOST_KEYS = 2000
"""Names of columns in a file, and of fields in a column: ``datasets`` takes time quadratic in their number."""
LONGEST_LINE = 2**28
"""Bytes of a row. A longer one is a file without line ends, and would be read into memory as a whole."""
AHEAD = 2**26
"""Bytes behind the last row wanted that are looked at as well: ``datasets`` reads further than it is asked to."""
SURVIVED = ("Expecting", "Unterminated", "Invalid", "Illegal")
"""How faults of syntax begin that leave no second value on the line."""
COLUMNS = frozenset(
    ("messages", "conversations", "prompt", "completion", "response", "chosen", "rejected", "instruction", "text")
)
"""Columns of rows, some of which hold lists of objects."""
OBJECT = 'an object such as {"prompt": "..."}'


def json_fault(path: Path, *, max_rows: int | None = None, fatal_only: bool = False) -> str | None:
    """What is wrong, as ``line 3: Expecting value``; None where the file is sound, or holds nothing at all.

    Sound is one object on each line, and under the suffix ``.json`` also one list of objects or of texts, or one
    object. With ``max_rows`` the file is looked at a little beyond so many lines. ``fatal_only`` passes over a line
    that begins as an object and breaks off: the reader of ``datasets`` survives it and names it when it gets there.
    Raises DataError for another encoding than UTF-8.
    """
    is_json = path.suffix.lower() == ".json"
    if is_json:
        with path.open("rb") as file:
            beginning = file.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip()
        if beginning.startswith(b"["):
            return _fault_of_whole(path)
    fault, names, rows, only = None, Names(), 0, ""
    for number, line in _lines(path, max_rows):
        rows, only = rows + 1, "" if rows else line
        fault = _fault_of_object(line, names)
        if fault is not None and not (fatal_only and fault.startswith(SURVIVED) and line.startswith("{")):
            fault = f"line {number}: {fault}"
            break
        if fault is not None:  # whoever reads the file later finds it
            fault, only = None, ""
    if fault is not None and is_json:
        with suppress(UnicodeDecodeError):  # one object, written over several lines
            whole = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
            if _fault_of_object(whole, Names()) is None:
                fault, only = None, whole
    return rows_inside(json.loads(only)) if fault is None and only else fault


def rows_inside(value: Mapping[str, Any]) -> str | None:
    """Why ``value``, the only object of a file, is no row: it holds the rows in a list, as ``{"data": [...]}`` does.

    None where it may be one: it has a column of a row, or no list of objects.
    """
    lists = [name for name, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if not lists or not COLUMNS.isdisjoint(value):
        return None
    return (
        f"it is one object, whose {shortened(lists[0])} has {len(value[lists[0]])} objects: save that list alone, or "
        "one of them on each line"
    )


def is_blank(path: Path) -> bool:
    """Whether a file holds white space only, or a byte order mark."""
    return next(_lines(path, 1), None) is None


# ---- one row on each line --------------------------------------------------------------------------------------------


def _lines(path: Path, max_rows: int | None) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank. Raises DataError for bytes that are no UTF-8."""
    rows, behind = 0, 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(f"cannot read {path}: line {number} is longer than {LONGEST_LINE} bytes; cut it")
            text = _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, path, number)
            if text.strip():
                yield number, text.strip(" \t\r\n")
                rows += 1
            if max_rows is not None and rows >= max_rows:
                behind += len(line)
                if behind > AHEAD:
                    return


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        number += line[: error.start].count(b"\n")
        raise DataError(f"cannot read {path}: line {number} is not UTF-8; save the file as UTF-8") from error


class Names:
    """Counts the names of columns and of the fields in them, over all rows of a file."""

    def __init__(self) -> None:
        self._known: set[str | tuple[str, str]] = set()

    def fault(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong where there are too many of them, this row's included."""
        self._known.update(row)
        for name, value in row.items():
            for part in (value,) if isinstance(value, dict) else value if isinstance(value, list) else ():
                if isinstance(part, dict):
                    self._known.update((name, inner) for inner in part)
        return None if len(self._known) <= MOST_KEYS else f"more than {MOST_KEYS} names of columns and their fields"


def _fault_of_object(text: str, names: Names) -> str | None:
    """What is wrong with a text that has to be one object; None where it is one."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg
    except (ValueError, RecursionError) as error:
        return _beyond(error)
    if not isinstance(value, dict):
        return f"{shortened(value)} is not {OBJECT}"
    return names.fault(value) or _unusable(text, value)


def _beyond(error: Exception) -> str:
    return (
        f"brackets nested deeper than {DEEPEST}" if isinstance(error, RecursionError) else "a number too long to read"
    )


def _unusable(text: str, value: Any) -> str | None:
    """Say why a value that is JSON cannot be a row all the same. Its ``text`` spares looking through most values."""
    if text.count("[") + text.count("{") > DEEPEST and is_deeper(value, DEEPEST):
        return f"brackets nested deeper than {DEEPEST}"
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "half of a surrogate pair, which is no character"
    return None


def is_deeper(value: Any, limit: int) -> bool:
    """Whether more than ``limit`` lists and objects lie inside one another in ``value``, which is one of the two."""
    level = [value]
    for _ in range(limit):
        level = [item for part in level for item in (part.values() if isinstance(part, dict) else part)]
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


# ---- one value in the whole file -------------------------------------------------------------------------------------


def _fault_of_whole(path: Path) -> str | None:
    """What is wrong with a file that has to be one list of objects or of texts."""
    text = _decoded(path.read_bytes().removeprefix(codecs.BOM_UTF8), path, 1)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        return f"line 1: {_beyond(error)}"
    kind, names = str if value and isinstance(value[0], str) else dict, Names()
    for index, item in enumerate(value):
        if not isinstance(item, kind):
            return f"line 1: item {index} of the list, {shortened(item)}, is not {OBJECT}"
        if isinstance(item, dict) and (fault := names.fault(item)):
            return f"line 1: item {index} of the list: {fault}"
    fault = _unusable(text, value)
    return f"line 1: {fault}" if fault else None
