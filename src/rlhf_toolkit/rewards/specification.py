"""An entry of the list ``reward.functions``: which reward, how it is called, and what happens when it fails."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from rlhf_toolkit.errors import ConfigError, nearest, shortened
from rlhf_toolkit.rewards.values import READERS

_BOTH = "has function and url; keep one of them, and give the other an entry of its own"
_NEITHER = "has no function; give function: path/to/file.py:name, or url: http://..."
REQUESTS = 4
"""Requests at a time of a remote reward that does not say ``workers``."""

REQUEST_SECONDS = 60.0
"""The time limit of a request of a remote reward that does not say ``timeout``: without one a server that never
answers would hold up the run."""


@dataclass(frozen=True)
class RewardSpec:
    """One reward. ``setting`` is the entry's place in the YAML, such as ``reward.functions[0]``, for messages.

    Either ``function`` (``path/to/file.py:name`` or ``package.module:name``) or ``url`` is set. ``workers`` are
    processes on each rank, or requests at a time on each rank for a ``url``; with 0 the function is called in the
    rank's own process with the whole batch, otherwise with ``batch_size`` responses. ``timeout`` is in seconds, None
    for no limit. ``on_failure`` is one of ``values.POLICIES``. ``environment`` names variables that workers get beside
    those of ``confinement``, ``network`` is whether they have one. See docs/rewards.md.
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
    environment: tuple[str, ...] = ()
    network: bool = True

    @classmethod
    def parse(cls, entry: Mapping[str, Any], setting: str = "reward.functions[0]") -> RewardSpec:
        """The reward that the entry at ``setting`` describes.

        ConfigError, which names ``{setting}.key``, for an unknown key, a value of the wrong kind, and a key that would
        have no effect. Without ``name`` it is the function's, or the host of the address.
        """
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{setting} holds {shortened(entry)}, not settings; write function: path/to/file.py:name")
        known = [each.name for each in fields(cls) if each.name != "setting"]
        for key in entry:
            if key not in known:
                hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
                raise ConfigError(f"unknown setting {setting}.{key}{hint}")
        given = {key: READERS[key](f"{setting}.{key}", value) for key, value in entry.items()}
        given = {key: value for key, value in given.items() if value is not None}
        if ("function" in given) == ("url" in given):
            raise ConfigError(f"{setting} {_BOTH if 'url' in given else _NEITHER}")
        # Keys without effect; whether ``timeout`` has one without workers, only the loaded function tells.
        if "url" in given and given.get("workers") == 0:
            raise ConfigError(f"{setting}.workers=0 would send no request; give 1 or more, or leave it out")
        for key in ("batch_size", "retries"):
            if key in given and "url" not in given and not given.get("workers", 0) > 0:
                raise ConfigError(
                    f"{setting}.{key} has no effect in the rank's own process; set {setting}.workers, too"
                )
        for key in ("environment", "network"):
            if key in given and not (given.get("workers", 0) and "function" in given):
                raise ConfigError(f"{setting}.{key} has no effect without worker processes; set {setting}.workers, too")
        if "failure_score" in given and given.get("on_failure") != "score":
            raise ConfigError(f"{setting}.failure_score has no effect; set {setting}.on_failure: score, too")
        if "url" in given:
            given.setdefault("workers", REQUESTS)
            given.setdefault("timeout", REQUEST_SECONDS)
            name = re.sub(r"[^\w.-]", "_", urlsplit(given["url"]).hostname or "")
        else:
            name = given["function"].rpartition(":")[2]
        return cls(setting=setting, **{"name": name, **given})
