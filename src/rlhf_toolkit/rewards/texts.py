"""Small helpers of the verifiable rewards: where an answer stands in a response, and libraries that may be missing."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any

from rlhf_toolkit.errors import ConfigError, DataError, shortened

LARGEST_NUMBER = 100
"""Digits and signs of a number; what is longer is no answer, and squaring it is no work we want."""
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")

_FRACTION = re.compile(r"[+-]?([0-9]+/[0-9]+|([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,2})?)")


def optional_library(name: str, reward: str) -> ModuleType:
    """The module ``name``, which only the tasks extra installs. ConfigError, with the way out, where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != name.split(".")[0]:
            raise  # the library is there and misses something itself
        raise ConfigError(
            f"reward {reward} needs the package {name}, which is not installed: pip install 'rlhf_toolkit[tasks]'"
        ) from error


def last_tagged(text: str, tag: str) -> str | None:
    """What stands between the last ``<tag>`` that is closed and its ``</tag>``, stripped; None where there is none."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end].strip()


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, braces matched; None where there is none or it is never closed."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth, position = 1, start
    while position < len(text):
        if text[position] == "\\":
            position += 2  # \{ and \} are text, not structure
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position].strip()
        position += 1
    return None


def number(text: str) -> Fraction | None:
    """A plain decimal number, exactly: ``-1,234.50``. Commas and a full stop at the end are dropped, the sign U+2212
    counts as a minus; None for anything else and for what is longer than ``LARGEST_NUMBER``."""
    plain = text.strip().replace(",", "").replace("\u2212", "-").removesuffix(".")
    return Fraction(plain) if len(plain) <= LARGEST_NUMBER and _NUMBER.fullmatch(plain) else None


def fraction(value: Any) -> Fraction | None:
    """A number of a dataset, or its text, exactly: also ``1/3`` and ``1e-05``. None for anything else, for what is
    longer than ``LARGEST_NUMBER``, and for an exponent of three digits, which would take for ever to write out."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, int) and value.bit_length() > 4 * LARGEST_NUMBER:
        return None
    text = str(value).strip()
    if len(text) > LARGEST_NUMBER or not _FRACTION.fullmatch(text):
        return None
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None


def each(column: Sequence[Any], responses: Sequence[str], name: str, reward: str) -> Sequence[Any]:
    """``column``, which must be as long as ``responses``. DataError where it is not."""
    if isinstance(column, str) or len(column) != len(responses):
        raise DataError(
            f"reward {reward} got {shortened(column)} as column {name} for {len(responses)} responses; "
            "give one value for each"
        )
    return column
