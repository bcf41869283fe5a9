"""As much of JSON schema (draft 7) as an editor would apply to a file of settings, written from the standard alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

TYPES: dict[str, Any] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "null": lambda value: value is None,
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
LIMITS: dict[str, Any] = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
}
ANNOTATIONS = {"$schema", "title", "description", "default"}


def faults(value: Any, schema: Mapping[str, Any], place: str = "$") -> Iterator[str]:
    """What is wrong with ``value``, each with its place; nothing where it is valid."""
    for word, said in schema.items():
        if word == "type":
            names = said if isinstance(said, list) else [said]
            if not any(TYPES[name](value) for name in names):
                yield f"{place} is no {' or '.join(names)}: {value!r}"
        elif word == "enum":
            if not any(is_same(value, each) for each in said):
                yield f"{place}={value!r} is none of {said}"
        elif word == "const":
            if not is_same(value, said):
                yield f"{place}={value!r} is not {said!r}"
        elif word == "pattern":
            if isinstance(value, str) and not re.search(said, value):
                yield f"{place}={value!r} does not match {said}"
        elif word in LIMITS:
            if TYPES["number"](value) and not LIMITS[word](value, said):
                yield f"{place}={value!r} breaks {word} {said}"
        elif word == "anyOf":
            if all(any(faults(value, option, place)) for option in said):
                yield f"{place}={value!r} fits none of {said}"
        elif word == "items":
            for number, item in enumerate(value if isinstance(value, list) else ()):
                yield from faults(item, said, f"{place}[{number}]")
        elif word == "properties":
            for name, inner in said.items():
                if isinstance(value, dict) and name in value:
                    yield from faults(value[name], inner, f"{place}.{name}")
        elif word == "additionalProperties":
            assert said is False
            for name in value if isinstance(value, dict) else ():
                if name not in schema["properties"]:
                    yield f"{place} has an unknown {name!r}"
        else:
            assert word in ANNOTATIONS, f"{word} is not understood here"


def is_same(value: Any, other: Any) -> bool:
    """Equality of JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
