"""No field of a row and no answer is evaluated by reasoning-gym's scorers, whatever it says."""

from __future__ import annotations

import ast
import builtins
import copy
import dis
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from reasoning_gym import factory

from rlhf_toolkit.errors import ConfigError, DataError
from rlhf_toolkit.rewards.gym import BY_EQUALITY, entry_text, reasoning_gym
from rlhf_toolkit.rewards.gym_texts import EVALUATED_FIELDS, LITERAL_SCORERS, SYMPY_SCORERS

NAMES = sorted(set(factory.DATASETS) - {"composite"})
Entry = dict[str, Any]
Path = tuple[Any, ...]

CALL = "__import__('planted').fire()"
PAYLOADS = [
    CALL,
    f"[{CALL}]",
    f"(lambda: {CALL})()",
    f'f"{{{CALL}}}"',
    f"[x for x in [{CALL}]]",
    f"({CALL} or 1) + 1",
    f"-{CALL} << 0x1",
    "-" * 2000 + CALL,  # too deep for ast, perhaps not for eval
    f"Symbol('x', commutative={CALL})",
    f'sympify("{CALL}")',
    f'S("{CALL}")',
    f"exp({CALL})",
    f"Integral({CALL}, x)",
    f"x.__class__.__init__.__globals__['__builtins__']['eval'](\"{CALL}\")",
    "().__class__.__base__.__subclasses__()[0].planted",
    f"x if {CALL} else x",
    f"{CALL}#",
    f"{CALL}\n",
    "\uff3f_import__('planted').fire()",
]


@cache
def first_entry(name: str) -> Entry:
    entry: Entry = factory.create_dataset(name, size=1, seed=7)[0]
    return entry


def score(name: str, answer: str, entry: Entry, **options: Any) -> float:
    return reasoning_gym(["p"], [answer], entry=[entry_text(entry)], dataset=[name], **options)[0]


class Watch:
    """What reached eval, exec or compile with a payload in it, and what a payload did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        planted = ModuleType("planted")
        setattr(planted, "fire", self.fire)  # noqa: B010  a module has no such attribute
        monkeypatch.setitem(sys.modules, "planted", planted)
        for name in ("eval", "exec"):
            monkeypatch.setattr(builtins, name, self._watched(getattr(builtins, name)))

    def fire(self) -> int:
        """What a payload calls."""
        self.seen.append("ran")
        return 1

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(code: Any, scope: Any = None, local: Any = None, /) -> Any:
            text = code if isinstance(code, str) else repr(code.co_consts) if isinstance(code, CodeType) else repr(code)
            if "planted" in text:
                self.seen.append(text)
                raise ValueError("not this one")
            frame = sys._getframe(1)
            return real(code, frame.f_globals if scope is None else scope, frame.f_locals if scope is None else local)

        return watched


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place of text or of a number in ``value``, keys of mappings among these; of a list its first and last."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:12]:
            yield (*path, ("key", key))
            yield from places(value[key], (*path, key))
    elif isinstance(value, (list, tuple)) and len(path) < 4:
        for index in sorted({0, len(value) - 1} if value else ()):
            yield from places(value[index], (*path, index))


def planted(value: Any, path: Path, payload: str) -> Any:
    """A copy of ``value`` with ``payload`` at ``path``."""
    if not path:
        return payload
    step, rest = path[0], path[1:]
    if isinstance(step, tuple) and step[0] == "key":
        return {payload if key == step[1] else key: item for key, item in value.items()}
    if isinstance(value, dict):
        return {key: planted(item, rest, payload) if key == step else item for key, item in value.items()}
    return type(value)(planted(item, rest, payload) if index == step else item for index, item in enumerate(value))


def answers_of(name: str, entry: Entry) -> list[str]:
    """Answers of a form that takes each scorer past its first look at the answer, to the fields of the entry."""
    own = entry["answer"] if isinstance(entry["answer"], str) else "1"
    return ["x", own] if name.endswith("integration") else [own, "1"]


def tried(name: str, entry: Entry, answer: str) -> str | None:
    """What a score raised that is none of ours; hostile entries may be refused or scored."""
    try:
        score(name, answer, entry)
    except (DataError, ConfigError, TypeError) as error:
        return None if not isinstance(error, TypeError) else f"{name}: {error}"
    return None


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_no_field_and_no_answer_of_any_scorer_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each payload as the answer, and, a few in turn, in each field of the entry, with answers that reach it."""
    assert len(NAMES) >= 105
    entries = {name: first_entry(name) for name in NAMES}
    watch, offenders = Watch(monkeypatch), []
    for name, entry in entries.items():
        evaluated = name in EVALUATED_FIELDS or name in LITERAL_SCORERS | SYMPY_SCORERS
        for number, path in enumerate(list(places(entry))[1:]):
            chosen = PAYLOADS if evaluated else [PAYLOADS[number % len(PAYLOADS)]]
            for payload in chosen:
                hostile = planted(entry, path, payload)
                for answer in (*answers_of(name, entry), payload):
                    offenders += [fault] if (fault := tried(name, hostile, answer)) else []
                    if watch.seen:
                        offenders.append(f"{name} {path} {payload!r}: {watch.seen}")
                        watch.seen.clear()
    assert not offenders


@pytest.mark.filterwarnings("ignore")
def test_the_watch_sees_what_the_library_alone_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could not fail: without our rule each of these scorers evaluates what it is given."""
    watch = Watch(monkeypatch)
    for name in sorted(LITERAL_SCORERS | SYMPY_SCORERS):
        factory.create_dataset(name, size=1, seed=7).score_answer(CALL, first_entry(name))
        assert watch.seen, name
        watch.seen.clear()
    for name, fields in EVALUATED_FIELDS.items():
        for path in fields:
            if path == ("metadata", "variable"):
                continue  # a name in the scope of what is evaluated
            entry = planted(first_entry(name), path, CALL)
            answer = "x" if name.endswith("integration") else first_entry(name)["answer"]
            factory.create_dataset(name, size=1, seed=7).score_answer(answer, entry)
            assert watch.seen, (name, path)
            watch.seen.clear()


# ---- the lists against the library's code ----------------------------------------------------------------------------

EVALUATORS = {"eval", "exec", "__import__", "sympify", "parse_expr", "literal_eval", "parse_latex", "lambdify", "S"}
EVALUATORS |= {"system", "popen", "Popen", "check_output", "unpickle", "pickle", "dill", "marshal", "import_module"}


def reached(function: FunctionType, owner: type, seen: set[CodeType]) -> Iterator[tuple[str, str]]:
    """(function, evaluator) for each evaluator that ``function`` names, and those that it calls in the library."""
    if function.__code__ in seen:
        return
    seen.add(function.__code__)
    for code in nested(function.__code__):
        for step in dis.get_instructions(code):
            name = step.argval
            if not isinstance(name, str) or not step.opname.startswith(("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD")):
                continue
            for found in callees(name, function, owner):
                yield from reached(found, owner, seen)
            own = function.__globals__.get(name)
            ours = isinstance(own, FunctionType) and own.__module__.startswith("reasoning_gym")
            if name in EVALUATORS and not ours:
                yield function.__qualname__, name


def callees(name: str, function: FunctionType, owner: type) -> Iterator[FunctionType]:
    """Functions of the library that ``name`` may be there: of its module, of its classes, of the scorer's class."""
    candidates = [function.__globals__.get(name), getattr(owner, name, None)]
    for value in list(function.__globals__.values()):
        if inspect.isclass(value) and value.__module__.startswith("reasoning_gym"):
            candidates += [vars(value).get(name), *([vars(value).get("__init__")] if value.__name__ == name else [])]
    for candidate in candidates:
        plain = getattr(candidate, "__func__", candidate)
        if isinstance(plain, FunctionType) and plain.__module__.startswith("reasoning_gym"):
            yield plain


def nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def test_the_lists_name_every_scorer_whose_code_reaches_an_evaluator() -> None:
    """Read in the bytecode of every score_answer and of what it calls: a new version of the library fails here."""
    found = {
        name
        for name in NAMES
        for owner in [factory.DATASETS[name][0]]
        if any(reached(owner.score_answer, owner, set()))
    }
    assert found == LITERAL_SCORERS | SYMPY_SCORERS | set(EVALUATED_FIELDS)


# ---- which fields are refused, and which are not ---------------------------------------------------------------------


def test_a_field_that_would_be_evaluated_is_named() -> None:
    row = {"question": "q", "answer": CALL, "metadata": {"direction": "ascending"}}
    with pytest.raises(DataError, match=r"holds answer=.*number_sorting would evaluate.*not a list of numbers"):
        score("number_sorting", "[1, 2]", row)
    for name, field, value in [
        ("simple_integration", "integrand", CALL),
        ("intermediate_integration", "integrand", "x.diff()"),
        ("simple_integration", "variable", "Integer"),
        ("simple_integration", "integrand", None),
        ("bitwise_arithmetic", "problem", "open('x')"),
        ("bitwise_arithmetic", "problem", "0x1 << 0xffffffffff"),
        ("bitwise_arithmetic", "problem", "9 ** 9 ** 9"),
    ]:
        entry = copy.deepcopy(first_entry(name))
        entry["metadata"][field] = value
        with pytest.raises(DataError, match=rf"metadata\.{field}=.*{name} would evaluate"):
            score(name, "", entry)
    with pytest.raises(DataError, match=r"holds answer=.*plain arithmetic"):
        score("polynomial_multiplication", "x", {"question": "q", "answer": "9**9**9", "metadata": {}})


def test_generated_entries_keep_the_grammars() -> None:
    """Entries of each dataset with such a field, some of hard settings; none is refused."""
    hard = {"bitwise_arithmetic": {"difficulty": 8}, "number_sorting": {"max_numbers": 40, "max_decimals": 6}}
    refused = []
    for name, fields in EVALUATED_FIELDS.items():
        for config in ({}, hard.get(name, {})):
            dataset = factory.create_dataset(name, size=30, seed=11, **config)
            for entry in (dataset[index] for index in range(30)):
                for path, (keeps, _) in fields.items():
                    value = entry
                    for key in path:
                        value = value[key]
                    refused += [] if keeps(value) else [(name, path, value)]
    assert not refused


@pytest.mark.parametrize("entry", [{"question": "q", "answer": b"eval", "metadata": {}}, '{"a":' * 100_000])
def test_what_json_cannot_hold_is_no_entry(entry: Any) -> None:
    with pytest.raises(DataError, match="column entry holds"):
        reasoning_gym(["p"], ["a"], entry=[entry], dataset=["gcd"])


def test_a_row_cannot_make_the_library_read_a_file() -> None:
    for place in ("/etc/hostname", "../factory.py", "a\\b", "", 3):
        with pytest.raises(DataError, match="column config holds data_file="):
            score("spell_backward", "a", first_entry("spell_backward"), config=[json.dumps({"data_file": place})])


def test_a_composite_is_refused() -> None:
    """Its scorer hands entries to others, past our lists."""
    config = json.dumps({"datasets": [{"name": "number_sorting", "weight": 1.0, "config": {}}]})
    with pytest.raises(
        DataError, match="dataset composite mixes others; write the name of the one that each entry com"
    ):
        score("composite", "1", {"question": "q", "answer": "1", "metadata": {}}, config=[config])


# ---- numbers that are none, or too large to write out ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_no_answer_without_a_finite_number_is_right() -> None:
    """NaN as each scorer might read it: as a number, as a complex one, as a list as long as the right one."""
    right = []
    for name in sorted(set(NAMES) - BY_EQUALITY):
        entry = first_entry(name)
        count = len(ast.literal_eval(entry["answer"])) if name == "number_sorting" else 3
        nans = ["nan", "NaN", "-nan", "nan+nanj", "inf", "infj", json.dumps([float("nan")] * count), "nan " * count]
        right += [(name, answer) for answer in nans if answer != entry["answer"] and score(name, answer, entry) >= 1.0]
    assert not right


@pytest.mark.filterwarnings("ignore")
def test_numbers_too_large_to_write_out_are_wrong_at_once() -> None:
    """Each of these takes minutes or all memory where it is computed; here no scorer gets them."""
    huge = ["1e9999999", "1e99999999", "1e-999999999", "1E+1_000_000_0", "x + 1e999999999", "exp(exp(exp(9)))"]
    huge += ["10**1000**1000", "exp(9**999)", "sinh(99999)*x", "1/1e999999999", "2**(exp(9))"]
    right = []
    for name in sorted(SYMPY_SCORERS | {"coin_flip", "chain_sum", "power_function", "decimal_arithmetic"}):
        right += [(name, answer) for answer in huge if score(name, answer, first_entry(name)) > 0.05]
    assert not right
    entry = planted(first_entry("bitwise_arithmetic"), ("metadata", "problem"), "0x1e99999")
    assert score("bitwise_arithmetic", "0x1e99999", entry) == 1.0  # hexadecimal
