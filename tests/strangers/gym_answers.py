"""reasoning-gym: hostile answers to every scorer, and hostile text and values in every field of entry and config."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from reasoning_gym import factory

from rlhf_toolkit.rewards.gym import BY_EQUALITY, entry_text, reasoning_gym
from tests.strangers import frame, payloads

COUNT, LIMIT = 3780, 10.0
"""36 cases for each of 105 scorers, two thirds of them answers."""
NAMES = sorted(set(factory.DATASETS) - {"composite"})
Path = tuple[Any, ...]
SETTINGS = ("size", "seed", "data_file", "__class__", "self", "name")


@dataclass(frozen=True)
class Case:
    """One answer to one entry. ``where`` says what is hostile."""

    where: str
    dataset: str
    answer: str
    entry: str
    config: str = "{}"


@cache
def _entry(name: str) -> dict[str, Any]:
    found: dict[str, Any] = factory.create_dataset(name, size=1, seed=7)[0]
    return found


def cases(seed: int, count: int) -> list[Case]:
    """``count`` cases, or fewer: two thirds are answers, evenly over the scorers, the others entries and configs."""
    chance = random.Random(f"gym_answers {seed}")
    found: list[Case] = []
    each = max(1, count // len(NAMES))
    names = NAMES if count >= len(NAMES) else chance.sample(NAMES, count)
    for name in names:
        entry = _entry(name)
        text, places = entry_text(entry), list(_places(entry))
        for _ in range(max(1, each * 2 // 3)):
            kind, answer = payloads.text(chance)
            found.append(Case(f"answer, {kind}", name, answer, text))
        for _ in range(each - each * 2 // 3):
            found.append(_hostile_row(chance, name, entry, places))
    chance.shuffle(found)
    return found


def _hostile_row(chance: random.Random, name: str, entry: dict[str, Any], places: list[Path]) -> Case:
    own = entry["answer"] if isinstance(entry["answer"], str) else "1"
    if chance.random() < 0.2:
        value = chance.choice([payloads.text(chance)[1], chance.choice(payloads.VALUES), chance.choice(payloads.CODE)])
        known = [each.name for each in fields(type(factory.create_dataset(name, size=1, seed=7).config))]
        config = json.dumps({chance.choice([*known, *known, *SETTINGS]): value})
        return Case("config", name, own, entry_text(entry), config)
    kind, value = payloads.text(chance)
    if chance.random() < 0.4:
        kind, value = "value", chance.choice(payloads.VALUES)
    path = ("answer",) if chance.random() < 0.2 else chance.choice(places)
    hostile = _planted(entry, path, value)
    answer = chance.choice([own, own, "1", payloads.text(chance)[1]])
    return Case(f"entry {path}, {kind}", name, answer, json.dumps(_as_json(hostile)))


def _as_json(entry: Any) -> Any:
    return json.loads(entry_text(entry))


def _places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in ``value``; of a list its first and last."""
    if isinstance(value, dict):
        for key in list(value)[:12]:
            yield (*path, key)
            yield from _places(value[key], (*path, key))
    elif isinstance(value, (list, tuple)) and len(path) < 4:
        for index in sorted({0, len(value) - 1} if value else ()):
            yield (*path, index)
            yield from _places(value[index], (*path, index))


def _planted(value: Any, path: Path, payload: Any) -> Any:
    if not path:
        return payload
    step, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {key: _planted(item, rest, payload) if key == step else item for key, item in value.items()}
    return type(value)(_planted(item, rest, payload) if index == step else item for index, item in enumerate(value))


_said = [""]


def detail() -> str:
    """More about the last case."""
    return _said[0]


def run(case: Case) -> str:
    """Score one answer. Right is a number of at most 1, and below it for what is no answer, or an RLHFError."""
    payloads.notice_evaluation()
    columns: dict[str, Any] = {"entry": [case.entry], "dataset": [case.dataset], "config": [case.config]}
    score = reasoning_gym(["p"], [case.answer], **columns)[0]
    _said[0] = f"scored {score}"
    if not (math.isfinite(score) and -1 <= score <= 1):
        return frame.WRONGLY
    is_answer = case.answer == _entry(case.dataset)["answer"] or case.dataset in BY_EQUALITY
    if case.where.startswith("answer") and score >= 1.0 and not is_answer:
        return frame.WRONGLY
    return frame.RIGHTLY
