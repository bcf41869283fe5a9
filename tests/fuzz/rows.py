"""Dataset rows of odd shapes."""

from __future__ import annotations

import random
from typing import Any

TEXTS = (
    "w1",
    "w1 w2 w3",
    "w27 w0",
    "",
    " ",
    "\n",
    "unknown words only",
    "w1 " * 3000,
    "\U0001f600\u202e\x00w1",
    "\ud800 lone",
    "</s>",
    "w1 </s> w2",
    "<user> w1 <assistant>",
    "{{ 7 * 7 }}",
    "\x1b[2J w3",
)
SOUND = ("w1", "w1 w2 w3", "w27 w0", "w5 w6", "w2 w9 w4", "w8", "w11 w12")
ROLES = ("user", "assistant", "system", "tool", "", "User", None, 7, "\U0001f600")
ODD: tuple[Any, ...] = (None, 0, -1, 1.5, True, [], {}, [[]], {"role": "user"}, 2**70, float("nan"), "2024-01-01")


def sound(kind: str, number: int) -> dict[str, Any]:
    """Row ``number`` as it should be."""
    said = [SOUND[(number + step) % len(SOUND)] for step in range(3)]
    if kind == "ppo":
        return {"prompt": said[0], "level": number}
    if kind == "sft":
        return {"prompt": said[0], "completion": f" {said[1]}"}
    return {"prompt": said[0], "chosen": f" {said[1]}", "rejected": f" {said[2]}"}


def odd_rows(kind: str, random: random.Random) -> list[dict[str, Any]]:
    """Some rows of one odd shape, or sound ones among which some are odd."""
    shape = random.choice((odd_texts, odd_values, other_columns, conversations, few, spoiled))
    return shape(kind, random)


def odd_texts(kind: str, random: random.Random) -> list[dict[str, Any]]:
    """Texts that are empty, long, or hold what a tokenizer or a terminal takes amiss."""
    return [
        {name: random.choice(TEXTS) if isinstance(value, str) else value for name, value in sound(kind, number).items()}
        for number in range(8)
    ]


def odd_values(kind: str, random: random.Random) -> list[dict[str, Any]]:
    """One value everywhere in a column."""
    name, value = random.choice(list(sound(kind, 0))), random.choice(ODD)
    return [{**sound(kind, number), name: value} for number in range(8)]


def spoiled(kind: str, random: random.Random) -> list[dict[str, Any]]:
    """Sound rows, and one that differs."""
    rows = [sound(kind, number) for number in range(8)]
    spoiled, name = random.choice(rows), random.choice(list(rows[0]))
    if random.random() < 0.3:
        del spoiled[name]
    else:
        spoiled[name] = random.choice((*ODD, *TEXTS))
    return rows


def other_columns(kind: str, random: random.Random) -> list[dict[str, Any]]:
    """Columns are missing, or there are more, of names that mean something."""
    more = random.choice(("prompts", "responses", "tokens", "", "messages", "text", "margin", "\U0001f600", "response"))
    rows = [{**sound(kind, number), more: random.choice((*ODD, *TEXTS))} for number in range(8)]
    if random.random() < 0.5:
        gone = random.choice(list(sound(kind, 0)))
        rows = [{name: value for name, value in row.items() if name != gone} for row in rows]
    return rows


def conversations(kind: str, random: random.Random) -> list[dict[str, Any]]:
    """Messages of odd roles and contents in place of texts."""
    orderly = random.random() < 0.5

    def messages(ends_with: str) -> list[dict[str, Any]]:
        count = random.randrange(0, 4)
        if orderly:
            roles = ["user" if number % 2 == 0 else "assistant" for number in range(2 * count + 1)]
            return [
                {"role": role, "content": random.choice(SOUND)}
                for role in (roles if ends_with == "user" else [*roles, "assistant"])
            ]
        return [{"role": random.choice(ROLES), "content": random.choice((*TEXTS, None, 3))} for _ in range(count)]

    if kind == "sft" and random.random() < 0.6:
        return [{"messages": messages("assistant")} for _ in range(6)]
    return [
        {name: messages("user") if name == "prompt" else value for name, value in sound(kind, number).items()}
        for number in range(6)
    ]


def few(kind: str, random: random.Random) -> list[dict[str, Any]]:
    """No row, or one or two."""
    return [sound(kind, number) for number in range(random.randrange(0, 3))]
