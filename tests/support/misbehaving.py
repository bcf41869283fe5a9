"""Reward functions that go wrong in every way, as the text of the response says. Imports no torch."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def act(prompts: list[str], responses: list[str], **columns: Any) -> Any:
    """The lengths of the responses, unless one of them names a misdeed."""
    for response in responses:
        if response in DEEDS:
            return DEEDS[response](len(responses))
    return [len(response) for response in responses]


def sleep_for_ever(count: int) -> Any:
    while True:
        time.sleep(1000)


def loop_in_c(count: int) -> Any:
    return sum(itertools.repeat(0))


def raise_an_error(count: int) -> Any:
    raise LookupError("nobody\nknows")


def kill_the_process(count: int) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def return_late(count: int) -> Any:
    time.sleep(60)
    return [1.0] * count


DEEDS = {
    "sleep": sleep_for_ever,
    "loop": loop_in_c,
    "raise": raise_an_error,
    "nan": lambda count: [float("nan")] * count,
    "count": lambda count: [1.0] * (count + 1),
    "type": lambda count: ["good"] * count,
    "none": lambda count: None,
    "exit": lambda count: os._exit(3),
    "leave": lambda count: sys.exit("left"),
    "kill": kill_the_process,
    "late": return_late,
}


def quick(prompts: list[str], responses: list[str], **columns: Any) -> list[int]:
    return [len(response) for response in responses]


def doubled(prompts: list[str], responses: list[str], *, factor: float = 2.0, **columns: Any) -> list[float]:
    return [factor * len(response) for response in responses]


def from_tokens(prompts: list[str], responses: list[str], tokens: list[list[int]], **columns: Any) -> list[list[int]]:
    return tokens


def now_and_then(prompts: list[str], responses: list[str], **columns: Any) -> list[Any]:
    """Numbers for the tokens of long responses, one number for the others."""
    return [[1.0] * len(response) if len(response) > 2 else 5.0 for response in responses]


def too_many_tokens(prompts: list[str], responses: list[str], **columns: Any) -> list[list[float]]:
    return [[0.5] * (len(response) + 1) for response in responses]


def has_torch(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [float(any(name.split(".")[0] in ("torch", "numpy", "transformers") for name in sys.modules))] * len(
        responses
    )


def rank_variables(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """How many of the variables that the prompts name are set."""
    return [float(prompt in os.environ) for prompt in prompts]


def pid(prompts: list[str], responses: list[str], **columns: Any) -> list[int]:
    return [os.getpid()] * len(responses)


def calls_at_once(prompts: list[str], responses: list[str], *, folder: list[str]) -> list[int]:
    """How many responses came with this one."""
    return [len(responses)] * len(responses)


def waits_for_the_others(prompts: list[str], responses: list[str], *, folder: list[str], others: int) -> list[int]:
    """Answers ``wait`` only when all other responses have been scored."""
    place = Path(folder[0])
    if responses[0] == "wait":
        while len(list(place.iterdir())) < others:
            time.sleep(0.01)
    else:
        (place / responses[0]).touch()
    return [len(responses[0])]


def fails_first(prompts: list[str], responses: list[str], *, folder: list[str], how: str) -> list[int]:
    """Goes wrong at the first call for each response."""
    mark = Path(folder[0]) / responses[0]
    if not mark.exists():
        mark.touch()
        DEEDS[how](1)
    return [len(responses[0])]


def leaves_children(prompts: list[str], responses: list[str], *, folder: list[str]) -> list[float]:
    """Starts a program, and a fork that holds all that this process has open; then hangs or dies."""
    program = subprocess.Popen(["sleep", "1000"])
    fork = os.fork()
    if fork == 0:
        time.sleep(1000)
    (Path(folder[0]) / f"{program.pid}-{fork}-{os.getpid()}").touch()
    DEEDS[responses[0]](1)
    return [0.0]


async def gently(prompts: list[str], responses: list[str], **columns: Any) -> list[int]:
    """All responses at the same time; ``sleep`` never ends."""
    return list(await asyncio.gather(*(_one(response) for response in responses)))


async def _one(response: str) -> int:
    if response == "timeout":
        raise TimeoutError("not the limit")
    await asyncio.sleep(1000 if response == "sleep" else 0)
    return len(response)


def generates(prompts: list[str], responses: list[str], **columns: Any) -> Any:
    yield from (1.0 for _ in responses)


async def generates_gently(prompts: list[str], responses: list[str], **columns: Any) -> Any:
    for _ in responses:
        yield 1.0


def huge(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [3e38 for _ in responses]
