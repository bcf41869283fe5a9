"""docs/what_people_bring.md: each row names tests, and each of them exists."""

from __future__ import annotations

import re

from tests.docs.test_docs import ROOT

PAGE = ROOT / "docs" / "what_people_bring.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def test_every_row_names_tests_that_exist() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 20
    found = [NAMED.findall(row.split(" | ")[-1]) for row in rows]
    assert all(found), "a row without a test"
    missing = [
        f"{file}::{name}"
        for named in found
        for file, name in named
        if not re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.MULTILINE)
    ]
    assert not missing
    assert sum(map(len, found)) == PAGE.read_text().count("::test_")
