"""Every knob of a kind of run in words, for people: what it is, its default, what it may be, and what it needs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.idle import idle_in_fine_tuning, idle_in_ppo
from rlhf_toolkit.settings.kinds import KINDS
from rlhf_toolkit.settings.knobs import Section

WIDTH, INDENT = 110, "      "
REQUIRED = {"model": {"name": "any/model"}, "data": {"train": "any.jsonl"}, "reward": {"function": "any.py:any"}}


def sections_of(kind: str) -> dict[str, type[Section]]:
    """The sections of a kind of run, by their names in the file."""
    experiment = KINDS[kind].experiment
    known = {section.name for section in fields(experiment)}
    return {name: hint for name, hint in get_type_hints(experiment).items() if name in known}


def listing(kind: str) -> str:
    """A block for each section, and in it ``section.key=default`` and its help for each setting."""
    idle = idle_by_default(kind)
    blocks = []
    for name, section in sections_of(kind).items():
        hints, about = get_type_hints(section), (section.__doc__ or "").partition("\n")[0]
        lines = [f"{name}: {about}"]
        for knob in fields(section):
            setting = f"{name}.{knob.name}"
            text = "; ".join(facts(knob, hints[knob.name], idle.get(setting)))
            lines.append(f"  {setting}={default_in_yaml(knob)}")
            lines += textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def facts(knob: Field[Any], hint: Any, idle: str | None) -> Iterator[str]:
    """Its help, what it may be, and, where its default setting of others leaves it without effect, why."""
    yield knob.metadata["help"]
    choices, rule = knob.metadata["choices"], knob.metadata["rule"]
    nothing = " or none" if NoneType in get_args(hint) else ""
    if choices:
        yield f"one of {', '.join(choices)}{nothing}"
    else:
        yield type_in_words(hint)
    if rule is not None:
        yield f"must {rule.words}"
    if idle is not None:
        yield f"without effect by default: {idle}"


def type_in_words(hint: Any) -> str:
    """The type of a setting as a person would say it."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "none"}
    options = get_args(hint) if not hasattr(hint, "__origin__") and get_args(hint) else (hint,)
    told = [words.get(option) or ("a list" if str(option).startswith("list") else "a mapping") for option in options]
    return " or ".join(told)


def default_of_knob(knob: Field[Any]) -> Any:
    """The value that a setting has where the file says nothing."""
    return knob.default if knob.default_factory is MISSING else knob.default_factory()


def default_in_yaml(knob: Field[Any]) -> str:
    """The same as it would stand in a file; nothing where there is no default and a value must be given."""
    default = default_of_knob(knob)
    if default is None:
        return "none"
    if default == "":
        return ""
    return str(yaml.safe_dump(default, default_flow_style=True)).removesuffix("\n").removesuffix("\n...")


def idle_by_default(kind: str) -> dict[str, str]:
    """Setting to the reason why it does nothing while all others have their defaults."""
    experiment = KINDS[kind].experiment
    sections = sections_of(kind)
    given: dict[str, Any] = {name: sections[name](**REQUIRED[name]) for name in REQUIRED if name in sections}
    built = experiment(**given)
    found = idle_in_ppo(built) if isinstance(built, Experiment) else idle_in_fine_tuning(built)
    return {setting: why.partition(";")[0] for idle, settings, why in found if idle for setting in settings}
