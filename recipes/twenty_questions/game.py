"""Twenty questions about a number: the policy asks whether it is above another, hears yes or no, and names it."""

from __future__ import annotations

import re
from typing import Any

QUESTION, NAMED = re.compile(r"ABOVE (\d{1,9})"), re.compile(r"EQUALS (\d{1,9})")


def game_master(
    prompts: list[str], responses: list[str], turns: list[Any], secret: list[int], **columns: Any
) -> list[Any]:
    """The user's answer to each newest question; None, the end, where there is none or the number has been named."""
    return [answer(messages[-1]["content"], number) for messages, number in zip(turns, secret, strict=True)]


def answer(text: str, number: int) -> dict[str, str] | None:
    """To a question Yes. or No., to a wrong number No.; nothing to the right one, or to anything else."""
    if asked := QUESTION.search(text):
        return {"role": "user", "content": "Yes." if number > int(asked[1]) else "No."}
    named = NAMED.search(text)
    return {"role": "user", "content": "No."} if named and int(named[1]) != number else None


def found(
    prompts: list[str],
    responses: list[str],
    low: list[int],
    high: list[int],
    secret: list[int],
    turns: list[Any],
    **columns: Any,
) -> list[float]:
    """1 where the number is named, and 0.1 for each question that left fewer numbers over than before."""
    return [score(*about) for about in zip(turns, low, high, secret, strict=True)]


def score(messages: list[dict[str, Any]], low: int, high: int, secret: int) -> float:
    """Of one game about a number from ``low`` to ``high``, both among those that are possible."""
    worth = 0.0
    for message in messages:
        text = message["content"] if message["role"] == "assistant" else ""
        if asked := QUESTION.search(text):
            limit = int(asked[1])
            worth += 0.1 * (low <= limit < high)
            low, high = (max(low, limit + 1), high) if secret > limit else (low, min(high, limit))
        elif named := NAMED.search(text):
            worth += int(named[1]) == secret
    return worth
