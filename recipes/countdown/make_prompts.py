"""Write prompts of the countdown task: `python recipes/countdown/make_prompts.py` gives the same bytes every time.

Each line of train.jsonl and heldout.jsonl has `prompt`, `numbers`, `target` and `solution`, one expression that reaches
the target. No problem, numbers in any order and target, occurs twice, in one file or in both.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]

COUNTS = (3, 4)
NUMBERS = (1, 99)
TARGETS = (10, 99)
PROMPT = (
    "Using the numbers {numbers}, create an expression that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number must be used exactly once. Show your work in <think> </think> tags, and return the "
    "final expression in <answer> </answer> tags, for example <think> 1 + 2 = 3 and 3 / 3 = 1 </think> "
    "<answer> (1 + 2) / 3 </answer>."
)
TRIES = 100
"""Draws for each problem wanted, before the task counts as too small; about one in eighteen is a problem."""


class PromptsError(Exception):
    """The files cannot be made; the message is one line and says the way out."""


def expression(numbers: list[int], rng: random.Random) -> tuple[str, int] | None:
    """A random expression that uses each of `numbers` once, and its value; None where a step gives none above 0."""
    parts = [(str(number), number) for number in numbers]
    while len(parts) > 1:
        (left, a), (right, b) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice("+-*/")
        if (sign == "-" and a <= b) or (sign == "/" and a % b):
            return None
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        parts.append((f"({left} {sign} {right})", value))
    text, value = parts[0]
    return text.removeprefix("(").removesuffix(")"), value


def problem(rng: random.Random) -> Row | None:
    """One random problem as a row; None where what was drawn is none."""
    numbers = [rng.randint(*NUMBERS) for _ in range(rng.choice(COUNTS))]
    found = expression(numbers, rng)
    if found is None or not TARGETS[0] <= found[1] <= TARGETS[1]:
        return None
    solution, target = found
    prompt = PROMPT.format(numbers=numbers, target=target)
    return {"prompt": prompt, "numbers": numbers, "target": target, "solution": solution}


def split(*, train: int, heldout: int, seed: int) -> dict[str, list[Row]]:
    """File name -> its rows: the first `heldout` distinct problems are held out, the next `train` are for training.

    Raises PromptsError where `TRIES` draws for each do not give as many.
    """
    rng, wanted = random.Random(f"countdown {seed}"), heldout + train
    found: dict[tuple[Any, ...], Row] = {}
    for _ in range(TRIES * wanted):
        if len(found) == wanted:
            break
        row = problem(rng)
        if row is not None:
            found.setdefault((row["target"], *sorted(row["numbers"])), row)
    if len(found) < wanted:
        raise PromptsError(f"found {len(found)} distinct problems, {wanted} are wanted: lower --train or --heldout")
    rows = list(found.values())
    return {"heldout.jsonl": rows[:heldout], "train.jsonl": rows[heldout:]}


def write(folder: Path, files: dict[str, list[Row]]) -> None:
    """Write each file's rows into `folder`, one JSON object a line, UTF-8, "\\n" on every system."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / name).write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


def main() -> None:
    """Write the files; exit with status 1 and one line on PromptsError."""
    parser = argparse.ArgumentParser(description="Write prompts of the countdown task.")
    parser.add_argument("--train", type=int, default=8192, help="training problems; default: %(default)s")
    parser.add_argument("--heldout", type=int, default=256, help="held-out problems; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="default: %(default)s")
    given = parser.parse_args()
    try:
        write(given.to, split(train=given.train, heldout=given.heldout, seed=given.seed))
    except PromptsError as error:
        sys.exit(f"make_prompts: {error}")


if __name__ == "__main__":
    main()
