"""YAML as plain values, read within limits: no object of Python, no alias that multiplies, no key twice.

PyYAML's ``SafeLoader`` makes no objects, but follows aliases wherever they lead: 300 bytes stand for a billion values.
Here the values that a text stands for are counted on its nodes before any of them is made.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from rlhf_toolkit.errors import ConfigError, described, shortened
from rlhf_toolkit.settings.knobs import DEEPEST, MOST_PARTS
from rlhf_toolkit.texts import printable

MOST_CHARACTERS = 2**18
"""Of a file or of a value; experiments have some thousand."""
MOST_DEEP = DEEPEST + 10
LONGEST_NAME = 80
"""Of a setting whose line is told."""
TEXT, NUMBERS = "tag:yaml.org,2002:str", ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Refused(Exception):
    """What this reader refuses beside YAML's own errors."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with a limit on depth, and without numbers to the base of 60: ``12:30`` is text."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MOST_DEEP:
            raise _Refused(f"values are nested deeper than {MOST_DEEP}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        return TEXT if tag in NUMBERS and kind is yaml.ScalarNode and implicit[0] and ":" in value else tag


def file_text(path: str | Path) -> str:
    """The text of a YAML file. Raises ConfigError where it cannot be read, is not UTF-8, or is longer than an
    experiment can be."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            piped = not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            if piped and not str(path).startswith(("/dev/", "/proc/")):  # a shell's <(...) and /dev/stdin may be pipes
                raise ConfigError(f"{path} is no file; give the path of a YAML file")
            os.set_blocking(file.fileno(), True)
            content = file.read(4 * MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read the experiment {path}: {reason}; give the path of a YAML file") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (at byte {error.start}); save the file as UTF-8") from error
    return text


def read_yaml(text: str, fault: str) -> Any:
    """What ``text`` stands for: None, numbers, text, dates and the like, lists and dicts of them, at most
    ``MOST_PARTS`` values, nested not much deeper than ``DEEPEST``.

    Raises ConfigError, which begins with ``fault`` and never quotes ``text``: a secret may stand in it.
    """
    return read_with_lines(text, fault)[0]


def read_with_lines(text: str, fault: str) -> tuple[Any, dict[str, int]]:
    """``read_yaml``, and the line of each key in ``text``, from 1, by its dotted name: ``reward.functions[0].url``."""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{fault}: it has more than {MOST_CHARACTERS} characters; put data into a file of its own")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _expanded(node, {}, set())
        lines = _lines(node)  # before merge keys become what they stand for
        return loader.construct_document(node), lines
    except _Refused as error:
        raise ConfigError(f"{fault}: {error}; repair it") from error
    except yaml.MarkedYAMLError as error:
        parts = [(error.context, error.context_mark), (error.problem, error.problem_mark)]
        told = ", ".join(  # without the line itself
            printable(words, longest=200) + (f" at line {mark.line + 1}, column {mark.column + 1}" if mark else "")
            for words, mark in parts
            if words
        )
        raise ConfigError(f"{fault}: {told}; repair it, or put text in quotes") from error
    except Exception as error:  # beside YAMLError whatever its converters raise: ValueError for a date 2024-13-45
        raise ConfigError(f"{fault}: {described(error)}; repair it, or put text in quotes") from error


def _expanded(node: yaml.Node, known: dict[int, int], open_nodes: set[int]) -> int:
    """How many values ``node`` stands for, aliases written out. Raises _Refused for too many, for a node that holds
    itself, and for a key that stands twice in one mapping."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in open_nodes:
        raise _Refused("an alias stands within the value that it names")
    open_nodes.add(id(node))
    size, children = 1, list[yaml.Node]()
    if isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        first = dict[tuple[str, str], int]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in first:
                raise _Refused(f"{shortened(key.value, 80)} stands twice, at lines {first[name]} and {line}; keep one")
            first[name] = line
        children = [child for pair in node.value for child in pair]
    for child in children:
        size += _expanded(child, known, open_nodes)
        if size > MOST_PARTS:
            raise _Refused(f"its aliases stand for more than {MOST_PARTS} values; write it without them")
    open_nodes.discard(id(node))
    known[id(node)] = size
    return size


def _lines(root: yaml.Node) -> dict[str, int]:
    """The line of each key that may be a setting's, by its dotted name: four levels, of short names. What an alias
    stands for has that of its own text."""
    lines, level = dict[str, int](), [("", root)]
    for _ in range(4):
        below = list[tuple[str, yaml.Node]]()
        for name, node in level:
            if isinstance(node, yaml.SequenceNode):
                below += [(f"{name}[{number}]", item) for number, item in enumerate(node.value)]
            for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode) and len(key.value) <= LONGEST_NAME:
                    place = f"{name}.{key.value}".removeprefix(".")
                    lines[place] = key.start_mark.line + 1
                    below.append((place, value))
        level = below
    return lines
