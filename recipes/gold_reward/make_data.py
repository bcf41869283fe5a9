"""The data of the gold-reward experiment: prompts, then examples and pairs out of sampled responses.

python recipes/gold_reward/make_data.py prompts FOLDER
python recipes/gold_reward/make_data.py examples RESPONSES PROMPTS OUT
python recipes/gold_reward/make_data.py pairs RESPONSES PROMPTS OUT
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

THINGS = (
    *("a train station at night", "the town museum", "a used laptop", "the new bakery", "a rainy holiday"),
    *("the school canteen", "an old bicycle", "a crowded beach", "the hotel lobby", "a mystery novel", "the city bus"),
    *("a garden chair", "the corner shop", "a winter coat", "the local library", "a phone charger", "a street market"),
    *("the dentist", "a board game", "the airport cafe", "a cheap umbrella", "the village pub", "a morning run"),
    *("the post office", "a silent film", "the swimming pool", "a pair of boots", "the night ferry", "a cooking class"),
    *("the car park", "a radio play", "the botanical garden"),
)
OCCASIONS = (
    *("in March", "for a friend", "after one week", "for the newspaper", "as a tourist", "on a budget", "in a hurry"),
    *("with my family", "on a Monday", "after a long day", "for a neighbour", "in the rain"),
)
GROUP = 4
"""Responses of which the best and the worst make a pair."""
SENTENCE = re.compile(r"\s*(\S.*?[.!?])(?=\s|$)", re.DOTALL)
WORD = re.compile("[a-z]+")
SHORTEST = 5
"""Words of a sentence that is worth learning from."""

Row = dict[str, Any]


def split() -> dict[str, list[Row]]:
    """File name -> its prompts. Held out are, for the thing with index i, those at places i and i + 5 mod 12."""
    files: dict[str, list[Row]] = {"train.jsonl": [], "heldout.jsonl": []}
    for i, thing in enumerate(THINGS):
        for j, occasion in enumerate(OCCASIONS):
            held_out = j in (i % len(OCCASIONS), (i + 5) % len(OCCASIONS))
            row = {"prompt": f"Write a one-sentence review of {thing} {occasion}."}
            files["heldout.jsonl" if held_out else "train.jsonl"].append(row)
    return files


def names_the_thing(prompts: list[str], responses: list[str], **columns: object) -> list[float]:
    """A reward that only watches: 1.0 where a response has a word of four letters or more of the thing that it should
    review, else 0.0. Neither proxy nor gold asks for that."""
    return [float(_shares_a_word(prompt, response)) for prompt, response in zip(prompts, responses, strict=True)]


def _shares_a_word(prompt: str, response: str) -> bool:
    thing = next(thing for thing in THINGS if f" of {thing} " in prompt)
    return bool({word for word in WORD.findall(thing) if len(word) > 3} & set(WORD.findall(response.lower())))


def first_sentence(response: str) -> str | None:
    """The first sentence, None where there is no whole one of ``SHORTEST`` words."""
    found = SENTENCE.match(response)
    return found[1] if found and len(found[1].split()) >= SHORTEST else None


def examples(responses: Iterable[Row], prompts: list[Row], dropped: Counter[str]) -> Iterator[Row]:
    """The prompt and the first sentence of each response."""
    for said in responses:
        sentence = first_sentence(said["response"])
        if sentence is None:
            dropped["without a whole sentence"] += 1
        else:
            yield {**prompts[said["row"]], "response": sentence}


def pairs(responses: Iterable[Row], prompts: list[Row], dropped: Counter[str]) -> Iterator[Row]:
    """Of every ``GROUP`` responses to one prompt the one with the highest score and the one with the lowest.

    Left out are responses that were cut off or are empty, whose end says nothing, and groups with one score only.
    """
    of_prompt: dict[int, list[Row]] = {}
    for said in responses:
        if not (said["finished"] and said["response"].strip()):
            dropped["responses cut off or empty"] += 1
        else:
            of_prompt.setdefault(said["row"], []).append(said)
    for row, group in of_prompt.items():
        dropped["responses left over"] += len(group) % GROUP
        for start in range(0, len(group) - GROUP + 1, GROUP):
            ranked = sorted(group[start : start + GROUP], key=lambda said: said["score"])
            worst, best = ranked[0], ranked[-1]
            if best["score"] == worst["score"]:
                dropped["groups of one score"] += 1
            else:
                yield {**prompts[row], "chosen": best["response"], "rejected": worst["response"]}


# ---- files -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[Row]) -> int:
    """Write JSON lines under another name and rename them, so that the file is whole or not there."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text("".join(lines), encoding="utf-8")
    unfinished.rename(path)
    return len(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prompts").add_argument("folder", type=Path)
    for name in ("examples", "pairs"):
        command = commands.add_parser(name)
        for argument in ("responses", "prompts", "out"):
            command.add_argument(argument, type=Path)
    options = parser.parse_args(arguments)
    if options.command == "prompts":
        for name, rows in split().items():
            print(f"{options.folder / name}: {write(options.folder / name, rows)} prompts")
        return
    dropped: Counter[str] = Counter()
    make = examples if options.command == "examples" else pairs
    count = write(options.out, make(read(options.responses), read(options.prompts), dropped))
    print(f"{options.out}: {count} {options.command}; dropped: {dict(+dropped) or 'nothing'}")
    if not count:
        sys.exit(f"make_data: {options.responses} gives no {options.command}")


if __name__ == "__main__":
    main()
