"""README's experiment on cards of 24 GB: the table of docs/zero3.md is what the code says, and the promises hold."""

from __future__ import annotations

import sys

import pytest

from tests.support.launch import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from placements import Row, as_markdown, quantised_table, table


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return table()


@pytest.fixture(scope="module")
def quantised() -> list[Row]:
    return quantised_table()


def of(rows: list[Row], model: str, ranks: int, stage: int) -> Row:
    return next(row for row in rows if (row.model, row.ranks, row.stage) == (model, ranks, stage))


def test_the_tables_of_the_docs(rows: list[Row], quantised: list[Row]) -> None:
    text = (ROOT / "docs/zero3.md").read_text()
    for each in (rows, quantised):
        assert as_markdown(each) in text, "python bench/placements.py prints the new one"


def test_nf4_brings_7b_and_14b_to_one_card_and_32b_to_four(rows: list[Row], quantised: list[Row]) -> None:
    """In sequences of 1,024 tokens, with policy, value and reference."""
    assert of(quantised, "Qwen2.5-7B", 1, 0).slots >= 16
    assert of(rows, "Qwen2.5-14B", 1, 0).refused and of(quantised, "Qwen2.5-14B", 1, 0).slots >= 16
    assert of(quantised, "Qwen2.5-32B", 1, 0).refused and of(quantised, "Qwen2.5-32B", 4, 3).slots >= 16


def test_7b_on_four_cards_gathers_its_base_with_many_slots(rows: list[Row]) -> None:
    row = of(rows, "Qwen2.5-7B", 4, 3)
    assert row.mode == "window" and row.slots >= 16


def test_7b_runs_on_two_cards(rows: list[Row]) -> None:
    assert not of(rows, "Qwen2.5-7B", 2, 3).refused
    assert not of(rows, "Qwen2.5-7B", 2, 2).refused


def test_a_base_larger_than_a_card_starts_where_it_is_sharded(rows: list[Row]) -> None:
    """32B is 61 GiB."""
    row = of(rows, "Qwen2.5-32B", 8, 3)
    assert row.mode == "stream" and max(row.phases) < 24
    assert of(rows, "Qwen2.5-32B", 8, 2).refused == "the model alone is too large for a card"


def test_what_runs_fits_and_what_does_not_has_a_way_out(rows: list[Row]) -> None:
    for row in rows:
        assert max(row.phases) < 23.2 if not row.refused else ("set " in row.refused or "too large" in row.refused)
