"""Rewards of reasoning-gym: a hundred procedural tasks, each with a scorer of its own."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import lru_cache
from typing import Any

from rlhf_toolkit.errors import ConfigError, DataError, described, nearest, shortened
from rlhf_toolkit.files import is_plain_name
from rlhf_toolkit.rewards.gym_texts import LONGEST_TEXT, check_entry, may_be_scored
from rlhf_toolkit.rewards.texts import each, last_tagged, optional_library

BY_EQUALITY = frozenset({"game_of_life_halting"})
"""Datasets whose scorer (of 0.1.25) takes any text for right: it compares ``bool`` of two texts."""
LARGEST_SIEVE = {"count_primes": 10**6}
"""Datasets that list all numbers up to their setting ``max_n`` when they are built."""

# ---- the reward ------------------------------------------------------------------------------------------------------


def reasoning_gym(
    prompts: list[str],
    responses: list[str],
    *,
    entry: Sequence[str],
    dataset: Sequence[str],
    answer_tags: bool = False,
    exact: bool = False,
    **columns: Any,
) -> list[float]:
    """The score that reasoning-gym's own ``score_answer(answer, entry)`` gives, mostly in [0, 1]; 1.0 is right.

    The answer is the whole response, stripped, or with ``answer_tags`` the last closed ``<answer>...</answer>``. Scores
    between 0 and 1 are the library's: many tasks give something for the right answer inside a longer text, some 0.01
    for any text. ``exact`` gives 0.0 for all of them and 1.0 from a score of 1 on.

    Scored 0.0 without asking the library: no answer, an empty one, one longer than ``LONGEST_TEXT`` characters, one on
    which the scorer raises although it scores the entry's own answer, one with a number such as 1e9999, NaN where it
    would pass for right, and, where the scorer hands the text to ``eval``, anything but a Python literal or plain
    arithmetic (``gym_texts``): neither a model nor a row must run code. Such an answer scores 1.0 all the same where it
    is the entry's own letter for letter, and so it is with all answers to ``BY_EQUALITY``. A few scorers have no time
    limit and swallow signals, so let it run in workers.

    Columns: ``entry``, the dataset's item as ``entry_text`` writes it; ``dataset``, its name in reasoning-gym;
    ``config``, optional, the JSON text of the settings it was built with. DataError for other values, such as a field
    of the entry that the scorer evaluates and that is no number, list or formula. Needs the tasks extra
    (``reasoning-gym``), else ConfigError. Source: Stojanovski et al. 2025, "Reasoning Gym".
    """
    optional_library("reasoning_gym", "reasoning_gym")
    given = columns.get("config", ["{}"] * len(responses))  # no parameter: a column never binds to one with a default
    configs = each(given, responses, "config", "reasoning_gym")
    rows = zip(
        responses,
        each(entry, responses, "entry", "reasoning_gym"),
        each(dataset, responses, "dataset", "reasoning_gym"),
        configs,
        strict=True,
    )
    for value in (*dataset, *configs):
        if not isinstance(value, str):
            raise DataError(f"columns dataset and config hold {shortened(value)}, which is no text; repair that row")
    scores = [
        _score(last_tagged(response, "answer") if answer_tags else response.strip(), entry_of(item), name, settings)
        for response, item, name, settings in rows
    ]
    return [float(score >= 1.0) for score in scores] if exact else scores


def _score(answer: str | None, entry: dict[str, Any], name: str, config: str) -> float:
    scorer = _dataset(name, config)
    check_entry(entry, name)
    if not answer or len(answer) > LONGEST_TEXT:
        return 0.0
    if name in BY_EQUALITY or not may_be_scored(answer, name):
        return float(answer == entry["answer"])
    try:
        with redirect_stdout(None):  # some scorers print the answer as it is
            score = float(scorer.score_answer(answer, entry))
    except Exception as error:  # several scorers raise on an answer of another form, which is a wrong answer
        _check_scorable(scorer, entry, name, error)
        return 0.0
    return max(-1.0, min(score, 1.0)) if math.isfinite(score) else 0.0


def _check_scorable(scorer: Any, entry: dict[str, Any], name: str, cause: Exception) -> None:
    """DataError where the scorer cannot score the entry's own answer either: then the entry is at fault."""
    own = entry["answer"]
    if isinstance(own, str) and not may_be_scored(own, name):
        return
    try:
        with redirect_stdout(None):
            scorer.score_answer(own, entry)
    except Exception as error:
        raise DataError(
            f"the scorer of reasoning-gym's {name} raised {described(cause)} and cannot score the entry "
            f"{shortened(entry)}; write column entry with entry_text of rlhf_toolkit.rewards.gym"
        ) from error


@lru_cache(maxsize=128)
def _dataset(name: str, config: str) -> Any:
    """The dataset whose scorer is asked; it is built once, and its items are not.

    DataError where there is none, and where ``config`` would make reasoning-gym read a file that is not one of its own.
    """
    factory = importlib.import_module("reasoning_gym.factory")
    if name == "composite":  # its scorer asks another by the name in the entry, for whose text nobody has looked
        raise DataError("dataset composite mixes others; write the name of the one that each entry comes from")
    if name not in factory.DATASETS:
        raise DataError(f"reasoning-gym has no dataset {name!r}{nearest(name, factory.DATASETS)}")
    try:
        settings = json.loads(config)
        if "size" in settings:
            settings["size"] = 1  # its items are not built, though some datasets would
        if not settings.get("max_n", 0) <= LARGEST_SIEVE.get(name, math.inf):
            raise DataError(
                f"column config holds max_n={shortened(settings['max_n'])}, beyond {name}'s {LARGEST_SIEVE[name]}; "
                "lower it"
            )
        for key, value in settings.items():
            if key.endswith(("file", "path")) and not (isinstance(value, str) and is_plain_name(value)):
                raise DataError(
                    f"column config holds {key}={shortened(value)}; give the name of a file of reasoning-gym"
                )
        return factory.create_dataset(name, **settings)
    except DataError:
        raise
    except Exception as error:  # a config class checks its values with assert, and may need files
        raise ConfigError(
            f"reasoning-gym cannot build {name} with {shortened(config)}: {described(error)}; repair column config"
        ) from error


# ---- entries as text -------------------------------------------------------------------------------------------------

TUPLE, MAPPING = "__tuple__", "__mapping__"


def entry_text(entry: Mapping[str, Any]) -> str:
    """An item of a reasoning-gym dataset as JSON text. Tuples, and mappings whose keys are no texts, are marked,
    because JSON has neither and some scorers compare them. TypeError for a value that JSON cannot hold."""
    return json.dumps(_marked(entry), ensure_ascii=False)


def entry_of(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """What ``entry_text`` was given. DataError where ``text`` is not an item of reasoning-gym, or holds what JSON has
    not, such as bytes."""
    try:
        entry = _unmarked(json.loads(text if isinstance(text, str) else entry_text(text)))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"column entry holds {shortened(text)}, which is not JSON: {described(error)}") from error
    if not isinstance(entry, dict) or not {"question", "answer", "metadata"} <= entry.keys():
        raise DataError(
            f"column entry holds {shortened(text)}; give question, answer and metadata of a reasoning-gym item"
        )
    return entry


def _marked(value: Any) -> Any:
    if isinstance(value, tuple):
        return {TUPLE: [_marked(item) for item in value]}
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _marked(item) for key, item in value.items()}
        return {MAPPING: [[_marked(key), _marked(item)] for key, item in value.items()]}
    return value


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TUPLE}:
        return tuple(_unmarked(item) for item in value[TUPLE])
    if value.keys() == {MAPPING}:
        return {_unmarked(key): _unmarked(item) for key, item in value[MAPPING]}
    return {key: _unmarked(item) for key, item in value.items()}
