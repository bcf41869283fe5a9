"""docs/performance.md quotes result files of bench/ and nothing else, to the digits it shows."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from typing import Any

from tests.support.launch import ROOT
from tests.support.offenders import for_each

sys.path.insert(0, str(ROOT / "bench"))
import first_hour
import portability
import quantised

PAGE = (ROOT / "docs/performance.md").read_text()
ROW = re.compile(r"^\|.*\| (?P<number>-?\d+(?:\.\d+)?)[^|]* \| `(?P<file>\w+\.json): (?P<path>[^`]+)` \|$")


@cache
def results(file: str) -> Any:
    return json.loads((ROOT / "bench/results" / file).read_text())


PROCESSORS = portability.as_markdown(results("portability.json")["figures"])
CURVES = quantised.as_markdown(results("quantised.json")["figures"][0]["runs"])
"""Tables of whole rows, which need no places of their numbers."""
ROWS = [
    line
    for line in PAGE.splitlines()
    if line.startswith("|") and re.search(r"\d", line) and line not in PROCESSORS + CURVES
]


@for_each("row", ROWS)
def test_every_number_of_a_table_stands_in_the_file_it_names(row: str) -> None:
    quoted = ROW.match(row)
    assert quoted, "a row with a number ends with `file.json: path.to.the.number`"
    value = results(quoted["file"])
    for key in quoted["path"].split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    decimals = len(quoted["number"].partition(".")[2])
    assert f"{value:.{decimals}f}" == quoted["number"]


def test_the_table_of_other_processors_is_what_was_measured_and_every_run_ended_and_learned() -> None:
    assert PROCESSORS in PAGE
    figures = results("portability.json")["figures"]
    assert len(figures) > 15 and all(row["status"] == 0 for row in figures)
    long = [row for row in figures if row["rollouts"] >= 15 and "estimator" not in row["name"]]
    assert len(long) >= 6 and all(row["last_four"] - row["first_two"] >= 0.5 for row in long)


def test_the_curves_over_a_base_in_4_bits_are_what_was_measured_and_it_learns_as_over_bfloat16() -> None:
    assert CURVES in PAGE
    runs = results("quantised.json")["figures"][0]["runs"]
    learned = {name: [row["last_four"] - row["first_two"] for row in rows] for name, rows in runs.items()}
    assert all(len(rises) >= 3 and min(rises) >= 0.5 for rises in learned.values())


def test_the_table_of_the_first_hour_is_what_was_measured() -> None:
    page, rows = (ROOT / "docs/start.md").read_text(), results("first_hour.json")["figures"]
    assert first_hour.as_markdown(rows) in page
    (screen,) = [row["screen"] for row in rows if row["typed"] == "rlhf train --resume"]
    assert "\n".join(["```", *screen, "```"]) in page


@for_each("file", sorted({file.name for file in (ROOT / "bench/results").glob("*.json")}))
def test_every_result_says_where_it_comes_from(file: str) -> None:
    assert {"machine", "threads", "commit", "figures"} <= results(file).keys()


def test_every_command_of_the_page_and_of_the_readme_is_a_bench() -> None:
    pages = PAGE + (ROOT / "bench/README.md").read_text()
    named = set(re.findall(r"python (bench/\w+\.py)", pages))
    assert named and all((ROOT / name).is_file() for name in named)
