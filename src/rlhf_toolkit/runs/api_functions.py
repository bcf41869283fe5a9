"""A function of a program's: the name that a setting has for it, and what tells it from another."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

LONGEST = 80


def function_name(function: Callable[..., Any]) -> str:
    """``module:name``, as Python knows it: ``__main__:score``, ``tasks:Judge()`` for an object of the class Judge that
    is called, ``__main__:partial(score)``."""
    if isinstance(function, partial):
        module, _, name = function_name(function.func).partition(":")
        return f"{module}:partial({name})"
    of_class = not hasattr(function, "__qualname__")
    known: Any = type(function) if of_class else function
    return f"{known.__module__}:{known.__qualname__[:LONGEST]}{'()' * of_class}"


def found_by_name(function: Callable[..., Any], name: str) -> bool:
    """Whether another process that imports the module finds this very function under ``name``."""
    module, _, place = name.partition(":")
    return module != "__main__" and place.isidentifier() and getattr(sys.modules.get(module), place, None) is function


def metric_name(function: Callable[..., Any]) -> str:
    """What metrics of a reward function are called after: its name, in letters that a metric may have."""
    plain = function.func if isinstance(function, partial) else function
    name = getattr(plain, "__name__", type(plain).__name__)
    return re.sub(r"[^\w.-]", "_", name).strip("_") or "reward"


def source_fingerprint(function: Callable[..., Any]) -> str:
    """A short hash of a function's text, or of its class's; ``unknown`` where Python has it no more."""
    plain = function.func if isinstance(function, partial) else function
    with suppress(OSError, TypeError):
        text = inspect.getsource(plain if inspect.isroutine(plain) else type(plain))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    return "unknown"
