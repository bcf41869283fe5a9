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
from rlhf_toolkit.texts import say
from rlhf_toolkit.types import Prompt

WARNINGS = 5
"""Lines about failures that one reward gets in a run."""
WORDS = {"drop": "dropped", "skip": "left without a score: updates with them are left out"}
"""What becomes of failed calls by their ``reaction``, where it is not a score."""


@dataclass(frozen=True)
class _Row:
    """A response with its prompt."""

    prompt: Prompt
    response: str
    token_ids: list[int]
    turns: Sequence[Mapping[str, Any]] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The response as messages: its turns, or the one that it is."""
        return [dict(each) for each in self.turns] or [{"role": "assistant", "content": self.response}]

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
    """One reward, its calls for the current batch, and how many lines there have been about its failures."""

    spec: RewardSpec
    source: Source
    calls: list[tuple[list[int], Future[Outcome]]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    warned: int = 0
    suppressed: int = 0

    def require_columns(self, prompt: Prompt) -> None:
        """ConfigError where the function cannot be called with the columns of such prompts."""
        self.check_names(prompt)
        self.source.asks.require(f"{self.spec.setting}.function", prompt.columns, self.spec.kwargs)

    def check_names(self, prompt: Prompt) -> None:
        """ConfigError where a column of the dataset has the name of an argument that the function gets anyway."""
        place = f"{self.spec.setting}.function"
        for name in prompt.columns:
            if name in self.spec.kwargs:
                raise ConfigError(
                    f"{self.spec.setting}.kwargs.{name} is also a column of the dataset; rename one of the two"
                )
            if name in self.source.asks.options:
                raise ConfigError(
                    f"{place}: the dataset has a column {shortened(name)}, and {self.spec.name} an option "
                    "of that name, a parameter with a default; columns go to parameters without one: rename the "
                    "column, or drop the default"
                )
            if name in self.source.asks.texts:
                raise ConfigError(
                    f"{place}: the dataset has a column {shortened(name)}, which {self.spec.name} calls "
                    "the texts of prompts or responses; rename one of the two"
                )
        asks = self.source.asks
        for name, asked, what in (("tokens", asks.tokens, "token ids"), ("turns", asks.turns, "messages")):
            if asked and name in prompt.columns:
                raise ConfigError(
                    f"{place}: the parameter {name} gets the response's {what}, but the dataset has a "
                    f"column {name}; rename one of the two"
                )

    def start(self, batch: Mapping[int, _Row]) -> None:
        """Make a call for the rows that wait for one, if any do."""
        numbers, self.waiting = self.waiting, []
        if not numbers:
            return
        rows = [batch[i] for i in numbers]
        prompts = [row.prompt for row in rows]
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
        texts, responses = [prompt.text for prompt in prompts], [row.response for row in rows]
        turns = [row.messages for row in rows] if self.source.asks.turns else []
        call = self.source.start(Batch(texts, responses, [row.token_ids for row in rows], columns, turns))
        self.calls.append((numbers, call))

    def results(self, count: int) -> tuple[list[Score | Fault], list[tuple[Fault, list[int]]]]:
        """Wait for the calls. For each of ``count`` responses its score or why there is none; and for each call that
        failed a fault and the responses that it is about."""
        values: list[Score | Fault] = [math.nan] * count
        faults: list[tuple[Fault, list[int]]] = []
        for rows, future in self.calls:
            outcome = future.result()
            items = outcome if isinstance(outcome, list) else [outcome] * len(rows)
            for i, item in zip(rows, items, strict=True):
                values[i] = item
            failed = [(item, i) for item, i in zip(items, rows, strict=True) if isinstance(item, Fault)]
            failed.sort(key=lambda each: each[0].not_finite)  # what may end the run comes first
            if failed:
                faults.append((failed[0][0], rows if isinstance(outcome, Fault) else [failed[0][1]]))
        return values, faults

    def react(
        self, faults: list[tuple[Fault, list[int]]], prompts: Sequence[Prompt], warn: Callable[[str], None]
    ) -> None:
        """Raise, or say in one line what failed in this batch."""
        fault, rows = min(faults, key=lambda each: each[0].not_finite)
        policy = reaction(self.spec, fault)
        said = fault_message(self.spec.name, fault, [prompts[i] for i in rows])
        if policy == "error":
            raise RewardError(f"reward {said}") from fault.cause
        if self.warned == WARNINGS:
            self.suppressed += len(faults)
            return
        self.warned += 1
        score = WORDS.get(policy, f"scored as {self.spec.failure_score:g}")
        last = "; the last line about this reward" if self.warned == WARNINGS else ""
        failed = f"reward {self.spec.name}: {len(faults)} of {len(self.calls)} calls failed and were {score}"
        warn(f"{failed}{last}; the first: reward {said}")

    def forget(self) -> None:
        """Give up what is under way: calls that have not begun never will."""
        for _, future in self.calls:
            future.cancel()
        self.calls, self.waiting = [], []


class Rewards:
    """The rewards of ``specs`` for one rank; ``warn`` is given a line when a failure is scored or dropped.

    Loads every function and starts the worker processes: ConfigError where one cannot be loaded or called with prompts
    and responses, where two have the same name, and for a ``timeout`` that nothing could keep. To be closed; the end of
    the process does it, too.
    """

    def __init__(self, specs: Sequence[RewardSpec], *, warn: Callable[[str], None] | None = None) -> None:
        if not specs:
            raise ConfigError("reward.functions is empty; give at least one entry with function or url")
        settings: dict[str, str] = {}
        for spec in specs:
            if spec.name in settings:
                raise ConfigError(
                    f"{settings[spec.name]} and {spec.setting} are both called {spec.name}; give one of them another "
                    "name"
                )
            settings[spec.name] = spec.setting
        self._warn = warn if warn is not None else lambda line: say(line, sys.stderr)
        self._rows: dict[int, _Row] = {}
        self._rewards: list[_Reward] = []
        try:
            for spec in specs:
                self._rewards.append(_Reward(spec, source_of(spec)))
                if misfit := self._rewards[-1].source.asks.misfit:
                    raise ConfigError(f"{spec.setting}.function: {misfit}")
        except BaseException:
            self.close()
            raise

    def require_columns(self, prompt: Prompt) -> None:
        """ConfigError where a function cannot be called with the columns of prompts such as ``prompt``. A run asks
        before it loads its model."""
        for reward in self._rewards:
            reward.require_columns(prompt)

    def submit(
        self,
        i: int,
        prompt: Prompt,
        response: str,
        token_ids: Sequence[int],
        turns: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Response ``i`` of the batch is complete: rewards in workers and remote ones start on it, the others wait.

        Its number, not the order of these calls, says where its score goes. RuntimeError for a number given twice.
        """
        if i in self._rows:
            raise RuntimeError(f"response {i} was submitted twice for one batch")
        for reward in self._rewards:
            reward.check_names(prompt)
        self._rows[i] = _Row(prompt, response, list(token_ids), turns)
        for reward in self._rewards:
            if reward.source.early:
                reward.waiting.append(i)
                if len(reward.waiting) == reward.spec.batch_size:
                    reward.start(self._rows)

    def collect(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        turns: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    ) -> Scores:
        """The scores of the whole batch; what was not submitted before starts now. Every response has a token.
        ``turns`` are the responses as messages, where they may have several turns; none of these was submitted before.

        RewardError where a reward with ``on_failure: error`` fails, and where a total is beyond float32. RuntimeError
        where a response was submitted that differs from the one collected. In any case the next batch starts afresh.
        """
        try:
            said = [()] * len(prompts) if turns is None else turns
            rows = [_Row(*row) for row in zip(prompts, responses, map(list, token_ids), said, strict=True)]
            for i, row in self._rows.items():
                if not (0 <= i < len(rows) and row.is_same(rows[i])):
                    other = shortened(rows[i].response) if 0 <= i < len(rows) else f"only {len(rows)} responses"
                    raise RuntimeError(
                        f"response {i} was submitted as {shortened(row.response)}, but collected is {other}"
                    )
            for i, row in enumerate(rows):
                if i not in self._rows:
                    self.submit(i, row.prompt, row.response, row.token_ids, row.turns)
            for reward in sorted(self._rewards, key=lambda each: not each.source.early):  # workers work meanwhile
                if not reward.source.early:
                    reward.waiting = list(range(len(rows)))
                reward.start(self._rows)
            values, failures = {}, {}
            for reward in self._rewards:
                values[reward.spec.name], faults = reward.results(len(rows))
                failures[reward.spec.name] = len(faults)
                if faults:
                    reward.react(faults, prompts, self._warn)
            specs, tokens = [reward.spec for reward in self._rewards], [len(row.token_ids) for row in rows]
            return weighted_sum(specs, values, failures, tokens=tokens, prompts=prompts)
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


# ---- the sum ---------------------------------------------------------------------------------------------------------


def weighted_sum(
    specs: Sequence[RewardSpec],
    values: Mapping[str, Sequence[Score | Fault]],
    failures: Mapping[str, int],
    *,
    tokens: Sequence[int],
    prompts: Sequence[Prompt],
) -> Scores:
    """The scores of responses with ``tokens`` tokens each, from the ``values`` of every reward, as ``Scores`` defines
    them. RewardError where a total is beyond float32."""
    kept, spoiled = [True] * len(tokens), [False] * len(tokens)
    sums = [[0.0] * count for count in tokens]
    totals = [0.0] * len(tokens)
    parts: dict[str, list[float]] = {}
    dropped = dict[int, str]()
    by_token = False
    for spec in specs:
        parts[spec.name] = [_part(value) for value in values[spec.name]]
        for i, value in enumerate(values[spec.name]):
            if isinstance(value, Fault):
                policy = reaction(spec, value)
                kept[i] = kept[i] and policy == "score"
                if policy != "score":
                    dropped.setdefault(i, f"reward {spec.name} {value.what}")
                spoiled[i] = spoiled[i] or policy == "skip"
                value = spec.failure_score
            totals[i] += spec.weight * _part(value)
            if isinstance(value, list):
                by_token = True
                sums[i] = [paid + spec.weight * number for paid, number in zip(sums[i], value, strict=True)]
            elif sums[i]:
                sums[i][-1] += spec.weight * value
    for i, keep in enumerate(kept):
        if not keep:
            totals[i], sums[i] = math.nan if spoiled[i] else 0.0, [0.0] * len(sums[i])
        elif not abs(totals[i]) <= LARGEST:
            raise RewardError(
                f"the weighted sum of all rewards is {totals[i]:g} for {_named(prompts[i])}, which float32 cannot "
                "hold; lower the weights"
            )
    return Scores(totals, parts, kept, sums if by_token else None, dict(failures), dropped)


def _part(value: Score | Fault) -> float:
    if isinstance(value, Fault):
        return math.nan
    return sum(value) if isinstance(value, list) else value


# ---- faults and sources ----------------------------------------------------------------------------------------------


def reaction(spec: RewardSpec, fault: Fault) -> str:
    """What becomes of a response with ``fault``, one of ``values.POLICIES``. A number that is not finite does not end a
    run: where nothing else is asked for, its update is left out like one whose loss is not finite."""
    return "skip" if fault.not_finite and spec.on_failure == "error" else spec.on_failure


def fault_message(name: str, fault: Fault, prompts: Sequence[Prompt]) -> str:
    """What is said after "reward": which one, what it did, the way out, and the first prompt it was asked about."""
    which = "its prompt was" if len(prompts) == 1 else f"the first of its {len(prompts)} prompts was"
    return f"{name} {fault.what}; {fault.way_out}; {which} {_named(prompts[0])}"


def _named(prompt: Prompt) -> str:
    return f"{shortened(prompt.text)} (row {prompt.index} of the dataset)"


def source_of(spec: RewardSpec) -> Source:
    """Load and start what ``spec`` describes. ConfigError where it cannot be loaded, or its timeout not be kept."""
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
