"""Responses of several turns: an environment answers what the policy wrote, and the policy goes on.

The environment's tokens are part of the response that the policy sees, and of no loss: ``Rollout.written`` is False
there, so that they get no log-prob ratio, no KL, no value step and no reward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import Message, rendered_ids
from rlhf_toolkit.data.next_turn import ANSWERING, is_answer, tokens_between
from rlhf_toolkit.data.template_values import template_values
from rlhf_toolkit.errors import ConfigError, RewardError, described, shortened
from rlhf_toolkit.plugins import takes
from rlhf_toolkit.rewards.signatures import asked
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout

TURNS = "turns"
"""The parameter by which an environment, as a reward does, asks for what has been said as messages."""
Answer = str | list[Message] | None
"""A text that follows the turn as it stands; messages, which the chat template puts behind it; or the end."""
DecodeTurn = Callable[[PromptBatch, list[int], int], Rollout]
"""A batch, the token budget of each row and the number of the turn, to what the policy writes in it."""


@dataclass(frozen=True)
class Environment:
    """What answers the policy.

    ``function(prompts, responses, turn=..., **columns)`` gives for each response what answers it: a message of role
    user or tool, several in a list, or a text that stands for itself; or None where the response is complete. It is
    asked at most ``max_turns - 1`` times about a response. With a parameter ``turns`` it gets the messages of each
    response so far. A turn has at most ``most_tokens`` tokens. ``values`` are the experiment's for the chat template,
    ``name`` stands in messages.
    """

    function: Callable[..., Sequence[Any]]
    max_turns: int
    name: str = "environment"
    most_tokens: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    def require_columns(self, columns: Collection[str]) -> None:
        """ConfigError where the function cannot be called with a dataset's ``columns``."""
        asks = asked(self.function, besides=("turn",))
        asks.require("rollout.environment", columns)
        if asks.turns and TURNS in columns:
            raise ConfigError(
                "rollout.environment: the parameter turns gets a response's messages, but the dataset has a column "
                "turns; rename one of the two"
            )

    def budget(self, left: int) -> int:
        """Tokens of a turn in a response that has ``left`` of them."""
        return left if self.most_tokens is None else min(left, self.most_tokens)

    def answers(self, rows: Sequence[Conversation], responses: list[str], turn: int) -> list[Answer]:
        """The function's answer to each response. Raises RewardError where the function raises, or returns anything
        but an answer or None for each."""
        prompts = [row.prompt for row in rows]
        names = prompts[0].columns if prompts else ()
        given: dict[str, Any] = {name: [prompt.columns[name] for prompt in prompts] for name in names}
        if takes(self.function, TURNS):
            given[TURNS] = [list(row.turns) for row in rows]
        try:
            found = list(self.function([prompt.text for prompt in prompts], responses, turn=turn, **given))
        except Exception as error:  # it may raise whatever it likes
            raise RewardError(f"{self.name} raised {described(error)}; repair the function") from error
        found = [[answer] if isinstance(answer, Mapping) else answer for answer in found]
        if len(found) != len(prompts) or not all(x is None or isinstance(x, str) or is_answer(x) for x in found):
            raise RewardError(
                f"{self.name} returned {shortened(found)} for {len(rows)} responses; return a text or None for each, "
                f"or messages of role {' or '.join(ANSWERING)} with their content as text"
            )
        return found


@dataclass
class Conversation:
    """A prompt, and what policy and environment have written after it so far: tokens, and ``turns``, the same as
    messages, in which a text of the environment's is the user's. ``finished``: the policy has stopped by itself."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    finished: bool = False

    @property
    def so_far(self) -> Prompt:
        """What the policy reads next: prompt and response."""
        return replace(self.prompt, token_ids=(*self.prompt.token_ids, *self.tokens))

    def go_on(self, rollout: Rollout, row: int) -> list[int]:
        """Add what the policy has written in ``row`` of a turn's rollout, and return it."""
        length = int(rollout.lengths[row])
        self.tokens += rollout.responses[row, :length].tolist()
        self.logprobs += rollout.rollout_logprobs[row, :length].tolist()
        self.drawn += [] if rollout.drawn_logprobs is None else rollout.drawn_logprobs[row, :length].tolist()
        self.written += [True] * length
        self.finished = bool(rollout.finished[row])
        return self.tokens[len(self.tokens) - length :]

    def take_answer(self, answer: str | list[Message], tokens: Sequence[int], budget: int) -> bool:
        """Add the environment's answer where it leaves a token of ``budget`` to write; return whether it does."""
        self.finished = False
        if len(self.tokens) + len(tokens) >= budget:
            return False
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.drawn += [0.0] * len(tokens)
        self.written += [False] * len(tokens)
        self.turns += [{"role": "user", "content": answer}] if isinstance(answer, str) else answer
        return True

    @property
    def messages(self) -> list[Message]:
        """The conversation before the policy's newest turn. What a prompt has begun of the first one belongs to it."""
        prompt, said = list(self.prompt.messages or ()), self.turns[:-1]
        if prompt and prompt[-1]["role"] == "assistant":
            begun = prompt.pop()["content"]
            said = [{**turn, "content": begun + turn["content"]} if n == 0 else turn for n, turn in enumerate(said)]
        return [*prompt, *said]


def answer_tokens(
    row: Conversation,
    answer: str | list[Message],
    environment: Environment,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
) -> list[int]:
    """The tokens of an answer to ``row``: those of a text, or what the chat template writes from the policy's turn to
    its next. Raises RewardError for messages after a prompt that no template has rendered, and DataError."""
    if isinstance(answer, str):
        return list(rendered_ids(answer, tokenizer))
    prompt = row.prompt
    if prompt.messages is None:
        raise RewardError(
            f"{environment.name} answers row {prompt.index} with messages, but its prompt is a plain text; set "
            "data.chat_template: true, or answer with a text"
        )
    return tokens_between(
        row.messages,
        answer,
        tokenizer,
        template_values(prompt.columns, environment.values, index=prompt.index),
        index=prompt.index,
        ended_by=row.tokens[-1] if row.tokens[-1] in stop_ids else None,
    )


def decode_with_turns(
    decode_turn: DecodeTurn,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    environment: Environment,
    *,
    texts_of: Callable[[list[list[int]]], list[str]],
    budget: int,
    pad_id: int,
    stop_ids: Collection[int] = (),
    anyone: Callable[[bool], bool] = bool,
    agreeing: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Rollout:
    """Sample one response of at most ``budget`` tokens, answers included, for each row of ``batch``.

    After each turn the environment is asked about the responses that stopped by themselves, by the text that
    ``texts_of`` makes of their tokens. A text that answers is tokenised as it stands, messages as the chat template
    puts them behind a turn that one of ``stop_ids`` has ended. A response whose answer leaves no token to write, and
    one that has a turn cut by its budget, counts as cut off, without the answer. Where all ranks run in step,
    ``anyone(flag)`` is whether any of them goes on, and what the environment raises inside ``agreeing()`` on one of
    them ends all.
    """
    rows = [Conversation(prompt) for prompt in batch.prompts]
    going = list(range(len(rows)))
    for turn in range(environment.max_turns):
        part = PromptBatch(tuple(rows[i].so_far for i in going), tuple(batch.samples[i] for i in going))
        rollout = decode_turn(part, [environment.budget(budget - len(rows[i].tokens)) for i in going], turn)
        spoken = [rows[i].go_on(rollout, place) for place, i in enumerate(going)]
        for i, text in zip(going, texts_of(spoken), strict=True):
            rows[i].turns.append({"role": "assistant", "content": text})
        if turn + 1 == environment.max_turns:
            break
        stopped = [i for i in going if rows[i].finished]
        with agreeing():
            texts = texts_of([rows[i].tokens for i in stopped])
            answers = environment.answers([rows[i] for i in stopped], texts, turn) if stopped else []
            said = [(rows[i], i, answer) for i, answer in zip(stopped, answers, strict=True) if answer is not None]
            tokens = [answer_tokens(row, answer, environment, tokenizer, stop_ids) for row, _, answer in said]
            going = [
                i for (row, i, answer), each in zip(said, tokens, strict=True) if row.take_answer(answer, each, budget)
            ]
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
        turns=tuple(tuple(row.turns) for row in rows),
        drawn_logprobs=None if whole else block("drawn", 0.0, torch.float32),
    )
