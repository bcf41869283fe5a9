"""A JSON schema of a kind of run, from its knobs: editors complete and check a file by it while it is written.

It lets through whatever ``loading`` takes of one value, and no more where a schema can say so; rules that tie settings
together are not in it.
"""

from __future__ import annotations

from dataclasses import Field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rlhf_toolkit.settings.kinds import KIND, KINDS
from rlhf_toolkit.settings.listing import default_of_knob, sections_of

DIALECT = "http://json-schema.org/draft-07/schema#"
NUMBER_AS_TEXT = r"^\s*[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d+)?\s*$"
"""YAML 1.1 reads 1e-4 as text, which a setting takes as the number that it means."""
NONE_AS_TEXT = ("none", "None")
TYPES: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": ["number", "string"], "pattern": NUMBER_AS_TEXT},
    NoneType: {"enum": [None, *NONE_AS_TEXT]},
}


def schema(kind: str) -> dict[str, Any]:
    """The schema of a file of that kind."""
    sections = {name: schema_of_section(section) for name, section in sections_of(kind).items()}
    return {
        "$schema": DIALECT,
        "title": f"rlhf_toolkit: {KINDS[kind].about}",
        "type": "object",
        "additionalProperties": False,
        "properties": {KIND: {"const": kind, "description": "the kind of run"}, **sections},
    }


def schema_of_section(section: type[Any]) -> dict[str, Any]:
    """Of one section, which may be empty."""
    hints = get_type_hints(section)
    knobs = {knob.name: schema_of_knob(knob, hints[knob.name]) for knob in fields(section)}
    about = (section.__doc__ or "").partition("\n")[0]
    return {"description": about, "type": ["object", "null"], "additionalProperties": False, "properties": knobs}


def schema_of_knob(knob: Field[Any], hint: Any) -> dict[str, Any]:
    """Of one setting: its help, its default, and what it may be."""
    choices, default = knob.metadata["choices"], default_of_knob(knob)
    about = {"description": knob.metadata["help"]} | ({} if default == "" else {"default": default})
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if choices:
        switches = [value for value, name in ((True, "on"), (False, "off")) if name in choices]  # YAML 1.1 again
        nothing = [None, *NONE_AS_TEXT] if NoneType in options else []
        return {**about, "enum": [*choices, *switches, *nothing]}
    kinds = [schema_of_type(option) | bounds(option, knob) for option in options]
    return {**about, **kinds[0]} if len(kinds) == 1 else {**about, "anyOf": kinds}


def bounds(option: Any, knob: Field[Any]) -> dict[str, Any]:
    """The limits of a number, where its rule has some."""
    rule = knob.metadata["rule"]
    return dict(rule.bounds) if rule is not None and option in (int, float) else {}


def schema_of_type(hint: Any) -> dict[str, Any]:
    """Of a type alone."""
    kind = get_origin(hint) or hint
    if kind is list:
        return {"type": "array", "items": schema_of_type(get_args(hint)[0])}
    return {"type": "object"} if kind is dict else dict(TYPES[hint])
