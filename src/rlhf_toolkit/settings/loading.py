"""From a YAML file and command-line overrides to a typed ``Experiment``.

YAML does not always read what people mean: to it ``1e-4`` and ``none`` are strings, and ``off`` is False. Here each
becomes what the setting takes; anything else that does not fit is a ConfigError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from rlhf_toolkit.errors import ConfigError, shortened
from rlhf_toolkit.secrets import keep_secrets_of
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.kinds import KIND, require_kind
from rlhf_toolkit.settings.knobs import default_of, require_plain
from rlhf_toolkit.settings.names import meant, section_meant
from rlhf_toolkit.settings.yaml_text import file_text, read_with_lines, read_yaml

E = TypeVar("E")
NAMED = re.compile(r"(?<=^section )\w+|(?<=^unknown section ')\w+|[a-z]\w*(?:\.\w+|\[\d+\])+")
ON_OFF = {True: "on", False: "off"}
NAMES = {
    NoneType: "none",
    list[str]: "list of str",
    dict[str, Any]: "dict with str keys",
    list[dict[str, Any]]: "list of dicts with str keys",
}


def load_experiment(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    kind: type[E] = Experiment,  # type: ignore[assignment]
) -> E:
    """Read a YAML file of a run of ``kind``; ``overrides`` maps dotted names such as ``ppo.kl_coef`` to values that
    replace it.

    Raises ConfigError for a file that cannot be read and for settings that cannot work.
    """
    values, lines = read_with_lines(file_text(path), f"{path} is not valid YAML")
    if not isinstance(values, Mapping | None):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not sections such as model: and ppo:")
    sections = dict(values or {})
    require_kind(sections.pop(KIND, None), kind, str(path))
    for name, value in (overrides or {}).items():
        section, _, key = name.partition(".")
        sections[section] = {**_settings(section, sections.get(section)), key: value}
        lines.pop(name, None)
    with at_lines(path, lines):
        return experiment_from_dict(sections, kind)


@contextmanager
def at_lines(path: str | Path, lines: Mapping[str, int]) -> Iterator[None]:
    """A ConfigError from inside ends with the file's line of the first setting that it names, of those in ``lines``."""
    try:
        yield
    except ConfigError as error:
        words = NAMED.findall(str(error))
        line = next((lines[word] for word in words if word in lines), None)
        if line is not None:
            error.args = (f"{error} ({path}, line {line})",)
        raise


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["ppo.kl_coef=0.1"]`` to ``{"ppo.kl_coef": 0.1}``, values read as YAML. Raises ConfigError."""
    overrides = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or "." not in name:
            raise ConfigError(
                f"cannot read the override {shortened(name + equals, 80)}; write section.key=value, such as "
                "ppo.kl_coef=0.1"
            )
        overrides[name] = read_yaml(value, f"the value of the override {shortened(name)[1:-1]} is not valid YAML")
    return overrides


def experiment_from_dict(
    values: Mapping[str, Any],
    kind: type[E] = Experiment,  # type: ignore[assignment]
) -> E:
    """Build the typed experiment; a section of None has its defaults.

    Raises ConfigError for values that cannot work and for an unknown name, with the nearest known one.
    """
    kinds = section_types(kind)
    return kind(**{name: section_from_dict(name, section, kinds) for name, section in values.items()})


def section_types(kind: type[Any]) -> dict[str, type[Any]]:
    """The sections of a kind of run, by name."""
    known = {section.name for section in fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind).items() if name in known}  # no constants of the class


def section_from_dict(name: str, section: Any, kinds: Mapping[str, type[Any]]) -> Any:
    """The section ``name``, one of ``kinds``, with these settings; one of None has its defaults. Raises ConfigError."""
    names = {each: [setting.name for setting in fields(section)] for each, section in kinds.items()}
    if name not in kinds:
        raise ConfigError(f"unknown section {shortened(name, 80)}{section_meant(str(name), names)}")
    hints, settings = get_type_hints(kinds[name]), {setting.name: setting for setting in fields(kinds[name])}
    given = _settings(name, section)
    for key in given:
        if key not in settings:
            place = shortened(key, 80)[1:-1] if isinstance(key, str) else shortened(key, 80)
            raise ConfigError(f"unknown setting {name}.{place}{meant(name, str(key), names)}")
    return kinds[name](
        **{key: converted(f"{name}.{key}", value, hints[key], settings[key]) for key, value in given.items()}
    )


def _settings(name: str, section: Any) -> Mapping[str, Any]:
    """What stands in a section, where an empty one is None to YAML."""
    if not isinstance(section, Mapping | None):
        raise ConfigError(
            f"section {name} holds {shortened(section)}, not settings; write them as name: value below it"
        )
    return section or {}


# ---- values ----------------------------------------------------------------------------------------------------------


def converted(name: str, value: Any, hint: Any, setting: Field[Any]) -> Any:
    """``value``, as YAML has read it, as what the setting takes. Raises ConfigError where it cannot be that."""
    if isinstance(value, (list, dict, tuple, set)):
        require_plain(name, value)  # before anything walks through it
    keep_secrets_of({name.rpartition(".")[2]: value})  # before a message quotes it
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if isinstance(value, bool) and ON_OFF[value] in setting.metadata["choices"]:
        return ON_OFF[value]
    if NoneType in options and value in ("none", "None"):
        return None
    if float in options and isinstance(value, (int, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)  # a whole number, or YAML's text '1e-4'
    if any(_fits(value, option) for option in options):
        return value
    wanted = " or ".join(NAMES.get(option) or option.__name__ for option in options)
    way_out = default_of(setting)
    if list[str] in options and isinstance(value, str):
        parts = value.split(",") if re.fullmatch(r"[\w.,]{,200}", value) else [value]
        way_out = f"write a list: {shortened(parts)}"
    elif setting.metadata["choices"]:
        way_out = f"known are {', '.join(setting.metadata['choices'])}"
    elif str in options and value is not None and not isinstance(value, (list, dict)):
        way_out = f"put text in quotes, in a shell as \"'{value}'\""
    raise ConfigError(f"{name}={shortened(value)} is not {wanted}; {way_out}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``, and so is each item of a list and each key of a dict."""
    kind = get_origin(hint) or hint
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return False
    return kind not in (list, dict) or all(_fits(item, get_args(hint)[0]) for item in value)
