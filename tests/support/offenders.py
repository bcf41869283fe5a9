"""One test of many small cases, that names all which fail."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
from _pytest.mark.structures import ParameterSet

Check = Callable[..., None]
Ids = Callable[[Any], object] | Iterable[str] | None


class Case(NamedTuple):
    """The arguments of one call of a check, and what the case is called where it fails."""

    name: str
    arguments: dict[str, Any]


def for_each(arguments: str | Sequence[str], values: Iterable[Any], ids: Ids = None) -> Callable[[Check], Check]:
    """Makes one test of a check, which is called with each of ``values``. It takes what ``pytest.mark.parametrize``
    takes, and several on one check mean each value of one with each of the other; but the cases are one test, which
    fails with a line for every case that did.

    Fixtures are made once for all cases, except that every case has a ``tmp_path`` of its own and what it does by
    ``monkeypatch`` is undone after it. A case may not skip."""
    cases = list(_cases(arguments, values, ids))
    assert cases, "no case, so nothing would be checked"

    def one_test(check: Check) -> Check:
        inner: Check = getattr(check, "check_of_one_case", check)
        combined = [
            Case("-".join([below.name, case.name]), {**below.arguments, **case.arguments})
            for below, case in itertools.product(getattr(check, "cases", []), cases)
        ] or cases
        return _test(inner, combined, check)

    return one_test


def _cases(arguments: str | Sequence[str], values: Iterable[Any], ids: Ids) -> Iterator[Case]:
    names = [name.strip() for name in arguments.split(",")] if isinstance(arguments, str) else list(arguments)
    sets = [ParameterSet.extract_from(value, force_tuple=len(names) == 1) for value in values]
    shown, given = (ids, None) if callable(ids) else (_shown, ids)
    for each, name in zip(sets, [case.id for case in sets] if given is None else given, strict=True):
        assert not each.marks, "a mark is of a whole test"
        yield Case(
            str(name or "-".join(str(shown(value)) for value in each.values)),
            dict(zip(names, each.values, strict=True)),
        )


def _shown(value: object) -> str:
    text = getattr(value, "__name__", None) or (value if isinstance(value, str) else repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _test(check: Check, cases: list[Case], named_as: Check) -> Check:
    """The test that calls ``check`` with all ``cases``, with the name and the marks of ``named_as``."""
    parameters = inspect.signature(check).parameters.values()
    fixtures = [parameter for parameter in parameters if parameter.name not in cases[0].arguments]

    @functools.wraps(named_as)
    def test(**given: Any) -> None:
        failures = [(case, error) for case in cases if (error := _failure(check, case, given))]
        if failures:
            lines = [f"{case.name}: {type(error).__name__}: {error}" for case, error in failures]
            wrong = [error for _, error in failures if isinstance(error, (AssertionError, pytest.fail.Exception))]
            message = f"{len(failures)} of {len(cases)} fail:\n" + "\n".join(lines)
            if wrong:
                raise AssertionError(message) from wrong[0]
            failures[0][1].add_note(message)
            raise failures[0][1]

    keyword = inspect.Parameter.KEYWORD_ONLY
    test.__dict__.update(check_of_one_case=check, cases=cases)
    test.__signature__ = inspect.Signature([each.replace(kind=keyword) for each in fixtures])  # type: ignore[attr-defined]
    return test


def _failure(check: Check, case: Case, fixtures: dict[str, Any]) -> BaseException | None:
    """What goes wrong with a case, None where it passes."""
    with ExitStack() as stack:
        own = dict(fixtures)
        if "tmp_path" in own:
            own["tmp_path"] = own["tmp_path"] / str(len(list(own["tmp_path"].iterdir())))
            own["tmp_path"].mkdir()
        if "monkeypatch" in own:
            own["monkeypatch"] = stack.enter_context(own["monkeypatch"].context())
        try:
            check(**own, **case.arguments)
        except (Exception, pytest.fail.Exception) as error:
            return error
        except pytest.skip.Exception as error:
            return AssertionError(f"skips: {error}")
    return None
