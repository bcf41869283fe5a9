"""A test of many cases fails where one does, and names it."""

from __future__ import annotations

import pytest

from tests.support.offenders import for_each


def test_all_that_fail_are_named() -> None:
    @for_each([("a", 1), ("b", 0), ("c", "x")], name=lambda case: case[0])
    def check(letter: str, number: int) -> None:
        """A reciprocal."""
        assert 1 / number < 2

    with pytest.raises(AssertionError) as failed:
        check()
    lines = str(failed.value).splitlines()
    assert lines[0].startswith("2 of 3 fail:") and lines[1].startswith("b: ZeroDivisionError: division by zero")
    assert any(line.startswith("c: TypeError: ") for line in lines)
    assert check.__name__ == "check" and check.__doc__ == "A reciprocal."


def test_a_case_that_is_no_tuple_is_the_argument() -> None:
    seen: list[object] = []
    for_each([1, [2, 3]])(lambda case: seen.append(case))()
    assert seen == [1, [2, 3]]


def test_no_case_is_an_error() -> None:
    with pytest.raises(AssertionError, match="nothing would be checked"):
        for_each([])
