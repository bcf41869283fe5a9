"""The values of an entry of ``reward.functions``: for each key a function that reads it.

A reader is given the key's place in the YAML, for messages, and what stands there; it returns the value that a
``RewardSpec`` holds, or raises ConfigError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from rlhf_toolkit.errors import ConfigError, nearest, shortened

POLICIES = ("error", "score", "drop", "skip")
RESERVED = ("prompts", "responses")


def nonempty_text(setting: str, value: Any) -> str:
    """Text that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise ConfigError(f"{setting}={shortened(value)} is not text; put text in quotes")


def metric_part(setting: str, value: Any) -> str:
    """Text that can stand in the name of a metric."""
    text = nonempty_text(setting, value)
    if not re.fullmatch(r"[\w.-]+", text):
        raise ConfigError(f"{setting}={text!r} becomes part of a metric's name; use letters, digits, _ . and - only")
    return text


def function_place(setting: str, value: Any) -> str:
    """Where a function is: ``path/to/file.py:name`` or ``package.module:name``."""
    place, _, name = nonempty_text(setting, value).rpartition(":")
    if not (place and name):
        raise ConfigError(f"{setting}={value!r} names no function; write path/to/file.py:name or package.module:name")
    return str(value)


def web_address(setting: str, value: Any) -> str:
    """An address of http or https, without a user, a password or a fragment."""
    text = nonempty_text(setting, value)
    try:
        parts = urlsplit(text)
        good = text.isascii() and text.isprintable() and " " not in text
        good = good and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        good = good and parts.username is None and parts.password is None and not parts.fragment
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port that is no number, a bracket that is not closed, a host such as a..b
        good = False
    if not good:
        raise ConfigError(f"{setting}={text!r} is no address; write http://host:port/path or https://...")
    return text


def named_arguments(setting: str, value: Any) -> Mapping[str, Any]:
    """Arguments by name; none of them is one that every reward gets."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{setting}={shortened(value)} is not settings with names; write them as name: value below")
    for name in value:
        if name in RESERVED:
            raise ConfigError(f"{setting}.{name} is also an argument every reward gets; rename it")
    return value


def finite_number(setting: str, value: Any) -> float:
    """A finite number; YAML reads 1e-4 as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{setting}={shortened(value)} is not a finite number; give one such as 0.5")
    return number


def time_limit(setting: str, value: Any) -> float | None:
    """Seconds above 0; None for no limit."""
    if value is None or value in ("none", "None"):
        return None
    seconds = finite_number(setting, value)
    if seconds <= 0:
        raise ConfigError(f"{setting}={shortened(value)} must be above 0; give some seconds, or leave it out")
    return seconds


def whole_number(least: int) -> Callable[[str, Any], int]:
    """The reader of whole numbers from ``least`` up."""

    def read(setting: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{setting}={shortened(value)} is not a whole number of {least} or more; give one")
        return value

    return read


def policy(setting: str, value: Any) -> str:
    """One of ``POLICIES``."""
    if value not in POLICIES:
        hint = nearest(str(value), POLICIES) or f"; known are {', '.join(POLICIES)}"
        raise ConfigError(f"{setting}={shortened(value)} is not known{hint}")
    return str(value)


def variable_names(setting: str, value: Any) -> tuple[str, ...]:
    """Names of variables of the environment."""
    names = value if isinstance(value, list) else []
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name) for name in names):
        raise ConfigError(f"{setting}={shortened(value)} is no list of variables; write [NAME, ANOTHER]")
    return tuple(names)


def yes_or_no(setting: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{setting}={shortened(value)} is neither true nor false; give one of them")
    return value


READERS: dict[str, Callable[[str, Any], Any]] = {
    "name": metric_part,
    "function": function_place,
    "url": web_address,
    "weight": finite_number,
    "kwargs": named_arguments,
    "workers": whole_number(0),
    "batch_size": whole_number(1),
    "timeout": time_limit,
    "on_failure": policy,
    "failure_score": finite_number,
    "retries": whole_number(0),
    "environment": variable_names,
    "network": yes_or_no,
}
