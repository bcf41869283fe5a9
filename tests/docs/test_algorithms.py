"""docs/algorithms.md has a row for everything that can be named, with the knobs and defaults of the code."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable
from functools import cache
from inspect import Parameter, getsource, signature
from operator import attrgetter
from pathlib import Path
from typing import Any

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS, WHITENED
from rlhf_toolkit.algorithms.aggregation import AGGREGATION_MODES
from rlhf_toolkit.algorithms.importance import WEIGHTS
from rlhf_toolkit.algorithms.kl import KL_ESTIMATORS
from rlhf_toolkit.algorithms.policy_losses import AGGREGATION_OF, POLICY_LOSSES, SELECTORS
from tests.support.offenders import for_each

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/algorithms.md").read_text()
FUNCTION = re.compile(r"`src/(rlhf_toolkit/[\w/]+)\.py:([\w.]+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
KNOB = re.compile(r"`(\w+)`(?: ([\w.-]+))?")
REGISTRIES: dict[str, Any] = {
    "Advantage estimators": ADVANTAGE_ESTIMATORS,
    "Policy losses": POLICY_LOSSES,
    "Selected tokens": SELECTORS,
    "KL estimators": KL_ESTIMATORS,
    "Aggregation": dict.fromkeys(AGGREGATION_MODES),
    "Importance weights": WEIGHTS,
}
OFFERED = {
    *("rewards", "mask", "logprobs", "old_logprobs", "advantages", "weights"),
    *("rollout_logprobs", "scores", "finished", "lengths", "groups", "x"),
}
"""What every function of a table is given: no knobs. A group estimator's groups are named all the same."""


def table(title: str) -> list[dict[str, str]]:
    """The rows of one section's table, by the names of its columns."""
    lines = [line for line in PAGE.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


ROWS = [(title, row) for title in [*REGISTRIES, "Scores"] for row in table(title)]
EVERY = for_each("title, row", ROWS, [f"{title}: {row['name']}" for title, row in ROWS])


def function_of(row: dict[str, str]) -> Callable[..., Any]:
    """The function that a row names."""
    ((module, name),) = FUNCTION.findall(row["function"])
    return attrgetter(name)(importlib.import_module(module.replace("/", ".")))


@cache
def defined_in(path: str) -> frozenset[str]:
    """The test functions a file defines, without importing it."""
    return frozenset(node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name"))


def as_written(default: object) -> str:
    """A default as the tables write it: nothing for none given, ``none`` for None."""
    return "" if default is Parameter.empty else "none" if default is None else str(default)


@for_each("title", REGISTRIES)
def test_a_table_has_every_name_once_and_no_other(title: str) -> None:
    assert sorted(row["name"].strip("`") for row in table(title)) == sorted(REGISTRIES[title])


@EVERY
def test_a_row_names_the_function_of_its_name(title: str, row: dict[str, str]) -> None:
    assert all(row.values())
    function, named = function_of(row), REGISTRIES.get(title, {}).get(row["name"].strip("`"))
    if title not in ("Aggregation", "Scores") and not row["name"].endswith("+`"):
        assert function is named


@EVERY
def test_a_rows_knobs_and_defaults_are_the_codes(title: str, row: dict[str, str]) -> None:
    if "knobs" not in row:
        return
    given = OFFERED - {"groups"} if title == "Advantage estimators" else OFFERED
    knobs = {name: p.default for name, p in signature(function_of(row)).parameters.items() if name not in given}
    written = dict(KNOB.findall(row["knobs"]))
    assert written.keys() == knobs.keys()
    for name, default in knobs.items():
        same = written[name] == as_written(default)
        assert same or float(written[name]) == default, f"{name} is {default!r}, not {written[name]!r}"


@EVERY
def test_a_rows_tests_exist(title: str, row: dict[str, str]) -> None:
    found = TEST.findall(row["test"])
    assert found
    for path, name in found:
        assert name in defined_in(path), f"{path} has no {name}"


@EVERY
def test_a_rows_paper_is_the_functions(title: str, row: dict[str, str]) -> None:
    paper = row.get("paper", "none")
    if not paper[0].isdigit():
        return
    assert re.fullmatch(r"\d{4}\.\d{5}", paper)
    assert paper in (ROOT / f"src/{FUNCTION.findall(row['function'])[0][0]}.py").read_text()
    assert paper in getsource(function_of(row)) or title in ("Selected tokens", "Importance weights")


def test_tests_named_between_the_tables_exist() -> None:
    assert all(name in defined_in(path) for path, name in TEST.findall(PAGE))


def test_whitening_and_prescribed_aggregations_stand_in_the_rows() -> None:
    whitened = {
        row["name"].strip("`") for row in table("Advantage estimators") if row["advantage"].endswith("whitened")
    }
    assert whitened == WHITENED
    for row in table("Policy losses"):
        prescribed = [mode for mode in AGGREGATION_MODES if row["loss of a token"].endswith(f"; {mode}")]
        assert prescribed == [mode for name, mode in AGGREGATION_OF.items() if row["name"] == f"`{name}`"]
