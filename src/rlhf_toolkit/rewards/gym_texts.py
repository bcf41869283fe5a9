"""Which texts a scorer of reasoning-gym may hand to Python's ``eval``: those that keep a small grammar, no others.

Some scorers evaluate what the model wrote, some a field of the dataset's row; both were written by strangers. The
tables below name every such place of reasoning-gym 0.1.25; no other of its scorers evaluates anything, which a test
reads in the library's own code.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

from rlhf_toolkit.errors import DataError, shortened

LONGEST_TEXT = 10_000
"""Characters of an answer, and of a field that is evaluated: some scorers take time quadratic in the length."""

# These scorers hand the answer to Python's eval, the second group by way of sympy.parse_expr.
LITERAL_SCORERS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
SYMPY_SCORERS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
NAN_PASSES = frozenset({"complex_arithmetic", "number_sorting"})
"""Scorers that compare in a way that NaN always wins."""
LARGEST_COUNT = 100
"""Disks, pegs, and pieces along an edge."""
LARGEST_POWER = 1000
LARGEST_EXPONENTIAL = 3
"""Decimal digits of what exp, erf and the like are asked for: exp of a number with four digits is no answer."""
MOST_DIGITS = 10_000
"""Decimal digits of a number that an expression without a variable comes to."""
MOST_BITS = 2**17
"""Bits of a number in whole-number arithmetic, which bitwise_arithmetic evaluates."""
UNPARSED = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What ``ast.parse`` raises; the last two where brackets or signs are too deep."""

_TRIGONOMETRIC = {kind + name for kind in ("", "a") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}
_STEEP = {"exp", "sinh", "cosh", "erf", "Si", "Ci", "Ei"}
_FUNCTIONS = _TRIGONOMETRIC | _STEEP | {"log", "ln", "sqrt", "Abs"}
_CONSTANTS = {"pi"}
_ARITHMETIC = (
    *(ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load, ast.Call),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd),
)
_CHARACTERS = re.compile(r"[0-9A-Za-z+\-*/(),. \t\n]+")
_WORDS = re.compile(r"[0-9A-Za-z_.,\- \t\r\n]*")
_LONG_NUMERAL = re.compile(r"[0-9.]{101}|[0-9.][eE][+-]?[0-9]{3}")
_HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]+")
_HUGE = re.compile(r"(?<![\d_.])[\d_.]+[eE][+-]?[\d_]{4}")
"""``1e9999999``, which Fraction and sympy write out, with the digits of any script, as Python reads them."""
_FRACTION = re.compile(r"[+-]?[0-9.]{1,400}([eE][+-]?[0-9]{1,3}|/[0-9]{1,400})?")
_NOT_FINITE = re.compile(r"nan|inf", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z]|[a-z]+")

# ---- the rule --------------------------------------------------------------------------------------------------------


def may_be_scored(answer: str, dataset: str) -> bool:
    """Whether the scorer of ``dataset`` may get ``answer``: where it evaluates answers this one keeps the grammar, no
    number in it has an exponent of four digits, and where NaN would pass for right there is none."""
    if has_huge_number(answer) or (dataset in NAN_PASSES and _NOT_FINITE.search(answer)):
        return False
    if dataset in LITERAL_SCORERS:
        return is_text_or_literal(answer)
    return dataset not in SYMPY_SCORERS or is_arithmetic(answer)


def has_huge_number(text: str) -> bool:
    """Whether a number in ``text`` has an exponent of four digits; the hexadecimal ``0x1e9999`` has none."""
    return _HUGE.search(_HEXADECIMAL.sub(" ", text)) is not None


def check_entry(entry: Mapping[str, Any], dataset: str) -> None:
    """DataError, by the field's name, where the scorer of ``dataset`` would evaluate a field that breaks its grammar,
    or build more than a count in the metadata may ask for.

    Fields that no scorer evaluates may hold any text.
    """
    metadata = entry.get("metadata")
    for key in COUNTS.get(dataset, ()):
        value: Any = metadata.get(key) if isinstance(metadata, Mapping) else None
        most = LONGEST_TEXT if key == "solution_length" else LARGEST_COUNT
        if not isinstance(value, int) or not 0 <= value <= most:
            raise DataError(
                f"column entry holds metadata.{key}={shortened(value)}, but reasoning-gym's {dataset} needs a whole "
                f"number from 0 to {most}; write the column with entry_text of rlhf_toolkit.rewards.gym"
            )
    read = EVALUATED_FIELDS.get(dataset) or WRITTEN_OUT.get(dataset) or {}
    for path, (keeps, grammar) in read.items():
        value = entry
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, str) or len(value) > LONGEST_TEXT or not keeps(value):
            raise DataError(
                f"column entry holds {'.'.join(path)}={shortened(value)}, which reasoning-gym's {dataset} would "
                f"evaluate and which is not {grammar}; write the column with entry_text of rlhf_toolkit.rewards.gym"
            )


# ---- grammars --------------------------------------------------------------------------------------------------------


def is_text_or_literal(answer: str) -> bool:
    """True for a literal, one plain word in capitals, or words and numbers that are no Python expression, which eval
    refuses.

    What is too deep for the parser here may not be too deep for eval, so that it counts as none of them.
    """
    try:
        tree = ast.parse(answer.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return _WORDS.fullmatch(answer) is not None
    except (RecursionError, MemoryError):
        return False
    if isinstance(tree, ast.Name):
        return re.fullmatch(r"[A-Z]+", answer.strip()) is not None
    try:
        ast.literal_eval(tree)
    except (TypeError, *UNPARSED):
        return False
    return True


def _is_number(text: str) -> bool:
    """Whether ``text`` is a number, or a fraction of two, that is quickly written out."""
    return _FRACTION.fullmatch(text.strip()) is not None and not has_huge_number(text)


def is_number_list(text: str) -> bool:
    """Whether ``text`` is a list of numbers or of their texts, as JSON or as Python writes it."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        try:
            value = ast.literal_eval(text.strip())
        except (TypeError, *UNPARSED):
            return False
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and all(isinstance(item, (int, float, str)) for item in value)


def _is_variable(text: str) -> bool:
    return _VARIABLE.fullmatch(text) is not None and text not in _FUNCTIONS and not _known_to_sympy(text)


def is_arithmetic(text: str) -> bool:
    """Whether ``text`` is an expression of numbers, variables, + - * / ** and common functions whose powers and numbers
    stay small: ``-34*x**8/15 + exp(x) + C``, not ``9**9**9``, ``exp(exp(9))``, ``1e999``, ``f.g`` or ``open('x')``.

    Letters are of ASCII, and a variable is one letter or a word that neither Python nor sympy knows.
    """
    if not _CHARACTERS.fullmatch(text) or _LONG_NUMERAL.search(text):
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        allowed = all(_allowed(node) for node in ast.walk(tree)) and _degree(tree) <= LARGEST_POWER
        return allowed and _numbers_stay_small(tree)
    except UNPARSED:
        return False


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS | _CONSTANTS or _is_variable(node.id)
    return isinstance(node, _ARITHMETIC)


@lru_cache(maxsize=1024)
def _known_to_sympy(word: str) -> bool:
    """Whether a word is more than a letter and means something where the scorer evaluates it."""
    return len(word) > 1 and any(hasattr(import_module(module), word) for module in ("builtins", "sympy"))


def _degree(node: ast.AST) -> float:
    """The largest product of exponents along one path; an exponent counts as the product of its numbers above 1, and
    as too large where it holds a power or a function."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        inside = list(ast.walk(node.right))
        if any(isinstance(part, (ast.Pow, ast.Call)) for part in inside):
            return math.inf
        numbers = [part.value for part in inside if isinstance(part, ast.Constant)]
        return _degree(node.left) * math.prod(max(1, abs(n)) for n in numbers if isinstance(n, (int, float)))
    return max((_degree(child) for child in ast.iter_child_nodes(node)), default=1)


# ---- how large numbers get, before anybody computes them -------------------------------------------------------------


def _numbers_stay_small(tree: ast.AST) -> bool:
    """Whether each part of an allowed tree that holds no variable, and is computed at once, has at most ``MOST_DIGITS``
    digits and asks no steep function for more than ``LARGEST_EXPONENTIAL`` of them."""
    if not isinstance(tree, ast.expr) or isinstance(tree, ast.Name):
        return True
    if any(isinstance(node, ast.Name) and node.id not in _FUNCTIONS | _CONSTANTS for node in ast.walk(tree)):
        return all(_numbers_stay_small(child) for child in ast.iter_child_nodes(tree))
    return _digits(tree) <= MOST_DIGITS


def _digits(node: ast.expr) -> float:
    """A bound on the decimal digits of numerator and denominator of a tree without variables."""
    if isinstance(node, ast.Constant):
        return len(repr(node.value)) + (100 if "e" in repr(node.value) else 0)
    if isinstance(node, ast.UnaryOp):
        return _digits(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _digits(node.left), _digits(node.right)
        if isinstance(node.op, ast.Pow):
            return left * max(1.0, _degree(ast.BinOp(ast.Constant(1), ast.Pow(), node.right)))
        return left + right + 1
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        argument = max((_digits(part) for part in node.args), default=0.0)
        if node.func.id not in _STEEP:
            return argument
        return 10.0**argument if argument <= LARGEST_EXPONENTIAL else math.inf
    return 1.0


# ---- whole-number arithmetic -----------------------------------------------------------------------------------------


def is_whole_arithmetic(text: str) -> bool:
    """Whether ``text`` is an expression of whole numbers, + - * << >> and parentheses whose parts stay below
    ``MOST_BITS`` bits."""
    try:
        _whole(ast.parse(text.strip(), mode="eval").body)
    except UNPARSED:
        return False
    return True


def _whole(node: ast.expr) -> int:
    """The value. Raises ValueError for another kind of expression, and before a part gets too large."""
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value.bit_length() <= MOST_BITS:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_whole(node.operand) if isinstance(node.op, ast.USub) else _whole(node.operand)
    if not isinstance(node, ast.BinOp):
        raise ValueError("no whole-number arithmetic")
    left, right = _whole(node.left), _whole(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult) and left.bit_length() + right.bit_length() <= MOST_BITS:
        return left * right
    if isinstance(node.op, ast.LShift) and 0 <= right <= MOST_BITS - left.bit_length():
        return left << right
    if isinstance(node.op, ast.RShift) and 0 <= right <= MOST_BITS:
        return left >> right
    raise ValueError("another operator, or a number too large")


Fields = dict[tuple[str, ...], tuple[Callable[[str], bool], str]]
"""Path of a field in an entry -> the grammar it must keep, and the grammar's name."""
_EXPRESSION = (is_arithmetic, "plain arithmetic")
_INTEGRAL: Fields = {
    ("metadata", "integrand"): _EXPRESSION,
    ("metadata", "variable"): (_is_variable, "the name of a variable"),
}
EVALUATED_FIELDS: dict[str, Fields] = {
    "bitwise_arithmetic": {("metadata", "problem"): (is_whole_arithmetic, "arithmetic of whole numbers")},
    "intermediate_integration": _INTEGRAL,
    "number_sorting": {("answer",): (is_number_list, "a list of numbers")},
    "polynomial_multiplication": {("answer",): _EXPRESSION},
    "simple_integration": _INTEGRAL,
}
"""Dataset -> the fields of its entries that its scorer evaluates."""
WRITTEN_OUT: dict[str, Fields] = {"coin_flip": {("answer",): (_is_number, "a number")}}
"""Dataset -> the fields of which its scorer makes an exact fraction."""
COUNTS = {"rubiks_cube": ("cube_size",), "tower_of_hanoi": ("num_disks", "num_pegs", "solution_length")}
"""Dataset -> the keys of an entry's metadata that say how much its scorer builds."""
