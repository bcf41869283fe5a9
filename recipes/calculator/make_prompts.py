"""Write the sums: `python recipes/calculator/make_prompts.py` gives the same bytes every time.

Two numbers from 12 to 99 under +, - or *, 256 to train on and 32 held out, none twice. Before each stand two sums that
somebody has worked out with the tool: a model of this size does not follow an instruction, but it follows examples.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TRAIN, HELD_OUT = 256, 32


def worked(left: int, operation: str, right: int, value: int) -> list[dict[str, str]]:
    """The messages of a sum that was worked out with the tool."""
    call, told = f"CALC: {left} {operation} {right}", f"ANSWER: {value}"
    return [
        {"role": "user", "content": f"What is {left} {operation} {right}?"},
        {"role": "assistant", "content": call},
        {"role": "tool", "content": str(value)},
        {"role": "assistant", "content": told},
    ]


EXAMPLES = [*worked(8, "+", 5, 13), *worked(104, "-", 11, 93)]


def rows(seed: int = 0) -> list[dict[str, Any]]:
    """All rows, in random order."""
    drawn, sums = random.Random(seed), dict[str, int]()
    while len(sums) < TRAIN + HELD_OUT:
        left, right = drawn.randint(12, 99), drawn.randint(12, 99)
        operation, value = drawn.choice([("+", left + right), ("-", left - right), ("*", left * right)])
        sums[f"{left} {operation} {right}"] = value
    return [
        {"prompt": [*EXAMPLES, {"role": "user", "content": f"What is {sum_}?"}], "answer": str(value)}
        for sum_, value in sums.items()
    ]


def main() -> None:
    folder, found = Path(__file__).parent, rows()
    for name, part in {"train": found[:TRAIN], "heldout": found[TRAIN:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


if __name__ == "__main__":
    main()
