"""Curricula: functions that choose a rollout's prompts from how hard they were last time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_toolkit.errors import ConfigError, DataError, shortened
from rlhf_toolkit.plugins import arguments_for
from rlhf_toolkit.rollout.dealing import LastMeans
from rlhf_toolkit.seeding import derived_generator
from rlhf_toolkit.types import Prompt

OFFERED = ("rollout", "count", "prompts", "scores", "generator")
"""What a curriculum may take, by the names of its parameters."""


def near_target(
    *,
    count: int,
    prompts: Sequence[Prompt],
    scores: Mapping[int, float],
    generator: torch.Generator,
    target: float = 0.5,
) -> list[int]:
    """The ``count`` prompts whose mean score was nearest to ``target`` when last seen, those never seen before all.

    With scores of 0 and 1 and target 0.5 these are the prompts solved half of the time, from which a group-relative
    estimator learns most: the variance of such a score is largest there. Ties are broken at random.
    """
    order: list[int] = torch.randperm(len(prompts), generator=generator).tolist()
    return sorted(order, key=lambda i: abs(scores.get(prompts[i].index, target) - target))[:count]


CURRICULA: dict[str, Callable[..., Sequence[int]]] = {"near_target": near_target}


@dataclass(frozen=True)
class Curriculum:
    """Asks ``function`` for the positions of each rollout's prompts.

    It takes of ``OFFERED`` what its parameters name: ``rollout`` is the rollout's number, ``count`` how many different
    positions in ``prompts`` it must give, ``scores`` the mean score of a prompt, by ``Prompt.index``, when it was last
    in a rollout, and ``generator`` a random stream of the rollout's own. What it gives must follow from these alone:
    every rank asks, and a resumed run asks again. Raises ConfigError where ``kwargs`` do not fit.
    """

    function: Callable[..., Sequence[int]]
    prompts: Sequence[Prompt]
    count: int
    seed: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arguments_for(self.function, dict.fromkeys(OFFERED), self.kwargs, setting="data.curriculum")
        if self.count > len(self.prompts):
            raise DataError(
                f"rollout.prompts_per_rollout={self.count} is more than the {len(self.prompts)} prompts there are; set "
                f"it to {len(self.prompts)} or less, or add prompts"
            )

    def indices(self, rollout: int, scores: LastMeans) -> list[int]:
        """The positions for rollout number ``rollout``. ConfigError for anything but ``count`` different ones."""
        offered = {
            "rollout": rollout,
            "count": self.count,
            "prompts": self.prompts,
            "scores": {int(index): mean for index, mean in scores.state.items()},
            "generator": derived_generator(self.seed, "curriculum", rollout),
        }
        given = arguments_for(self.function, offered, self.kwargs, setting="data.curriculum")
        answer: Any = self.function(**given)
        found = list(answer) if isinstance(answer, Iterable) else []
        fits = all(isinstance(i, int) and 0 <= i < len(self.prompts) for i in found)
        if not fits or len(set(found)) != len(found) or len(found) != self.count:
            raise ConfigError(
                f"data.curriculum gave {shortened(answer)} for rollout {rollout}; it must give {self.count} different "
                f"positions from 0 to {len(self.prompts) - 1}"
            )
        return found
