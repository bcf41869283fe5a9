"""Countdown: reach a target from given numbers with + - * /, each used once (TinyZero's task of R1-Zero)."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rlhf_toolkit.errors import DataError, shortened
from rlhf_toolkit.rewards.texts import LARGEST_NUMBER, each, fraction, last_tagged

LONGEST_EXPRESSION = 256
"""Characters. It bounds the work: without powers a value has at most as many digits as its text."""
_ALPHABET = re.compile(r"[0-9+\-*/() ]+")
_SAME = str.maketrans({"\u2212": "-", "\u00d7": "*", "\u00f7": "/", "\n": " ", "\t": " ", "\r": " "})


def countdown(
    prompts: list[str],
    responses: list[str],
    *,
    numbers: Sequence[Sequence[int]],
    target: Sequence[Any],
    format_score: float = 0.1,
    use_all: bool = True,
    **columns: Any,
) -> list[float]:
    """1.0 where the last ``<answer>...</answer>`` holds an expression that equals ``target``, exactly, over fractions.

    The expression may hold whole numbers, + - * / (also the signs U+2212, U+00D7 and U+00F7), a sign before a number
    and parentheses. Its numbers must be those of ``numbers``, each exactly once, or with ``use_all: false`` at most
    once. ``format_score`` where such an expression is there and wrong: another value, another number, a division by
    zero. 0.0 for everything else: no closed tag, text or an equals sign in it, powers, ``//``, decimals, names, calls,
    more than ``LONGEST_EXPRESSION`` characters. The text is parsed, never evaluated by Python.

    Columns: ``numbers``, each a list of positive integers; ``target``, a number or its text. DataError for other
    values. Source: TinyZero (Pan et al. 2025), ``countdown.py``, which gives ``format_score`` for any text in the tag
    and compares floats to 1e-5.
    """
    rows = zip(
        responses,
        each(numbers, responses, "numbers", "countdown"),
        each(target, responses, "target", "countdown"),
        strict=True,
    )
    return [_score(response, have, goal, format_score, use_all) for response, have, goal in rows]


def _score(response: str, numbers: Any, target: Any, format_score: float, use_all: bool) -> float:
    listed = isinstance(numbers, Sequence) and not isinstance(numbers, (str, bytes))
    if not listed or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers):
        raise DataError(f"countdown got numbers={shortened(numbers)}; give a list of positive integers")
    have, goal = Counter(numbers), fraction(target)
    if goal is None:
        raise DataError(f"countdown got target={shortened(target)}; give a number of at most {LARGEST_NUMBER} digits")
    expression = parsed(last_tagged(response, "answer") or "")
    if expression is None:
        return 0.0
    used = Counter(node.value for node in ast.walk(expression) if isinstance(node, ast.Constant))
    allowed = used == have if use_all else used <= have
    return 1.0 if allowed and _value(expression) == goal else format_score


def parsed(text: str) -> ast.expr | None:
    """``text`` as a tree of whole numbers, + - * / and signs; None where it is anything else or too long."""
    text = text.translate(_SAME).strip()
    if len(text) > LONGEST_EXPRESSION or not _ALPHABET.fullmatch(text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: parentheses too deep
        return None
    return tree if all(isinstance(node, _NODES) for node in ast.walk(tree)) else None


_NODES = (ast.BinOp, ast.UnaryOp, ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.UAdd)


def _value(node: ast.AST) -> Fraction | None:
    """The value of a tree that ``parsed`` gave; None where it divides by zero."""
    if isinstance(node, ast.Constant):
        return Fraction(int(str(node.value)))
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand)
        return -value if value is not None and isinstance(node.op, ast.USub) else value
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left), _value(node.right)
    if left is None or right is None or (isinstance(node.op, ast.Div) and right == 0):
        return None
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    return left * right if isinstance(node.op, ast.Mult) else left / right
