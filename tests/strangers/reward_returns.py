"""What reward functions return and raise, in the rank's own process and in workers, under each policy."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_toolkit.rewards import pool
from rlhf_toolkit.rewards.compose import Rewards
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.types import Prompt
from tests.strangers import frame, ground, payloads

COUNT, LIMIT = 250, 20.0
HEAVY = ("rlhf_toolkit.rewards.compose", "numpy", "torch")
HEAD = """
import asyncio, itertools, math, os, pickle, sys, threading, time
from decimal import Decimal
from fractions import Fraction
import numpy as np


class Base(list):
    pass


class Odd:
    '''Raises wherever it is asked.'''
    def __getattribute__(self, name):
        raise RuntimeError("odd \\x1b[2J\\n" + name)
    def __repr__(self):
        raise RuntimeError("no repr")


class Text:
    def __repr__(self):
        return "x" * 10**7 + "\\x1b[2J\\n"


class Liar(float):
    def __float__(self):
        return math.nan
    def __abs__(self):
        return 0.0


class Whole(int):
    def __float__(self):
        return math.inf


class Runs:
    def __reduce__(self):
        return os.system, ("COMMAND",)
    def tolist(self):
        return self


class Twice(list):
    def __len__(self):
        return 1
    def __iter__(self):
        return itertools.repeat(0.5)


class Long(list):
    def __len__(self):
        return 10**18


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Loud(Exception):
    def __str__(self):
        return "\\x1b]0;x\\x07\\n" * 10**6


class Unsent(Exception):
    def __init__(self, a, b):
        super().__init__(a)
        self.lock = threading.Lock()


class Lazy:
    def tolist(self):
        raise OSError("gone")


class Same:
    def tolist(self):
        return self


def itself():
    value = []
    value.append(value)
    return value


def deep(depth):
    value = 0.5
    for _ in range(depth):
        value = [value]
    return value


def thrown(error):
    raise error


def score(prompts, responses, **columns):
    return VALUE
"""
RETURNED = (
    *(
        "None",
        "1.0",
        "'0.5'",
        "b'0.5'",
        "[]",
        "[None]",
        "['0.5']",
        "['nan']",
        "[math.nan]",
        "[math.inf]",
        "[-math.inf]",
    ),
    *("[1e39]", "[-1e308]", "[10**400]", "[10**5000]", "[True]", "[1j]", "[Decimal('0.5')]", "[Decimal('NaN')]"),
    *(
        "[Fraction(1, 2)]",
        "[0.5, 0.5]",
        "(0.5 for _ in responses)",
        "iter([0.5])",
        "{0: 0.5}",
        "{0.5}",
        "range(1)",
        "[[]]",
    ),
    *(
        "[[0.5, 0.5]]",
        "[[[0.5]]]",
        "[[None]]",
        "[[math.nan]]",
        "[{}]",
        "[object()]",
        "[score]",
        "score",
        "Odd()",
        "[Odd()]",
    ),
    *(
        "[Text()]",
        "Text()",
        "[Liar(0.5)]",
        "[Whole(1)]",
        "[Runs()]",
        "Runs()",
        "Twice([0.5])",
        "Long([0.5])",
        "[Same()]",
    ),
    *(
        "[Lazy()]",
        "Lazy()",
        "Same()",
        "itself()",
        "[itself()]",
        "deep(50)",
        "deep(100000)",
        "[deep(100000)]",
        "memoryview(b'a')",
    ),
    *(
        "np.array([0.5])",
        "np.array([np.nan])",
        "np.array([[0.5]])",
        "np.array(0.5)",
        "np.array(['a'])",
        "np.array([None])",
    ),
    *(
        "np.ma.masked_array([1.0], [True])",
        "np.array(['2024-01-01'], dtype='M8[D]')",
        "np.zeros((1, 10**7))",
        "np.array([1j])",
    ),
    *(
        "np.float16('inf')",
        "[np.longdouble('1e4000')]",
        "[np.float64(0.5)]",
        "[np.array([0.5])]",
        "bytearray(1)",
        "type",
        "...",
    ),
    *(
        "[0.5] * 10**7",
        "'x' * 10**8",
        "['x' * 10**8]",
        "[[0.5] * 10**6]",
        "[float('-0')]",
        "[5e-324]",
        "itertools.repeat(0.5)",
    ),
)
RAISED = (
    *("Exception()", "SystemExit(0)", "SystemExit('x')", "GeneratorExit()", "StopIteration()", "StopAsyncIteration()"),
    *(
        "MemoryError()",
        "RecursionError()",
        "asyncio.CancelledError()",
        "Silent()",
        "Loud()",
        "Unsent(1, 2)",
        "TimeoutError()",
    ),
    *(
        "BaseExceptionGroup('x', [KeyError(1)])",
        "ExceptionGroup('x', [ValueError('y')])",
        "UnicodeDecodeError('a', b'b', 0, 1, 'c')",
    ),
    *(
        "OSError(28, 'x')",
        "BrokenPipeError()",
        "EOFError()",
        "ConnectionError()",
        "Warning('\\x1b[2J')",
        "KeyError('\\ud800')",
    ),
)
DONE = (
    *(
        "os._exit(0)",
        "os._exit(3)",
        "os.kill(os.getpid(), 9)",
        "os.kill(os.getpid(), 11)",
        "os.abort()",
        "time.sleep(60)",
    ),
    *("sum(itertools.repeat(0))", "os.closerange(3, 256)", "sys.stdout.write('\\x1b[2J' * 1000)", "deep(10**6)"),
    *("[os.write(fd, b'\\x00\\x00\\x00\\x02{}') for fd in range(3, 20) if os.path.exists(f'/proc/self/fd/{fd}')]",),
    *(
        "[os.write(fd, b'\\x7f\\xff\\xff\\xff' + b'x' * 10**6) for fd in range(3, 20) if os.path.exists(f'/proc/self/fd/{fd}')]",
    ),
    *(
        "[os.write(fd, b'\\x00\\x00\\x00\\x10' + pickle.dumps(Runs())[:16]) for fd in range(3, 20) if os.path.exists(f'/proc/self/fd/{fd}')]",
    ),
)


@dataclass(frozen=True)
class Case:
    """An expression that the function evaluates, and where it runs."""

    name: str
    value: str
    workers: int
    policy: str


def cases(seed: int, count: int) -> list[Case]:
    """Each expression in the rank's own process or in a worker, those that end a process in a worker alone."""
    chance = random.Random(f"reward_returns {seed}")
    found = []
    for kind, values in (("returns", RETURNED), ("raises", RAISED), ("does", DONE)):
        for value in values:
            text = f"thrown({value})" if kind == "raises" else value
            for workers in (0, 1) if kind != "does" else (1,):
                policy = chance.choice(["error", "score", "drop"])
                found.append(Case(f"{kind} {value} with {workers} workers, {policy}", text, workers, policy))
    return found if count >= len(found) else chance.sample(found, count)


def run(case: Case) -> str:
    """Right is a finite number, or the policy's consequence."""
    path = Path("reward.py").absolute()
    path.write_text(
        HEAD.replace("VALUE", case.value).replace("COMMAND", payloads.COMMAND.replace("..", str(path.parents[1])))
    )
    entry: dict[str, Any] = {"function": f"{path}:score", "name": "r", "on_failure": case.policy}
    if case.workers:
        entry |= {"workers": 1, "timeout": 3}
    rewards = Rewards([RewardSpec.parse(entry)], warn=lambda line: _lines.append(line))
    try:
        result = rewards.collect([Prompt(0, "p", (1,), {})], ["r"], [[1]])
    finally:
        rewards.close()
        ours = ("posix_spawn", "subprocess.Popen")
        ground.noticed[:] = [
            each for each in ground.noticed if not (pool.BOOT[:20] in each and any(o in each for o in ours))
        ]
    if any("\n" in line or len(line) > 3000 for line in _lines):
        return frame.WRONGLY
    if result.failures["r"]:
        return frame.REFUSED
    return frame.RIGHTLY if math.isfinite(result.totals[0]) and abs(result.totals[0]) < 1e39 else frame.WRONGLY


_lines: list[str] = []
