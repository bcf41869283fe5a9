"""A tool, and a reward that sees how it was used: a sum is to be worked out by a calculator, which answers between the
policy's turns, and the result is to be told."""

from __future__ import annotations

import ast
import operator
import re
from typing import Any

CALL = re.compile(r"CALC:\s*([\d\s+*()-]{1,60})")
ANSWER = re.compile(r"ANSWER:\s*(-?\d+)")
OPERATORS: dict[type[ast.operator], Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
LARGEST = 10**12


def calculator(prompts: list[str], responses: list[str], turns: list[Any], **columns: Any) -> list[Any]:
    """A message with the value of what the policy's newest turn asks for; None, the end, where it asks for nothing."""
    asked = [CALL.search(messages[-1]["content"]) for messages in turns]
    return [call and {"role": "tool", "content": value_of(call[1])} for call in asked]


def solved(
    prompts: list[str], responses: list[str], answer: list[str], turns: list[Any], **columns: Any
) -> list[float]:
    """0.2 for a call, 0.3 more where the tool's first value is the sum's, 0.5 more where the last turn says it."""
    return [score(messages, right) for messages, right in zip(turns, answer, strict=True)]


def score(messages: list[dict[str, Any]], right: str) -> float:
    """Of one response, of which the messages are the policy's (role assistant) and the tool's."""
    values = [message["content"] for message in messages if message["role"] == "tool"]
    told = ANSWER.search(messages[-1]["content"])
    called, found = bool(values), values[:1] == [right]
    return 0.2 * called + 0.3 * found + 0.5 * (found and told is not None and told[1] == right)


def value_of(expression: str) -> str:
    """What whole numbers under +, - and * come to, or that it cannot be worked out. Nothing is ever run as code."""
    try:
        return str(worked_out(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error"


def worked_out(node: ast.expr) -> int:
    """The value of a parsed expression. Raises ValueError for what is none, and for more than ``LARGEST``."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -worked_out(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](worked_out(node.left), worked_out(node.right))
    else:
        raise ValueError(f"{type(node).__name__} is no part of a sum")
    if abs(value) > LARGEST:
        raise ValueError("too large")
    return value
