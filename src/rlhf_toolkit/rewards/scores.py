"""What the rewards give for one rank's batch of responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_toolkit.types import Prompt


@dataclass(frozen=True)
class Scores:
    """The scores of n responses, position for position.

    ``totals[i]`` = sum over rewards of weight times value, where the value of a reward that gave a number for each
    token is their sum. It is 0 where ``kept[i]`` is False: then a score could not be had and its reward says ``drop``,
    so that the response has to be left out of the loss, and NaN where that reward says ``skip``, or has given a number
    that is not finite and says nothing else: its update has to be left out.

    ``parts[name][i]`` is the value of one reward before its weight, NaN where it failed (also where a failure score
    stood in for it). ``dropped[i]`` says why, where ``kept[i]`` is False. ``token_rewards[i]`` has one number for each
    token of response i, the same weighted sum token by token, in which a reward's single number stands on the last
    token; their sum is ``totals[i]``, and all are 0 where ``kept[i]`` is False. It is None where no reward gave numbers
    for tokens: then all of ``totals[i]`` belongs on the last token. ``failures[name]`` counts the calls, after all
    retries, that gave no score for one response or more.
    """

    totals: list[float]
    parts: dict[str, list[float]]
    kept: list[bool]
    token_rewards: list[list[float]] | None
    failures: dict[str, int]
    dropped: dict[int, str] = field(default_factory=dict)


class NoFunctions:
    """Stands in for ``Rewards`` where no function scores: models give the scores, and every total here is 0."""

    def require_columns(self, prompt: Prompt) -> None:
        """Do nothing: no function is called with them."""

    def submit(self, row: int, prompt: Prompt, response: str, token_ids: Sequence[int]) -> None:
        """Do nothing: no call begins early."""

    def collect(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        turns: object = None,
    ) -> Scores:
        """Give every response 0."""
        return Scores([0.0] * len(responses), {}, [True] * len(responses), None, {})

    def close(self) -> None:
        """Do nothing: there is nothing to end."""
