"""Who samples what: the rows of a rollout, their deal among ranks, and how long they will probably be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rlhf_toolkit.distributed.collectives import world_size
from rlhf_toolkit.errors import DataError
from rlhf_toolkit.types import Prompt, PromptBatch


def rollout_rows(prompts: Sequence[Prompt], responses_per_prompt: int) -> PromptBatch:
    """All rows of one rollout, each prompt as often in a row as it gets responses.

    A prompt's samples count from 0; where the rollout holds it twice (see ``PromptSchedule``) they go on counting, so
    that ``(index, sample)`` names one response of the rollout and its random stream.
    """
    rows: list[tuple[Prompt, int]] = []
    seen: Counter[int] = Counter()
    for prompt in prompts:
        first = seen[prompt.index]
        seen[prompt.index] += responses_per_prompt
        rows += [(prompt, sample) for sample in range(first, first + responses_per_prompt)]
    return PromptBatch(prompts=tuple(prompt for prompt, _ in rows), samples=tuple(sample for _, sample in rows))


def deal(
    rows: PromptBatch, responses_per_prompt: int, ranks: int, expected: Callable[[Prompt], float]
) -> list[list[int]]:
    """Row numbers of each rank: equally many prompts, a prompt's samples on one rank, expected lengths balanced.

    The longest prompts go to ranks 0, 1, ..., the next ones back, and so on. Every rank makes the same deal without
    talking. Raises DataError where the ranks' shares would differ.
    """
    firsts = range(0, len(rows), responses_per_prompt)
    if len(firsts) % ranks:
        raise DataError(
            f"{len(firsts)} prompts do not divide among {ranks} processes; "
            "set rollout.prompts_per_rollout to a multiple of them"
        )
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i, first in enumerate(sorted(firsts, key=lambda row: (-expected(rows.prompts[row]), row))):
        turn, place = divmod(i, ranks)
        shares[place if turn % 2 == 0 else ranks - 1 - place] += range(first, first + responses_per_prompt)
    return [sorted(share) for share in shares]


def in_turn(rows: int) -> list[range]:
    """Row numbers of each rank where shares need not be equal: 0, 1, ... in turn."""
    ranks = world_size()
    return [range(number, rows, ranks) for number in range(ranks)]


class LastMeans:
    """What was measured of a prompt's responses when it was last in a rollout, such as their mean length: what to
    expect of it next time; of one never seen, the mean of all others.

    The same on every rank, since all see whole rollouts. ``state`` is saved with a checkpoint, so that a resumed run
    decides as a straight one does.
    """

    def __init__(self, state: Mapping[str, float] | None = None) -> None:
        self.state: dict[str, float] = dict(state or {})

    def __call__(self, prompt: Prompt) -> float:
        """The mean last time; 0 as long as nothing has been seen."""
        return self.state.get(str(prompt.index), self._mean)

    def update(self, prompts: Sequence[int], values: Sequence[float]) -> None:
        """Take in a value for each response to ``prompts``, numbers of the dataset's rows."""
        totals: dict[str, list[float]] = {}
        for index, value in zip(prompts, values, strict=True):
            totals.setdefault(str(index), []).append(value)
        self.state.update({index: sum(found) / len(found) for index, found in totals.items()})

    @property
    def _mean(self) -> float:
        return sum(self.state.values()) / len(self.state) if self.state else 0.0
