"""docs/performance.md quotes result files of bench/ and nothing else, to the digits it shows."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from tests.offenders import for_each

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/performance.md").read_text()
ROW = re.compile(r"^\|.*\| (?P<number>-?\d+(?:\.\d+)?)[^|]* \| `(?P<file>\w+\.json): (?P<path>[^`]+)` \|$")
ROWS = [line for line in PAGE.splitlines() if line.startswith("|") and re.search(r"\d", line)]


@cache
def results(file: str) -> Any:
    return json.loads((ROOT / "bench/results" / file).read_text())


@for_each(ROWS)
def test_every_number_of_a_table_stands_in_the_file_it_names(row: str) -> None:
    quoted = ROW.match(row)
    assert quoted, "a row with a number ends with `file.json: path.to.the.number`"
    value = results(quoted["file"])
    for key in quoted["path"].split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    decimals = len(quoted["number"].partition(".")[2])
    assert f"{value:.{decimals}f}" == quoted["number"]


@for_each(sorted({file.name for file in (ROOT / "bench/results").glob("*.json")}))
def test_every_result_says_where_it_comes_from(file: str) -> None:
    assert {"machine", "threads", "commit", "figures"} <= results(file).keys()


def test_every_command_of_the_page_and_of_the_readme_is_a_bench() -> None:
    pages = PAGE + (ROOT / "bench/README.md").read_text()
    named = set(re.findall(r"python (bench/\w+\.py)", pages))
    assert named and all((ROOT / name).is_file() for name in named)
