"""docs/ppo_details.md names, for each of PPO's details, a function and a test that exist."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from operator import attrgetter
from pathlib import Path

from tests.support.offenders import for_each

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/ppo_details.md"
FUNCTION = re.compile(r"`src/(rlhf_toolkit/[\w/]+)\.py:([\w.]+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LEAST = 24


def rows() -> list[list[str]]:
    """The cells of every numbered row: number, detail, what we do, functions, tests."""
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


ROWS = rows()
BY_NUMBER = for_each("row", ROWS, lambda row: row[0])


@cache
def defined_in(path: str) -> frozenset[str]:
    """The test functions a file defines, without importing it."""
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_there_are_enough_and_they_are_numbered() -> None:
    assert len(ROWS) >= LEAST
    assert [row[0] for row in ROWS] == [str(number) for number in range(1, len(ROWS) + 1)]


@BY_NUMBER
def test_a_row_has_every_cell(row: list[str]) -> None:
    assert len(row) == 5 and all(row), row


@BY_NUMBER
def test_the_functions_exist(row: list[str]) -> None:
    found = FUNCTION.findall(row[3])
    assert found, f"no function in {row[3]!r}"
    for module, name in found:
        attrgetter(name)(importlib.import_module(module.replace("/", ".")))


@BY_NUMBER
def test_the_tests_exist(row: list[str]) -> None:
    found = TEST.findall(row[4])
    assert found, f"no test in {row[4]!r}"
    for path, name in found:
        assert name in defined_in(path), f"{path} has no {name}"
