"""One Python function as the reward, called in the rank's own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_toolkit.errors import ConfigError, RewardError
from rlhf_toolkit.rewards.calls import Batch, Fault, RewardFunction, outcome_of
from rlhf_toolkit.rewards.compose import fault_message
from rlhf_toolkit.rewards.specification import RESERVED
from rlhf_toolkit.types import Prompt


@dataclass(frozen=True)
class FunctionReward:
    """Calls ``function`` with texts, columns and ``kwargs``, and gives back checked scores, one number each.

    ``name`` stands in every message. ConfigError where one of ``kwargs`` has the name of another argument.
    """

    function: RewardFunction
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = "reward"

    def __post_init__(self) -> None:
        self._check_kwargs(RESERVED, "an argument every reward gets")

    def __call__(self, prompts: Sequence[Prompt], responses: list[str]) -> list[float]:
        """The scores of ``responses``, each of which answers the prompt at its position.

        RewardError where the function raises, or returns anything but one finite number for each.
        """
        names = prompts[0].columns if prompts else ()
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
        self._check_kwargs(columns, "a column of the dataset")
        batch = Batch([prompt.text for prompt in prompts], list(responses), [[] for _ in responses], columns)
        outcome = outcome_of(self.function, batch, self.kwargs)
        if isinstance(outcome, Fault):
            raise RewardError(f"reward {fault_message(self.name, outcome, prompts)}") from outcome.cause
        scores = []
        for prompt, score in zip(prompts, outcome, strict=True):
            if isinstance(score, Fault):
                raise RewardError(f"reward {fault_message(self.name, score, [prompt])}")
            assert isinstance(score, float)  # a response without tokens has no others
            scores.append(score)
        return scores

    def _check_kwargs(self, taken: Sequence[str] | Mapping[str, Any], what: str) -> None:
        for name in self.kwargs:
            if name in taken:
                raise ConfigError(f"reward.kwargs.{name} of {self.name} is also {what}; rename one of the two")
