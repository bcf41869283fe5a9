"""A test of many cases fails where one does, and names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.offenders import for_each


def test_all_that_fail_are_named() -> None:
    @for_each("letter, number", [("a", 1), ("b", 0), ("c", "x"), ("d", 0.1)])
    def check(letter: str, number: float) -> None:
        """A reciprocal."""
        assert 1 / number < 2

    with pytest.raises(AssertionError) as failed:
        check()
    lines = [line for line in str(failed.value).splitlines() if "fail" in line or ":" in line]
    assert lines[0].startswith("3 of 4 fail:") and lines[1].startswith("b-0: ZeroDivisionError: division by zero")
    assert any(line.startswith("c-x: TypeError: ") for line in lines)
    assert any(line.startswith("d-0.1: AssertionError: ") for line in lines)
    assert check.__name__ == "check" and check.__doc__ == "A reciprocal."


def test_a_crash_of_every_case_that_fails_stays_one() -> None:
    """``tests.mutation_runner`` tells a wrong number from a crash."""
    with pytest.raises(ZeroDivisionError) as failed:
        for_each("number", [1, 0, 0])(lambda number: print(1 / number))()
    assert failed.value.__notes__[0].startswith("2 of 3 fail:\n0: ZeroDivisionError")


def test_an_error_that_does_not_come_and_a_skip_are_failures() -> None:
    @for_each("what", ["raises", "skips", "passes"])
    def check(what: str) -> None:
        if what == "skips":
            pytest.skip("no time")
        if what == "raises":
            with pytest.raises(ValueError):
                pass

    with pytest.raises(AssertionError, match=r"(?s)2 of 3 fail:\nraises: Failed: DID NOT RAISE.*\nskips: .*no time"):
        check()


def test_several_are_multiplied_as_parametrize_does() -> None:
    seen: list[tuple[str, int]] = []

    @for_each("letter", ["a", "b"])
    @for_each("number", [1, pytest.param(2, id="two")])
    def check(letter: str, number: int) -> None:
        seen.append((letter, number))
        assert seen != [("a", 1), ("b", 1), ("a", 2)], "here"

    with pytest.raises(AssertionError, match=r"1 of 4 fail:\ntwo-a: AssertionError: here"):
        check()
    assert sorted(seen) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


FOLDERS: list[Path] = []


@for_each("number", [1, 2])
@pytest.mark.parametrize("letter", ["a", "b"])
def test_fixtures_and_other_parameters_are_handed_on(
    number: int, letter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert letter in ("a", "b") and not hasattr(pytest, "of_case") and tmp_path not in FOLDERS
    monkeypatch.setattr(pytest, "of_case", number, raising=False)
    FOLDERS.append(tmp_path)
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_a_case_that_is_no_tuple_is_the_argument() -> None:
    seen: list[object] = []
    for_each("case", [1, [2, 3]])(lambda case: seen.append(case))()
    assert seen == [1, [2, 3]]


def test_no_case_is_an_error() -> None:
    with pytest.raises(AssertionError, match="nothing would be checked"):
        for_each("case", [])
