"""A function of a program's: the name that a setting has for it, and whether it can be called as a reward is."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from rlhf_toolkit.errors import ConfigError, shortened

OF_RESPONSES = ("completions", "completion", "responses", "response")
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


def refuse_other_signature(function: Callable[..., Any]) -> None:
    """Raise ConfigError for a reward that would take prompts for responses: it is called with both, in this order."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some of Python's own do not say
        return
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if len(names) < 2 or names[0] in OF_RESPONSES:
        raise ConfigError(
            f"the reward {shortened(function_name(function))} takes ({', '.join(map(str, parameters))}); rewards are "
            "called with (prompts, responses, **columns), all texts: write it so"
        )
