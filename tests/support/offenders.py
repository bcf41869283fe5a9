"""One test of many small cases, that names all which fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def for_each(cases: Iterable[Any], name: Callable[[Any], object] = str) -> Callable[[Callable[..., None]], Any]:
    """Makes one test of a check: it is called with each case, a tuple's items one by one, and the test fails with a
    line for each case that did, ``name(case)`` and why."""
    cases = list(cases)
    assert cases, "no case, so nothing would be checked"

    def one_test(check: Callable[..., None]) -> Callable[[], None]:
        def test() -> None:
            failed = [line for case in cases if (line := _failure(check, case, name))]
            assert not failed, f"{len(failed)} of {len(cases)} fail:\n" + "\n".join(failed)

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return one_test


def _failure(check: Callable[..., None], case: Any, name: Callable[[Any], object]) -> str:
    """Empty where the case passes."""
    try:
        check(*case) if isinstance(case, tuple) else check(case)
    except Exception as error:  # whatever goes wrong with a case is that case's failure
        return f"{name(case)}: {type(error).__name__}: {error}"
    return ""
