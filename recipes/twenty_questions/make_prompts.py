"""Write the games: `python recipes/twenty_questions/make_prompts.py` gives the same bytes every time.

Sixteen numbers in a row, one of them the secret: 128 games to train on and 32 held out, none twice. Before each stands
a game that somebody has played: a model of this size does not follow an instruction, but it follows an example.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TRAIN, HELD_OUT, NUMBERS, LARGEST = 128, 32, 16, 64


def asked(low: int) -> str:
    """How a game begins."""
    return f"I am thinking of a number from {low} to {low + NUMBERS - 1}. Which is it?"


MOVES = ["ABOVE 76", "Yes.", "ABOVE 80", "No.", "ABOVE 78", "Yes.", "ABOVE 79", "No.", "EQUALS 79"]
EXAMPLE = [
    {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate([asked(69), *MOVES])
]


def rows(seed: int = 0) -> list[dict[str, Any]]:
    """All rows, in random order."""
    drawn = random.Random(seed)
    games = [(low, low + place) for low in range(1, LARGEST - NUMBERS + 2) for place in range(NUMBERS)]
    return [
        {
            "prompt": [*EXAMPLE, {"role": "user", "content": asked(low)}],
            "low": low,
            "high": low + NUMBERS - 1,
            "secret": secret,
        }
        for low, secret in drawn.sample(games, TRAIN + HELD_OUT)
    ]


def main() -> None:
    folder, found = Path(__file__).parent, rows()
    for name, part in {"train": found[:TRAIN], "heldout": found[TRAIN:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


if __name__ == "__main__":
    main()
