"""Any Python function as a reward.

A reward is Python that others wrote: whatever it raises or returns becomes one finite number for each response, or a
RewardError that says which function, which response and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from rlhf_toolkit.errors import ConfigError, RewardError, described, shortened
from rlhf_toolkit.types import Prompt

LARGEST = torch.finfo(torch.float32).max
"""Scores become float32; beyond this they would be infinite."""


class RewardFunction(Protocol):
    """What a user writes. ``columns`` are the dataset's other columns, each a list as long as ``responses``."""

    def __call__(self, prompts: list[str], responses: list[str], /, **columns: Any) -> Sequence[float]:
        """One finite score for each response, in the order given."""


@runtime_checkable
class _Array(Protocol):
    """What torch tensors, numpy arrays and the scalars of both have in common."""

    def tolist(self) -> Any: ...


@dataclass(frozen=True)
class FunctionReward:
    """Calls ``function`` with texts, columns and ``kwargs``, and gives back checked scores.

    ``name`` stands in every message. ConfigError where one of ``kwargs`` has the name of another argument.
    """

    function: RewardFunction
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = "reward"

    def __post_init__(self) -> None:
        self._check_kwargs(("prompts", "responses"), "an argument every reward gets")

    def __call__(self, prompts: Sequence[Prompt], responses: list[str]) -> list[float]:
        """The scores of ``responses``, each of which answers the prompt at its position.

        RewardError where the function raises, or returns anything but one finite number for each.
        """
        names = prompts[0].columns if prompts else ()
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
        self._check_kwargs(columns, "a column of the dataset")
        try:
            scores = self.function([prompt.text for prompt in prompts], list(responses), **columns, **self.kwargs)
        except Exception as error:  # a reward may raise whatever it likes
            raise RewardError(
                f"reward {self.name} raised {described(error)}; {_way_out(error)}; {_first_of(prompts)}"
            ) from error
        return [self._checked(score, i, prompts[i]) for i, score in enumerate(self._listed(scores, prompts))]

    def _check_kwargs(self, taken: Sequence[str] | Mapping[str, Any], what: str) -> None:
        for name in self.kwargs:
            if name in taken:
                raise ConfigError(f"reward.kwargs.{name} of {self.name} is also {what}; rename one of the two")

    def _listed(self, scores: Any, prompts: Sequence[Prompt]) -> Sequence[Any]:
        """``scores`` as a sequence of as many items as there are prompts, each of which has one response."""
        plain = scores.tolist() if isinstance(scores, _Array) else scores
        wanted = f"return one number for each of the {len(prompts)} responses; {_first_of(prompts)}"
        if not isinstance(plain, Sequence) or isinstance(plain, (str, bytes)):
            raise RewardError(f"reward {self.name} returned {shortened(scores)} ({type(scores).__name__}); {wanted}")
        if len(plain) != len(prompts):
            raise RewardError(f"reward {self.name} returned {len(plain)} scores; {wanted}")
        return plain

    def _checked(self, score: Any, position: int, prompt: Prompt) -> float:
        """``score`` as a float; bool is 0 or 1."""
        plain = score.tolist() if isinstance(score, _Array) else score
        if isinstance(plain, (int, float)) and abs(plain) <= LARGEST:
            return float(plain)
        raise RewardError(
            f"reward {self.name} gave score {shortened(score)} ({type(score).__name__}) at position {position}; "
            f"return a finite number for each response; its prompt was {shortened(prompt.text)}"
        )


def _way_out(error: Exception) -> str:
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return "columns and reward.kwargs arrive by name, so let it take **columns"
    return "repair the function (see its traceback)"


def _first_of(prompts: Sequence[Prompt]) -> str:
    return f"the first of its {len(prompts)} prompts was {shortened(prompts[0].text) if prompts else 'missing'}"
