"""The decode loop: prompts in, responses with log-probs and a finished flag out.

It runs inside the gathered window, where a forward pass needs no other rank, so ranks may finish at different times.
Rows that have finished leave the batch as soon as a quarter of it is idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.rollout.sampling import choose_tokens
from rlhf_toolkit.seeding import derived_generator
from rlhf_toolkit.types import PromptBatch, Rollout

IDLE_SHARE = 0.25  # finished rows are removed from the batch when they are at least this share of it


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop. ``greedy`` takes the most likely token and needs no random stream."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    greedy: bool = False


def decode(
    model: SharedBase,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    sampling: Sampling,
    *,
    stream: Sequence[int | str],
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Rollout:
    """Sample one response for each row of ``batch`` with the policy.

    ``stream`` names the random stream, such as (seed, rollout); a row's own numbers derive from it, its prompt's index
    and its sample number. ``on_tokens`` hears of the tokens made in each step.
    """
    state = _Decoding(model, tokenizer, batch, sampling, stream)
    while state.active.numel():
        on_tokens(state.step())
    return state.rollout()


class _Decoding:
    """A batch in flight. ``active`` (A,) are the rows of the results that the model's batch still holds, in its
    order."""

    def __init__(
        self,
        model: SharedBase,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        sampling: Sampling,
        stream: Sequence[int | str],
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.device = next(model.parameters()).device
        rows, budget = len(batch), sampling.max_new_tokens
        self.inputs, self.mask = left_padded(batch, pad_id=sampling.pad_id)
        self.inputs, self.mask = self.inputs.to(self.device), self.mask.to(self.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=model.causal_lm.config)
        self.uniforms = None if sampling.greedy else _uniforms(batch, budget, stream).to(self.device)
        self.stop_ids = torch.tensor(sampling.stop_ids, device=self.device)
        self.responses = torch.full((rows, budget), sampling.pad_id, device=self.device)
        self.logprobs = torch.zeros(rows, budget, device=self.device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self.active = torch.arange(rows, device=self.device)
        self.now = 0

    def step(self) -> int:
        """Add one token to every row that has not finished; return how many tokens that made."""
        logits = self.model.next_token_logits(self.inputs, self.mask, self.positions, self.cache)
        s, t, rows = self.sampling, self.now, self.active
        uniforms = None if self.uniforms is None else self.uniforms[rows, t]
        tokens, logprobs = choose_tokens(logits, uniforms, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
        going = ~self.finished[rows]
        self.responses[rows[going], t] = tokens[going]
        self.logprobs[rows[going], t] = logprobs[going]
        self.lengths[rows[going]] += 1
        self.finished[rows[going]] = torch.isin(tokens[going], self.stop_ids) | self._stop_string_seen(rows[going])
        self.now += 1
        self._advance(tokens)
        return int(going.sum())

    def rollout(self) -> Rollout:
        """The results, on the CPU, cut to the longest response."""
        width = max(1, int(self.lengths.max()))
        return Rollout(
            responses=self.responses[:, :width].cpu(),
            lengths=self.lengths.cpu(),
            rollout_logprobs=self.logprobs[:, :width].cpu(),
            finished=self.finished.cpu(),
        )

    def _advance(self, tokens: torch.Tensor) -> None:
        """Make ``tokens`` the next step's input, and let finished rows leave when enough of the batch is idle."""
        self.inputs, self.positions = tokens[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        going = ~self.finished[self.active]
        if self.now == self.sampling.max_new_tokens or not bool(going.any()):
            self.active = self.active[:0]
        elif int((~going).sum()) >= IDLE_SHARE * len(going):
            keep = going.nonzero().squeeze(1)
            self.cache.reorder_cache(
                cast(torch.LongTensor, keep)
            )  # batch_select_indices, its twin, is missing where a layer convolves
            self.active, self.inputs = self.active[keep], self.inputs[keep]
            self.mask, self.positions = self.mask[keep], self.positions[keep]

    def _stop_string_seen(self, rows: torch.Tensor) -> torch.Tensor:
        """(A,) bool: a stop string ends within the newest tokens of each row's response."""
        strings = self.sampling.stop_strings
        if not strings:
            return torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        reach = (
            max(len(s.encode()) for s in strings) + 4
        )  # a token may be a single byte, so this many hold the longest string
        tails = self.responses[rows, max(0, self.now + 1 - reach) : self.now + 1]
        texts = self.tokenizer.batch_decode(tails)
        return torch.tensor([any(s in text for s in strings) for text in texts], dtype=torch.bool, device=self.device)


def left_padded(batch: PromptBatch, *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as (B, P) ids and mask (B, P) int64, padded on the left so that all rows continue at the same column."""
    width = max(len(prompt.token_ids) for prompt in batch.prompts)
    ids = torch.full((len(batch), width), pad_id)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, prompt in enumerate(batch.prompts):
        ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, width - len(prompt.token_ids) :] = 1
    return ids, mask


def _uniforms(batch: PromptBatch, budget: int, stream: Sequence[int | str]) -> torch.Tensor:
    """(B, budget) float64 in [0, 1): each row from the stream of its own prompt and sample."""
    rows = [
        torch.rand(budget, generator=derived_generator(*stream, prompt.index, sample), dtype=torch.float64)
        for prompt, sample in zip(batch.prompts, batch.samples, strict=True)
    ]
    return torch.stack(rows)
