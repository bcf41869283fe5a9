"""What a knob is: a setting with a default, one line of help and a rule, checked when its section is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, get_args, get_type_hints

from rlhf_toolkit.errors import ConfigError, nearest, shortened

MOST_PARTS, DEEPEST = 100_000, 50
"""Of one setting: values inside it, and lists or dicts inside one another. YAML's aliases make any number of them."""
MOST_BITS = 10_000
"""Of a whole number; Python refuses to write out much longer ones."""


COUNTER_BITS = 63
TOKEN_DIGITS = 9
SURROGATE = re.compile("[\ud800-\udfff]")
UNPRINTED = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
NAMES = re.compile(r"[\w\s,-]+")
SPOKEN = ".system_prompt"
PATTERN = ".target_modules"
LONGEST_SHOWN = 200
"""Characters of a value in a message."""
LONGEST_PART, LONGEST_PATH = 255, 4096
"""Bytes of a folder's or a file's name, and of a path: no file system takes more."""

LARGEST_FLOAT = 3.4028234663852886e38
"""Of float32."""


@dataclass(frozen=True)
class Rule:
    """What a value must do: in words that follow "must", and as a test. Of a number's ``bounds`` a JSON schema speaks,
    in its own words; they say no more than the test."""

    words: str
    holds: Callable[[Any], bool]
    bounds: tuple[tuple[str, float], ...] = ()


ABOVE_0 = Rule("be above 0", lambda value: value > 0, (("exclusiveMinimum", 0),))
AT_LEAST_1 = Rule("be at least 1", lambda value: value >= 1, (("minimum", 1),))
ABOVE_1 = Rule("be above 1", lambda value: value > 1, (("exclusiveMinimum", 1),))
NOT_NEGATIVE = Rule("not be negative", lambda value: value >= 0, (("minimum", 0),))
WITHIN_0_AND_1 = Rule(
    "be above 0 and below 1", lambda value: 0 < value < 1, (("exclusiveMinimum", 0), ("exclusiveMaximum", 1))
)
FROM_0_TO_1 = Rule("be in [0, 1]", lambda value: 0 <= value <= 1, (("minimum", 0), ("maximum", 1)))
FROM_0_TO_BELOW_1 = Rule("be in [0, 1)", lambda value: 0 <= value < 1, (("minimum", 0), ("exclusiveMaximum", 1)))
ABOVE_0_TO_1 = Rule("be in (0, 1]", lambda value: 0 < value <= 1, (("exclusiveMinimum", 0), ("maximum", 1)))
NO_DROPOUT = Rule("be 0: dropout makes the ratio differ from 1 before any update", lambda value: value == 0)
LAYERS = Rule(
    "be all-linear, a list of name endings such as [q_proj, v_proj], or a regular expression of whole names",
    lambda value: (
        bool(value) and (isinstance(value, list) or value.lower() == "all-linear" or not NAMES.fullmatch(value))
    ),
)
"""A layer's whole name has a dot, so a text of bare names, with commas between them, means a list."""
LARGEST_BIAS = 100.0
"""OpenAI's: a token so biased is written always, or never."""
BIASES = Rule(
    f"map token ids, in quotes, to numbers from {-LARGEST_BIAS:g} to {LARGEST_BIAS:g}",
    lambda value: all(
        token.isascii()
        and token.isdecimal()
        and len(token) <= TOKEN_DIGITS
        and token == str(int(token))
        and isinstance(number, (int, float))
        and not isinstance(number, bool)
        and abs(number) <= LARGEST_BIAS
        for token, number in value.items()
    ),
)
PENALTY = Rule("be from 0.01 to 100", lambda value: 0.01 <= value <= 100, (("minimum", 0.01), ("maximum", 100)))
WORDS_TO_AVOID = Rule("hold texts with more than white space", lambda value: all(text.strip() for text in value))
TOKENS = Rule("name one token or more", lambda value: bool(value) and all(value))
TEMPLATE_ENDINGS = (".jinja", ".jinja2", ".j2")
TEMPLATE = Rule(
    f"be true, false, or a file of Jinja, whose name ends in {', '.join(TEMPLATE_ENDINGS)}",
    lambda value: isinstance(value, bool) or value.endswith(TEMPLATE_ENDINGS),
)


def knob(default: Any, help: str, rule: Rule | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field with a default, one line of help, and what it may be; lists and dicts are copied for each instance."""
    metadata = {"help": help, "rule": rule, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(setting: Field[Any]) -> str:
    """The default of a knob as the end of a message, in YAML's words."""
    default = setting.default if setting.default_factory is MISSING else setting.default_factory()
    if default == "":
        return "it has no default, so give it a value"
    words = "none" if default is None else str(default).lower() if isinstance(default, bool) else default
    return f"the default is {words}"


@dataclass(frozen=True)
class Section:
    """The settings under one name of the YAML file. Raises ConfigError where one breaks the rule of its knob."""

    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check each setting by its knob. ``PPOConfig`` is the section ``ppo``, and so on."""
        section, hints = self.SECTION or type(self).__name__.removesuffix("Config").lower(), get_type_hints(type(self))
        for setting in fields(self):
            name, value = f"{section}.{setting.name}", getattr(self, setting.name)
            if value is None:
                continue
            if isinstance(value, (list, dict)):
                require_plain(name, value)
            _require_sane(name, value)
            rule, choices = setting.metadata["rule"], setting.metadata["choices"]
            or_none = " or none" if NoneType in get_args(hints[setting.name]) else ""
            if choices and value not in choices:
                raise ConfigError(f"{name}={shortened(value)}{nearest(value, choices)}; known are {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name}={value} must be a finite number{or_none}; {default_of(setting)}")
            if rule is not None and not rule.holds(value):
                long = isinstance(value, (list, dict)) or len(str(value)) > LONGEST_SHOWN
                given = shortened(value, LONGEST_SHOWN) if long else value
                or_none = "" if rule.words.startswith("not ") else or_none
                raise ConfigError(f"{name}={given} must {rule.words}{or_none}; {default_of(setting)}")


def require_plain(name: str, value: Any) -> None:
    """Raise ConfigError, by the name of the part, where ``value`` would not come back equal from JSON: ``run.json``
    keeps the settings, and a resumed run is compared with them.

    Plain are None, bool, finite numbers, text, lists, and dicts whose keys are text. Dates, bytes, sets and tuples are
    not, nor NaN, nor what holds more than ``MOST_PARTS`` values or is nested deeper than ``DEEPEST``.
    """
    waiting, seen = [(name, value, 0)], 0
    while waiting:
        place, part, depth = waiting.pop()
        seen += 1
        if seen > MOST_PARTS or depth > DEEPEST:
            raise ConfigError(
                f"{name} holds more than {MOST_PARTS} values, or some nested deeper than {DEEPEST}; write it without "
                "aliases, or put the data into a file"
            )
        plain = part is None or isinstance(part, (list, dict))
        if isinstance(part, float):
            plain = math.isfinite(part)
        elif isinstance(part, int):
            plain = part.bit_length() <= MOST_BITS
        elif isinstance(part, str):
            plain = not SURROGATE.search(part)
        if not plain:
            raise ConfigError(
                f"{place}={shortened(part)} is a {type(part).__name__} that JSON cannot hold, so that run.json could "
                "not; give text in quotes, a finite number, a list or a dict"
            )
        if isinstance(part, list):
            waiting += [(f"{place}[{index}]", item, depth + 1) for index, item in enumerate(part[: MOST_PARTS + 1])]
        elif isinstance(part, dict):
            for key in part:
                if not isinstance(key, str):
                    raise ConfigError(f"{place} has the key {shortened(key)}, which is not text; put it in quotes")
                if SURROGATE.search(key):
                    raise ConfigError(f"{place} has the key {shortened(key)}, which is no valid text; rename it")
            waiting += [(f"{place}.{key}", item, depth + 1) for key, item in part.items()]


def _require_sane(name: str, value: Any) -> None:
    """Raise ConfigError for a number that no counter or no float32 holds, and for a name with characters that do not
    print or more of them than a path can have: it becomes a path, a label or a line. Only ``SPOKEN`` is read by a
    model, and may have line breaks; ``PATTERN`` may be long."""
    if isinstance(value, int) and value.bit_length() > COUNTER_BITS:
        raise ConfigError(f"{name}={shortened(value)} is beyond 64 bits; give a smaller number")
    if isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST_FLOAT:
        raise ConfigError(f"{name}={value} is beyond float32, in which a run computes; give a smaller number")
    if isinstance(value, str):
        odd = SURROGATE.search(value) if name.endswith(SPOKEN) else UNPRINTED.search(value)
        if odd is not None:
            raise ConfigError(f"{name}={shortened(value)} holds {odd[0]!a}, which does not print; write it without")
        longest = max(len(part.encode()) for part in value.split("/"))
        if not name.endswith((SPOKEN, PATTERN)) and (longest > LONGEST_PART or len(value.encode()) > LONGEST_PATH):
            raise ConfigError(
                f"{name}={shortened(value)} is longer than any path ({LONGEST_PART} bytes a name, {LONGEST_PATH} in "
                "all); give a shorter one"
            )
