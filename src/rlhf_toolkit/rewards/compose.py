"""Several rewards as one: calls that start while responses are still being decoded, failures, the weighted sum."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rlhf_toolkit.errors import ConfigError, RewardError, shortened
from rlhf_toolkit.plugins import load_function
from rlhf_toolkit.rewards.calls import LARGEST, Batch, Fault, InProcess, Outcome, Score, Source, is_async
from rlhf_toolkit.rewards.http import remote
from rlhf_toolkit.rewards.pool import worker_pool
from rlhf_toolkit.rewards.scores import Scores
from rlhf_toolkit.rewards.specification import RewardSpec
from rlhf_toolkit.types import Prompt

WARNINGS = 5
"""Lines about failures that one reward gets in a run."""


@dataclass(frozen=True)
class _Row:
    """A response with its prompt."""

    prompt: Prompt
    response: str
    token_ids: list[int]

    def is_same(self, other: _Row) -> bool:
        """Whether both are the same response to the same prompt; columns, which may be arrays, are not compared."""
        return (self.prompt.index, self.prompt.text, self.response, self.token_ids) == (
            other.prompt.index,
            other.prompt.text,
            other.response,
            other.token_ids,
        )


@dataclass
class _Reward:
    """One reward with what is under way for the current batch, and with the lines it has had so far."""

    spec: RewardSpec
    source: Source
    calls: list[tuple[list[int], Future[Outcome]]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    warned: int = 0
    suppressed: int = 0

    def forget(self) -> None:
        """Give up what is under way: calls that have not begun never will."""
        for _, future in self.calls:
            future.cancel()
        self.calls, self.waiting = [], []


class Rewards:
    """The rewards of ``specs`` for one rank; ``warn`` is given a line when a failure is scored or dropped.

    Loads every function and starts the worker processes: ConfigError where one cannot be loaded, where two have the
    same name, and for a ``timeout`` that nothing could keep. To be closed; the end of the process does it, too.
    """

    def __init__(self, specs: Sequence[RewardSpec], *, warn: Callable[[str], None] | None = None) -> None:
        if not specs:
            raise ConfigError("reward.functions is empty; give at least one entry with function or url")
        _check_unique(specs)
        self._warn = warn if warn is not None else _to_stderr
        self._rows: dict[int, _Row] = {}
        self._rewards: list[_Reward] = []
        try:
            for spec in specs:
                self._rewards.append(_Reward(spec, _source(spec)))
        except BaseException:
            self.close()
            raise

    def submit(self, i: int, prompt: Prompt, response: str, token_ids: Sequence[int]) -> None:
        """Response ``i`` of the batch is complete: rewards in workers and remote ones start on it, the others wait.

        Its number, not the order of these calls, says where its score goes. RuntimeError for a number given twice.
        """
        if i in self._rows:
            raise RuntimeError(f"response {i} was submitted twice for one batch")
        self._check_names(prompt)
        self._rows[i] = _Row(prompt, response, list(token_ids))
        for reward in self._rewards:
            if reward.source.early:
                self._add(reward, i)

    def collect(
        self, prompts: Sequence[Prompt], responses: Sequence[str], token_ids: Sequence[Sequence[int]]
    ) -> Scores:
        """The scores of the whole batch; what was not submitted before starts now. Every response has a token.

        RewardError where a reward with ``on_failure: error`` fails, and where a total is beyond float32. RuntimeError
        where a response was submitted that differs from the one collected. In any case the next batch starts afresh.
        """
        try:
            rows = [_Row(*row) for row in zip(prompts, responses, map(list, token_ids), strict=True)]
            self._check_submitted(rows)
            for i, row in enumerate(rows):
                if i not in self._rows:
                    self.submit(i, *(row.prompt, row.response, row.token_ids))
            for reward in sorted(self._rewards, key=lambda each: not each.source.early):  # workers work meanwhile
                if not reward.source.early:
                    reward.waiting = list(range(len(rows)))
                self._start(reward)
            values = {reward.spec.name: self._values(reward, len(rows)) for reward in self._rewards}
            return self._combined(values, rows)
        finally:
            self._rows = {}
            for reward in self._rewards:
                reward.forget()

    def close(self) -> None:
        """End all processes and threads, those that hang too, and say how many failures had no line."""
        for reward in self._rewards:
            reward.source.close()
            if reward.suppressed:
                self._warn(f"reward {reward.spec.name}: {reward.suppressed} more failed calls had no line of their own")
                reward.suppressed = 0

    # ---- calls -------------------------------------------------------------------------------------------------------

    def _add(self, reward: _Reward, i: int) -> None:
        reward.waiting.append(i)
        if len(reward.waiting) == reward.spec.batch_size:
            self._start(reward)

    def _start(self, reward: _Reward) -> None:
        """A call for the rows that wait for one, if any do."""
        rows, reward.waiting = reward.waiting, []
        if rows:
            reward.calls.append((rows, reward.source.start(_batch([self._rows[i] for i in rows]))))

    def _values(self, reward: _Reward, count: int) -> tuple[list[Score | Fault], int]:
        """For each response the score of ``reward`` or why there is none, and how many calls failed."""
        values: list[Score | Fault] = [math.nan] * count
        faults: list[tuple[Fault, list[int]]] = []
        for rows, future in reward.calls:
            outcome = future.result()
            items = outcome if isinstance(outcome, list) else [outcome] * len(rows)
            for i, item in zip(rows, items, strict=True):
                values[i] = item
            failed = [(item, i) for item, i in zip(items, rows, strict=True) if isinstance(item, Fault)]
            if failed:
                faults.append((failed[0][0], rows if isinstance(outcome, Fault) else [failed[0][1]]))
        if faults:
            self._react(reward, faults)
        return values, len(faults)

    def _react(self, reward: _Reward, faults: list[tuple[Fault, list[int]]]) -> None:
        """Raise, or say in one line what failed in this batch."""
        fault, rows = faults[0]
        said = fault_message(reward.spec.name, fault, [self._rows[i].prompt for i in rows])
        if reward.spec.on_failure == "error":
            raise RewardError(f"reward {said}") from fault.cause
        if reward.warned == WARNINGS:
            reward.suppressed += len(faults)
            return
        reward.warned += 1
        score = f"scored as {reward.spec.failure_score:g}" if reward.spec.on_failure == "score" else "dropped"
        last = "; the last line about this reward" if reward.warned == WARNINGS else ""
        failed = f"reward {reward.spec.name}: {len(faults)} of {len(reward.calls)} calls failed and were {score}"
        self._warn(f"{failed}{last}; the first: reward {said}")

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _check_names(self, prompt: Prompt) -> None:
        for reward in self._rewards:
            for name in prompt.columns:
                if name in reward.spec.kwargs:
                    raise ConfigError(
                        f"{reward.spec.setting}.kwargs.{name} is also a column of the dataset; rename one of the two"
                    )
            if reward.source.takes_tokens and "tokens" in prompt.columns:
                raise ConfigError(
                    f"{reward.spec.setting}: the parameter tokens gets the response's token ids, but the dataset has a "
                    "column tokens; rename one of the two"
                )

    def _check_submitted(self, rows: list[_Row]) -> None:
        for i, row in self._rows.items():
            if not (0 <= i < len(rows) and row.is_same(rows[i])):
                other = shortened(rows[i].response) if 0 <= i < len(rows) else f"only {len(rows)} responses"
                raise RuntimeError(f"response {i} was submitted as {shortened(row.response)}, but collected is {other}")

    # ---- the sum -----------------------------------------------------------------------------------------------------

    def _combined(self, values: Mapping[str, tuple[list[Score | Fault], int]], rows: list[_Row]) -> Scores:
        kept = [True] * len(rows)
        sums = [[0.0] * len(row.token_ids) for row in rows]
        totals = [0.0] * len(rows)
        parts: dict[str, list[float]] = {}
        by_token = False
        for reward in self._rewards:
            spec, column = reward.spec, values[reward.spec.name][0]
            parts[spec.name] = [_part(value) for value in column]
            for i, value in enumerate(column):
                if isinstance(value, Fault):
                    kept[i] = kept[i] and spec.on_failure == "score"
                    value = spec.failure_score
                by_token = by_token or isinstance(value, list)
                totals[i] += spec.weight * _part(value)
                _pay(sums[i], value, spec.weight)
        for i, keep in enumerate(kept):
            if not keep:
                totals[i], sums[i] = 0.0, [0.0] * len(sums[i])
            elif not abs(totals[i]) <= LARGEST:
                raise RewardError(
                    f"the weighted sum of all rewards is {totals[i]:g} for {_named(rows[i].prompt)}, which float32 "
                    "cannot hold; lower the weights"
                )
        failures = {name: failed for name, (_, failed) in values.items()}
        return Scores(totals, parts, kept, sums if by_token else None, failures)


def fault_message(name: str, fault: Fault, prompts: Sequence[Prompt]) -> str:
    """What continues "reward ": which one, what it did, the way out, and the first prompt it was asked about."""
    which = "its prompt was" if len(prompts) == 1 else f"the first of its {len(prompts)} prompts was"
    return f"{name} {fault.what}; {fault.way_out}; {which} {_named(prompts[0])}"


def _named(prompt: Prompt) -> str:
    return f"{shortened(prompt.text)} (row {prompt.index} of the dataset)"


def _part(value: Score | Fault) -> float:
    if isinstance(value, Fault):
        return math.nan
    return sum(value) if isinstance(value, list) else value


def _pay(tokens: list[float], value: Score, weight: float) -> None:
    """Add ``weight`` times ``value`` to the rewards of a response's tokens; a single number goes to the last."""
    if isinstance(value, list):
        for position, number in enumerate(value):
            tokens[position] += weight * number
    elif tokens:
        tokens[-1] += weight * value


def _batch(rows: Sequence[_Row]) -> Batch:
    columns: dict[str, list[Any]] = {
        name: [row.prompt.columns[name] for row in rows] for name in rows[0].prompt.columns
    }
    return Batch(
        [row.prompt.text for row in rows], [row.response for row in rows], [r.token_ids for r in rows], columns
    )


def _source(spec: RewardSpec) -> Source:
    """What ``spec`` describes, loaded and started."""
    if spec.url is not None:
        return remote(spec)
    if spec.workers:
        return worker_pool(spec)
    assert spec.function is not None  # RewardSpec has one or the other
    function = load_function(spec.function, f"{spec.setting}.function")
    if spec.timeout is not None and not is_async(function):
        raise ConfigError(
            f"{spec.setting}.timeout={spec.timeout:g} cannot be kept: nothing interrupts {spec.function} in the rank's "
            f"own process; set {spec.setting}.workers: 1 or more, or write it as async def"
        )
    return InProcess(function, spec.kwargs, spec.timeout)


def _check_unique(specs: Sequence[RewardSpec]) -> None:
    seen: dict[str, str] = {}
    for spec in specs:
        if spec.name in seen:
            raise ConfigError(
                f"{seen[spec.name]} and {spec.setting} are both called {spec.name}; give one of them another name"
            )
        seen[spec.name] = spec.setting


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
