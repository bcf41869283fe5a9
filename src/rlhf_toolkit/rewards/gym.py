"""Rewards of reasoning-gym: a hundred procedural tasks, each with a scorer of its own."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rlhf_toolkit.errors import ConfigError, DataError, described, nearest, shortened
from rlhf_toolkit.rewards.texts import each, last_tagged, optional_library

LONGEST_ANSWER = 10_000
"""Characters; a longer answer scores 0: some scorers take time quadratic in the length."""

# The scorers of these datasets hand what the model wrote to Python's eval, the second group by way of sympy.parse_expr.
LITERAL_SCORERS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
SYMPY_SCORERS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
LARGEST_POWER = 1000
BY_EQUALITY = frozenset({"game_of_life_halting"})
"""Datasets whose scorer (of 0.1.25) takes any text for right: it compares ``bool`` of two texts."""
_TRIGONOMETRIC = {kind + name for kind in ("", "a") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}
_FUNCTIONS = _TRIGONOMETRIC | {"exp", "log", "ln", "sqrt", "Abs", "erf", "Si", "Ci", "Ei"}
_ARITHMETIC = (
    *(ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load, ast.Call),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd),
)

# ---- the reward ------------------------------------------------------------------------------------------------------


def reasoning_gym(
    prompts: list[str],
    responses: list[str],
    *,
    entry: Sequence[str],
    dataset: Sequence[str],
    config: Sequence[str] | None = None,
    answer_tags: bool = False,
    exact: bool = False,
    **columns: Any,
) -> list[float]:
    """The score that reasoning-gym's own ``score_answer(answer, entry)`` gives, mostly in [0, 1]; 1.0 is right.

    The answer is the whole response, stripped, or with ``answer_tags`` the last closed ``<answer>...</answer>``. Scores
    between 0 and 1 are the library's: many tasks give something for the right answer inside a longer text, some 0.01
    for any text. ``exact`` gives 0.0 for all of them and 1.0 from a score of 1 on.

    Scored 0.0 without asking the library: no answer, an empty one, one longer than ``LONGEST_ANSWER`` characters, one
    on which the scorer raises although it scores the entry's own answer, and, where the scorer hands the text to
    ``eval``, anything but a Python literal (``LITERAL_SCORERS``) or plain arithmetic (``SYMPY_SCORERS``): a model must
    not run code. ``BY_EQUALITY`` is compared with the entry's answer instead. A few scorers have no time limit and
    swallow signals, so let it run in workers.

    Columns: ``entry``, the dataset's item as ``entry_text`` writes it; ``dataset``, its name in reasoning-gym;
    ``config``, optional, the JSON text of the settings it was built with. DataError for other values. Needs the tasks
    extra (``reasoning-gym``), else ConfigError. Source: Stojanovski et al. 2025, "Reasoning Gym".
    """
    optional_library("reasoning_gym", "reasoning_gym")
    configs = ["{}"] * len(responses) if config is None else each(config, responses, "config", "reasoning_gym")
    rows = zip(
        responses,
        each(entry, responses, "entry", "reasoning_gym"),
        each(dataset, responses, "dataset", "reasoning_gym"),
        configs,
        strict=True,
    )
    scores = [
        _score(last_tagged(response, "answer") if answer_tags else response.strip(), entry_of(item), name, settings)
        for response, item, name, settings in rows
    ]
    return [float(score >= 1.0) for score in scores] if exact else scores


def _score(answer: str | None, entry: dict[str, Any], name: str, config: str) -> float:
    scorer = _dataset(name, config)
    if not answer or len(answer) > LONGEST_ANSWER or (answer != entry["answer"] and _runs_code(answer, name)):
        return 0.0
    if name in BY_EQUALITY:
        return float(answer == entry["answer"])
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception as error:  # several scorers raise on an answer of another form, which is a wrong answer
        _check_entry(scorer, entry, name, error)
        return 0.0


def _check_entry(scorer: Any, entry: dict[str, Any], name: str, cause: Exception) -> None:
    """DataError where the scorer cannot score the entry's own answer either: then the entry is at fault."""
    try:
        scorer.score_answer(entry["answer"], entry)
    except Exception as error:
        raise DataError(
            f"the scorer of reasoning-gym's {name} raised {described(cause)} and cannot score the entry "
            f"{shortened(entry)}; write column entry with entry_text of rlhf_toolkit.rewards.gym"
        ) from error


@lru_cache(maxsize=128)
def _dataset(name: str, config: str) -> Any:
    """The dataset whose scorer is asked; it is built once, and its items are not."""
    factory = importlib.import_module("reasoning_gym.factory")
    if name not in factory.DATASETS:
        raise DataError(f"reasoning-gym has no dataset {name!r}{nearest(name, factory.DATASETS)}")
    try:
        return factory.create_dataset(name, **json.loads(config))
    except Exception as error:  # a config class checks its values with assert, and may need files
        raise ConfigError(
            f"reasoning-gym cannot build {name} with {shortened(config)}: {described(error)}; repair column config"
        ) from error


# ---- entries as text -------------------------------------------------------------------------------------------------

TUPLE, MAPPING = "__tuple__", "__mapping__"


def entry_text(entry: Mapping[str, Any]) -> str:
    """An item of a reasoning-gym dataset as JSON text. Tuples, and mappings whose keys are no texts, are marked,
    because JSON has neither and some scorers compare them. TypeError for a value that JSON cannot hold."""
    return json.dumps(_marked(entry), ensure_ascii=False)


def entry_of(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """What ``entry_text`` was given. DataError where ``text`` is not an item of reasoning-gym."""
    try:
        entry = _unmarked(json.loads(text)) if isinstance(text, str) else dict(text)
    except (ValueError, TypeError) as error:
        raise DataError(f"column entry holds {shortened(text)}, which is not JSON: {described(error)}") from error
    if not isinstance(entry, dict) or not {"question", "answer", "metadata"} <= entry.keys():
        raise DataError(
            f"column entry holds {shortened(text)}; give question, answer and metadata of a reasoning-gym item"
        )
    return entry


def _marked(value: Any) -> Any:
    if isinstance(value, tuple):
        return {TUPLE: [_marked(item) for item in value]}
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _marked(item) for key, item in value.items()}
        return {MAPPING: [[_marked(key), _marked(item)] for key, item in value.items()]}
    return value


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TUPLE}:
        return tuple(_unmarked(item) for item in value[TUPLE])
    if value.keys() == {MAPPING}:
        return {_unmarked(key): _unmarked(item) for key, item in value[MAPPING]}
    return {key: _unmarked(item) for key, item in value.items()}


# ---- answers that would run ------------------------------------------------------------------------------------------


def _runs_code(answer: str, name: str) -> bool:
    """Whether the scorer of ``name`` would make Python run what ``answer`` says, or work on it without end."""
    if name in LITERAL_SCORERS:
        return not _is_text_or_literal(answer)
    return name in SYMPY_SCORERS and not is_arithmetic(answer)


def _is_text_or_literal(answer: str) -> bool:
    """True for what is no Python expression (eval refuses it), one plain word, or a literal."""
    try:
        tree = ast.parse(answer.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    try:
        ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return isinstance(tree, ast.Name) and re.fullmatch(r"[A-Z]+", answer.strip()) is not None
    return True


def is_arithmetic(text: str) -> bool:
    """Whether ``text`` is an expression of numbers, names, + - * / ** and common functions whose powers stay small:
    ``-34*x**8/15 + exp(x) + C``, not ``9**9**9``, ``f.g`` or ``open('x')``."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return all(_allowed(node) for node in ast.walk(tree)) and _degree(tree) <= LARGEST_POWER
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or re.fullmatch(r"[A-Za-z]|[a-z]+", node.id) is not None
    return isinstance(node, _ARITHMETIC)


def _degree(node: ast.AST) -> float:
    """The largest product of exponents along one path; an exponent counts as the product of its numbers above 1, and
    as too large where it holds a power."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        inside = list(ast.walk(node.right))
        if any(isinstance(part, ast.Pow) for part in inside):
            return math.inf
        numbers = [part.value for part in inside if isinstance(part, ast.Constant)]
        return _degree(node.left) * math.prod(max(1, abs(n)) for n in numbers if isinstance(n, (int, float)))
    return max((_degree(child) for child in ast.iter_child_nodes(node)), default=1)
