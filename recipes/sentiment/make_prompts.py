"""Write the prompts of the sentiment task: `python recipes/sentiment/make_prompts.py` gives the same bytes every time.

16 things x 8 places are 128 prompts. Held out is, for the thing with index i, its prompt at place i mod 8: each thing
once and each place twice among 16 held-out prompts, each thing 7 times and each place 14 times among 112 training ones.
"""

from __future__ import annotations

import json
from pathlib import Path

THINGS = (
    "a train station at night",
    "the town museum",
    "a used laptop",
    "the new bakery",
    "a rainy holiday",
    "the school canteen",
    "an old bicycle",
    "a crowded beach",
    "the hotel lobby",
    "a mystery novel",
    "the city bus",
    "a garden chair",
    "the corner shop",
    "a winter coat",
    "the local library",
    "a phone charger",
)
PLACES = (
    "in March",
    "for a friend",
    "after one week",
    "for the newspaper",
    "as a tourist",
    "on a budget",
    "in a hurry",
    "with my family",
)


def prompt(thing: str, place: str) -> str:
    """The user message for one thing at one place."""
    return f"Write a one-sentence review of {thing} {place}."


def split() -> dict[str, list[str]]:
    """File name -> its prompts, things in the outer and places in the inner order."""
    files: dict[str, list[str]] = {"train.jsonl": [], "heldout.jsonl": []}
    for i, thing in enumerate(THINGS):
        for j, place in enumerate(PLACES):
            files["heldout.jsonl" if j == i % len(PLACES) else "train.jsonl"].append(prompt(thing, place))
    return files


def write(folder: Path) -> None:
    """Write train.jsonl and heldout.jsonl into `folder`, one {"prompt": ...} a line, UTF-8, "\\n" on every system."""
    for name, prompts in split().items():
        (folder / name).write_bytes("".join(json.dumps({"prompt": text}) + "\n" for text in prompts).encode())


if __name__ == "__main__":
    write(Path(__file__).parent)
