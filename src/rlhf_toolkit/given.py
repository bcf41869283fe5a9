"""Objects that a program brings where a YAML file has names: a reward function, rows, a model, a tokenizer.

A setting holds a name in either case. Inside ``given`` whoever loads what a name stands for finds the object under it;
outside, and in a later process, the name leads nowhere and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from rlhf_toolkit.errors import RLHFError, shortened


class What(StrEnum):
    """What an object is; two of different kinds may have one name, as a model and its tokenizer do."""

    FUNCTION = "function"
    ROWS = "rows"
    MODEL = "model"
    TOKENIZER = "tokenizer"


FUNCTION, ROWS, MODEL, TOKENIZER = What.FUNCTION, What.ROWS, What.MODEL, What.TOKENIZER
Objects = Mapping[tuple[What, str], Any]
"""Objects by their kind and by the name that a setting has for them."""
MARK = "given:"
"""How names begin that stand for an object and for nothing else."""
SECTION = "given"
"""The section of a run's settings, beside those of its experiment, that says what objects its names stand for."""
NOTHING: Mapping[Any, Any] = MappingProxyType({})


class _Here:
    objects: Objects = NOTHING
    about: Mapping[str, str] = NOTHING


@contextmanager
def given(objects: Objects, about: Mapping[str, str] = NOTHING) -> Iterator[None]:
    """Inside, names of settings stand for these ``objects``; ``about`` says what they are, by the names of settings.
    What is loaded inside keeps them."""
    before = _Here.objects, _Here.about
    _Here.objects, _Here.about = objects, about
    try:
        yield
    finally:
        _Here.objects, _Here.about = before


def given_object(what: What, name: str) -> Any | None:
    """The object that ``name`` stands for here, None where it is the name of something to be loaded."""
    return _Here.objects.get((what, name))


def given_section() -> dict[str, dict[str, str]]:
    """The section ``SECTION`` of a run that is prepared here, with what its objects are; nothing where there are
    none."""
    return {SECTION: dict(_Here.about)} if _Here.about else {}


def refuse_foreign(name: str, setting: str, way_out: str, error: type[RLHFError]) -> None:
    """Raise ``error`` for a name that stood for an object of another program."""
    if name.startswith(MARK):
        raise error(
            f"{setting}={shortened(name)} stands for an object that a Python program has given; start that program, or "
            f"{way_out}"
        )
