"""What changes a row's logits before a token is chosen: biases of tokens, a penalty on tokens that are there already,
and words that must not be written.

Order and arithmetic are those of transformers' ``generate``: ``SequenceBiasLogitsProcessor`` with single tokens, then
``RepetitionPenaltyLogitsProcessor``, then ``NoBadWordsLogitsProcessor``, all before the temperature. Each row goes by
its own prompt and what it has written itself, whatever slot it is in. Nothing here makes the CPU wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_toolkit.types import Prompt

ANY, NONE = -1, -2
"""In place of a token id: whatever stands there, and nothing that stands there."""


@dataclass(frozen=True)
class LogitRules:
    """How logits are changed.

    ``bias``: (token id, number to add), each id once. ``penalty``: the logit of each token of prompt and response is
    divided by it where it is above 0, and multiplied where it is below; 1 changes nothing. ``bad_words``: token ids of
    each word, whose last token cannot be drawn where those before it are the newest of prompt and response.
    Source of the penalty: Keskar et al., "CTRL" (arXiv 1909.05858), section 4.1.
    """

    bias: tuple[tuple[int, float], ...] = ()
    penalty: float = 1.0
    bad_words: tuple[tuple[int, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.bias or self.bad_words) or self.penalty != 1.0


class LogitChanges:
    """``rules`` for rows that go on from ``prompts`` by at most ``budget`` tokens, on ``device``.

    ``history`` (B, W) holds each row's tokens, filled up with its first one: a token that is there twice changes
    nothing.
    """

    def __init__(self, rules: LogitRules, prompts: Sequence[Prompt], budget: int, device: torch.device) -> None:
        self.rules, ids = rules, [list(prompt.token_ids) for prompt in prompts]
        width = max(map(len, ids), default=0) + budget
        filled = [row + row[:1] * (width - len(row)) for row in ids]
        self.history = torch.tensor(filled, dtype=torch.long, device=device).reshape(len(ids), width)
        self.starts = torch.tensor([len(row) for row in ids], dtype=torch.long, device=device)
        self.biased = torch.tensor([token for token, _ in rules.bias], dtype=torch.long, device=device)
        self.bias = torch.tensor([number for _, number in rules.bias], device=device)
        reach = max((len(word) - 1 for word in rules.bad_words), default=0)
        before = [[ANY] * (reach + 1 - len(word)) + list(word[:-1]) for word in rules.bad_words]
        self.before = torch.tensor(before, dtype=torch.long, device=device).reshape(len(before), reach)
        self.last = torch.tensor([word[-1] for word in rules.bad_words], dtype=torch.long, device=device)
        self.reach = torch.arange(-reach, 0, device=device)

    def note(self, rows: Tensor, now: Tensor, tokens: Tensor) -> None:
        """``rows`` (n,) have written ``tokens`` (n,) behind the ``now`` (n,) tokens of before."""
        self.history[rows, self.starts[rows] + now] = tokens

    def changed(self, logits: Tensor, rows: Tensor, now: Tensor) -> Tensor:
        """The logits (n, V) fp32 of the next token of ``rows`` (n,), which have written ``now`` (n,), after all rules;
        ``logits`` stay as they are."""
        if self.rules.bias:
            logits = logits.index_add(1, self.biased, self.bias.expand(len(logits), -1))
        if self.rules.penalty != 1.0:
            there = self.history[rows]
            own = logits.gather(1, there)
            penalised = torch.where(own < 0, own * self.rules.penalty, own / self.rules.penalty)
            logits = logits.scatter(1, there, penalised)
        if self.rules.bad_words:
            last = self.last.expand(len(logits), -1)
            logits = logits.scatter_reduce(1, last, self._bans(rows, now), "amin")
        return logits

    def _bans(self, rows: Tensor, now: Tensor) -> Tensor:
        """(n, words): minus infinity where a bad word would be completed, infinity where not."""
        places = (self.starts[rows] + now)[:, None] + self.reach
        newest = self.history[rows].gather(1, places.clamp(min=0)).where(places >= 0, NONE)
        begun = ((newest[:, None] == self.before) | (self.before == ANY)).all(-1)
        return torch.where(begun, -torch.inf, torch.inf)
