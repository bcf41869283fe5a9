"""What the tests of rewards share: batches, and rewards from entries as the YAML has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from rlhf_toolkit.rewards.compose import Rewards
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.types import Prompt

MISBEHAVING = Path(__file__).parent / "misbehaving.py"


def prompts_for(count: int, **columns: Any) -> list[Prompt]:
    """Prompts from row 100 of a dataset on; each column has the same value in all of them."""
    return [Prompt(100 + i, f"prompt\n{i}", (1,), dict(columns)) for i in range(count)]


def tokens_for(responses: list[str]) -> list[list[int]]:
    """One token for each character."""
    return [[ord(letter) for letter in response] for response in responses]


def batch_of(responses: list[str], **columns: Any) -> tuple[list[Prompt], list[str], list[list[int]]]:
    return prompts_for(len(responses), **columns), responses, tokens_for(responses)


@contextmanager
def rewards_of(*entries: dict[str, Any], warn: Callable[[str], None] | None = None) -> Iterator[Rewards]:
    specs = [RewardSpec.parse(entry, f"reward.functions[{number}]") for number, entry in enumerate(entries)]
    rewards = Rewards(specs, warn=warn if warn is not None else lambda line: None)
    try:
        yield rewards
    finally:
        rewards.close()


def is_gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have asked for its exit status yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    """For what comes about by itself; the time limit of the test ends it where it does not."""
    while not condition():
        time.sleep(0.02)
