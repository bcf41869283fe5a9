"""Responses of several turns: an environment answers what the policy wrote, and the policy goes on.

The environment's tokens are part of the response that the policy sees, and of no loss: ``Rollout.written`` is False
there, so that they get no log-prob ratio, no KL, no value step and no reward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import rendered_ids
from rlhf_toolkit.errors import RewardError, described, shortened
from rlhf_toolkit.rewards.signatures import asked
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout

DecodeTurn = Callable[[PromptBatch, list[int], int], Rollout]
"""A batch, the token budget of each row and the number of the turn, to what the policy writes in it."""


@dataclass(frozen=True)
class Environment:
    """What answers the policy.

    ``function(prompts, responses, turn=..., **columns)`` gives for each response the text that answers it, or None
    where it is complete. It is asked at most ``max_turns - 1`` times about a response. ``name`` stands in messages.
    """

    function: Callable[..., Sequence[str | None]]
    max_turns: int
    name: str = "environment"

    def require_columns(self, columns: Collection[str]) -> None:
        """ConfigError where the function cannot be called with a dataset's ``columns``."""
        asked(self.function, besides=("turn",)).require("rollout.environment", columns)

    def answers(self, prompts: Sequence[Prompt], responses: list[str], turn: int) -> list[str | None]:
        """The function's answer to each response. Raises RewardError where the function raises, or returns anything
        but a text or None for each."""
        names = prompts[0].columns if prompts else ()
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
        try:
            found = list(self.function([prompt.text for prompt in prompts], responses, turn=turn, **columns))
        except Exception as error:  # it may raise whatever it likes
            raise RewardError(f"{self.name} raised {described(error)}; repair the function") from error
        if len(found) != len(prompts) or not all(answer is None or isinstance(answer, str) for answer in found):
            raise RewardError(
                f"{self.name} returned {shortened(found)} for {len(prompts)} responses; return a text or None for each"
            )
        return found


@dataclass
class Conversation:
    """A prompt, and what policy and environment have written after it so far. ``finished``: the policy has stopped by
    itself."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    finished: bool = False

    @property
    def so_far(self) -> Prompt:
        """What the policy reads next: prompt and response."""
        return replace(self.prompt, token_ids=(*self.prompt.token_ids, *self.tokens))

    def go_on(self, rollout: Rollout, row: int) -> None:
        """Add what the policy has written in ``row`` of a turn's rollout."""
        length = int(rollout.lengths[row])
        self.tokens += rollout.responses[row, :length].tolist()
        self.logprobs += rollout.rollout_logprobs[row, :length].tolist()
        self.drawn += [] if rollout.drawn_logprobs is None else rollout.drawn_logprobs[row, :length].tolist()
        self.written += [True] * length
        self.finished = bool(rollout.finished[row])

    def take_answer(self, tokens: Sequence[int], budget: int) -> bool:
        """Add the environment's answer where it leaves a token of ``budget`` to write; return whether it does."""
        self.finished = False
        if len(self.tokens) + len(tokens) >= budget:
            return False
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.drawn += [0.0] * len(tokens)
        self.written += [False] * len(tokens)
        return True


def decode_with_turns(
    decode_turn: DecodeTurn,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    environment: Environment,
    *,
    texts_of: Callable[[list[list[int]]], list[str]],
    budget: int,
    pad_id: int,
    anyone: Callable[[bool], bool] = bool,
    agreeing: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Rollout:
    """Sample one response of at most ``budget`` tokens, answers included, for each row of ``batch``.

    After each turn the environment is asked about the responses that stopped by themselves, by the text that
    ``texts_of`` makes of their tokens, and its answer is tokenised as it stands. One whose answer leaves no
    token to write counts as cut off by the budget, without the answer. Where all ranks run in step, ``anyone(flag)`` is
    whether any of them goes on, and what the environment raises inside ``agreeing()`` on one of them ends all.
    """
    rows = [Conversation(prompt) for prompt in batch.prompts]
    going = list(range(len(rows)))
    for turn in range(environment.max_turns):
        part = PromptBatch(tuple(rows[i].so_far for i in going), tuple(batch.samples[i] for i in going))
        rollout = decode_turn(part, [budget - len(rows[i].tokens) for i in going], turn)
        for place, i in enumerate(going):
            rows[i].go_on(rollout, place)
        if turn + 1 == environment.max_turns:
            break
        stopped = [i for i in going if rows[i].finished]
        with agreeing():
            texts = texts_of([rows[i].tokens for i in stopped])
            answers = environment.answers([rows[i].prompt for i in stopped], texts, turn) if stopped else []
            said = [(i, answer) for i, answer in zip(stopped, answers, strict=True) if answer is not None]
            tokens = [(i, list(rendered_ids(answer, tokenizer))) for i, answer in said]
            going = [i for i, answer in tokens if rows[i].take_answer(answer, budget)]
        if not anyone(bool(going)):
            break
    return joined(rows, pad_id, whole=rollout.drawn_logprobs is None)


def joined(rows: Sequence[Conversation], pad_id: int, *, whole: bool) -> Rollout:
    """The responses as one padded rollout; ``whole``: drawn from the policy's whole distribution. A process may have
    none of them: dimensions and dtypes are the same then."""
    width = max((len(row.tokens) for row in rows), default=1)

    def block(column: str, fill: float, dtype: torch.dtype) -> torch.Tensor:
        values = [getattr(row, column) for row in rows]
        padded = [each + [fill] * (width - len(each)) for each in values]
        return torch.tensor(padded, dtype=dtype).reshape(len(rows), width)

    return Rollout(
        responses=block("tokens", pad_id, torch.long),
        lengths=torch.tensor([len(row.tokens) for row in rows], dtype=torch.long),
        rollout_logprobs=block("logprobs", 0.0, torch.float32),
        finished=torch.tensor([row.finished for row in rows], dtype=torch.bool),
        written=block("written", False, torch.bool),
        drawn_logprobs=None if whole else block("drawn", 0.0, torch.float32),
    )
