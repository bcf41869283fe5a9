"""Write the sums: `python recipes/calculator/make_prompts.py` gives the same bytes every time.

Two numbers from 12 to 99 under +, - or *, 256 to train on and 32 held out, none twice.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

TRAIN, HELD_OUT = 256, 32


def rows(seed: int = 0) -> list[dict[str, str]]:
    """All rows, in random order."""
    drawn, sums = random.Random(seed), dict[str, int]()
    while len(sums) < TRAIN + HELD_OUT:
        left, right = drawn.randint(12, 99), drawn.randint(12, 99)
        operation, value = drawn.choice([("+", left + right), ("-", left - right), ("*", left * right)])
        sums[f"{left} {operation} {right}"] = value
    return [{"prompt": f"What is {sum_}?", "answer": str(value)} for sum_, value in sums.items()]


def main() -> None:
    folder, found = Path(__file__).parent, rows()
    for name, part in {"train": found[:TRAIN], "heldout": found[TRAIN:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


if __name__ == "__main__":
    main()
