"""An entry of the list ``reward.functions``: which reward, how it is called, and what happens when it fails."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import SplitResult, urlsplit

from rlhf_toolkit.errors import ConfigError, nearest, shortened

POLICIES = ("error", "score", "drop")
RESERVED = ("prompts", "responses")
_BOTH = "has function and url; keep one of them, and give the other an entry of its own"
_NEITHER = "has no function; give function: path/to/file.py:name, or url: http://..."
REQUESTS = 4
"""Requests at a time of a remote reward that does not say ``workers``."""


@dataclass(frozen=True)
class RewardSpec:
    """One reward. ``setting`` is the entry's place in the YAML, such as ``reward.functions[0]``, for messages.

    Either ``function`` (``path/to/file.py:name`` or ``package.module:name``) or ``url`` is set. ``workers`` are
    processes on each rank, or requests at a time on each rank for a ``url``; with 0 the function is called in the
    rank's own process with the whole batch, otherwise with ``batch_size`` responses. ``timeout`` is in seconds, None
    for no limit. ``on_failure`` is one of ``POLICIES``. See docs/rewards.md.
    """

    setting: str
    name: str
    function: str | None = None
    url: str | None = None
    weight: float = 1.0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 0
    batch_size: int = 1
    timeout: float | None = None
    on_failure: str = "error"
    failure_score: float = 0.0
    retries: int = 0

    @classmethod
    def parse(cls, entry: Mapping[str, Any], number: int) -> RewardSpec:
        """The reward that entry ``number`` (from 0) of the list describes.

        ConfigError, which names ``reward.functions[number].key``, for an unknown key, a value of the wrong kind, and a
        key that would have no effect.
        """
        setting = f"reward.functions[{number}]"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{setting} holds {shortened(entry)}, not settings; write function: path/to/file.py:name")
        known = [each.name for each in fields(cls) if each.name != "setting"]
        for key in entry:
            if key not in known:
                hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
                raise ConfigError(f"unknown setting {setting}.{key}{hint}")
        given = {key: _READERS[key](f"{setting}.{key}", value) for key, value in entry.items()}
        given = {key: value for key, value in given.items() if value is not None}
        if ("function" in given) == ("url" in given):
            raise ConfigError(f"{setting} {_BOTH if 'url' in given else _NEITHER}")
        _check_effects(setting, given)
        if "url" in given:
            given.setdefault("workers", REQUESTS)
        return cls(setting=setting, **{"name": _default_name(given), **given})


def _default_name(given: Mapping[str, Any]) -> str:
    """The function's name, or the host of the address."""
    return (
        re.sub(r"[^\w.-]", "_", urlsplit(given["url"]).hostname or "")
        if "url" in given
        else given["function"].rpartition(":")[2]
    )


def _check_effects(setting: str, given: Mapping[str, Any]) -> None:
    """Nothing that is set may be without effect; of ``timeout`` without workers only the loaded function can tell."""
    if "url" in given and given.get("workers") == 0:
        raise ConfigError(f"{setting}.workers=0 would send no request; give 1 or more, or leave it out")
    elsewhere = "url" in given or given.get("workers", 0) > 0
    for key in ("batch_size", "retries"):
        if key in given and not elsewhere:
            raise ConfigError(f"{setting}.{key} has no effect in the rank's own process; set {setting}.workers, too")
    if "failure_score" in given and given.get("on_failure") != "score":
        raise ConfigError(f"{setting}.failure_score has no effect; set {setting}.on_failure: score, too")


# ---- values ----------------------------------------------------------------------------------------------------------


def _text(setting: str, value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ConfigError(f"{setting}={shortened(value)} is not text; put text in quotes")


def _name(setting: str, value: Any) -> str:
    text = _text(setting, value)
    if not re.fullmatch(r"[\w.-]+", text):
        raise ConfigError(f"{setting}={text!r} becomes part of a metric's name; use letters, digits, _ . and - only")
    return text


def _function(setting: str, value: Any) -> str:
    place, _, name = _text(setting, value).rpartition(":")
    if not (place and name):
        raise ConfigError(f"{setting}={value!r} names no function; write path/to/file.py:name or package.module:name")
    return str(value)


def _url(setting: str, value: Any) -> str:
    text = _text(setting, value)
    try:
        parts = urlsplit(text)
        good = text.isascii() and text.isprintable() and " " not in text and _is_web_address(parts)
    except ValueError:  # a port that is no number, a bracket that is not closed
        good = False
    if not good:
        raise ConfigError(f"{setting}={text!r} is no address; write http://host:port/path or https://...")
    return text


def _is_web_address(parts: SplitResult) -> bool:
    plain = parts.username is None and parts.password is None and not parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and plain


def _kwargs(setting: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{setting}={shortened(value)} is not settings with names; write them as name: value below")
    for name in value:
        if name in RESERVED:
            raise ConfigError(f"{setting}.{name} is also an argument every reward gets; rename it")
    return value


def _number(setting: str, value: Any) -> float:
    """A finite number; YAML reads 1e-4 as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{setting}={shortened(value)} is not a finite number; give one such as 0.5")
    return number


def _seconds(setting: str, value: Any) -> float | None:
    if value is None or value in ("none", "None"):
        return None
    seconds = _number(setting, value)
    if seconds <= 0:
        raise ConfigError(f"{setting}={shortened(value)} must be above 0; leave it out for no limit")
    return seconds


def _whole(least: int) -> Callable[[str, Any], int]:
    def read(setting: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{setting}={shortened(value)} is not a whole number of {least} or more; give one")
        return value

    return read


def _policy(setting: str, value: Any) -> str:
    if value not in POLICIES:
        hint = nearest(str(value), POLICIES) or f"; known are {', '.join(POLICIES)}"
        raise ConfigError(f"{setting}={shortened(value)} is not known{hint}")
    return str(value)


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "name": _name,
    "function": _function,
    "url": _url,
    "weight": _number,
    "kwargs": _kwargs,
    "workers": _whole(0),
    "batch_size": _whole(1),
    "timeout": _seconds,
    "on_failure": _policy,
    "failure_score": _number,
    "retries": _whole(0),
}
