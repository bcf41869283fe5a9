"""The decode loop: prompts in, responses with log-probs and a finished flag out.

A fixed number of sequences, the slots, is in flight. A sequence that has finished leaves, the next prompt enters, so
that nobody decodes padding; memory for keys and values is slots x (the longest prompt with its token budget) whatever
the number of prompts. What a row's tokens are follows from its own logits and its own random stream: order, slots and
company do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from rlhf_toolkit.errors import NotFiniteError, shortened
from rlhf_toolkit.models.finite import WAYS_OUT, first_not_finite
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.slot_cache import SlotCache, close_holes, full_attention_only
from rlhf_toolkit.planning.memory import PREFILL_TOKENS
from rlhf_toolkit.rollout.sampling import choose_tokens
from rlhf_toolkit.seeding import derived_generator
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout

IDLE_SHARE = 0.25  # slots that nobody will enter any more are given up when they are at least this share
ENTRY_SHARE = 0.125  # prompts enter when at least this share of the slots is free: entering costs a forward pass
SHARED_PREFIX = 8  # tokens that entering prompts must have in common to be computed once
SPARE_COLUMNS = 32  # of a slot, so that columns move left only now and then


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


class Pace(Protocol):
    """Whether a rank may run forward passes as it likes (``Alone``) or must run as many as all others (streaming)."""

    def together(self) -> AbstractContextManager[object]:
        """Around all passes of a batch."""

    def forward_pass(self) -> AbstractContextManager[object]:
        """Around every forward pass of a rank that has work."""

    def until_others_finish(self, idle: Callable[[], object]) -> None:
        """Called once, when this rank has no more work; runs ``idle`` as often as others need a partner."""


class Alone:
    """In the window a forward pass needs no other rank."""

    def together(self) -> AbstractContextManager[object]:
        """Nobody to tell of a failure."""
        return nullcontext()

    def forward_pass(self) -> AbstractContextManager[object]:
        """Nothing to wait for."""
        return nullcontext()

    def until_others_finish(self, idle: Callable[[], object]) -> None:
        """Nobody to wait for."""


def decode(
    model: SharedBase,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    sampling: Sampling,
    *,
    stream: Sequence[int | str],
    slots: int | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    budgets: Sequence[int] | None = None,
    expected: Callable[[Prompt], float] = lambda prompt: 0.0,
    pace: Pace | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_finished: Callable[[int, list[int]], None] = lambda row, tokens: None,
) -> Rollout:
    """Sample one response for each row of ``batch`` with the policy.

    ``stream`` names the random stream, such as (seed, rollout); a row's own numbers derive from it, its prompt's index
    and its sample number. ``slots`` are sequences in flight, by default all; prompts that enter at
    once have at most ``prefill_tokens``, unless a single one is longer; ``budgets`` are tokens for each row, by
    default ``sampling.max_new_tokens`` for all. Prompts whose responses are ``expected``
    to be long begin first, so that the tail is short. ``on_tokens`` hears of the tokens made in each step,
    ``on_finished`` of each row that ends, with its tokens. Raises NotFiniteError where a row's logits are NaN or
    infinite.
    """
    budgets, pace = [sampling.max_new_tokens] * len(batch) if budgets is None else list(budgets), pace or Alone()
    with pace.together():
        state = _Decoding(model, tokenizer, batch, sampling, stream, slots or len(batch), budgets, expected, pace)
        state.on_finished, state.prefill_tokens = on_finished, prefill_tokens
        while state.waiting or state.living:
            on_tokens(state.enter() if state.may_enter() else state.step())
        pace.until_others_finish(state.idle)
    return state.rollout()


class _Decoding:
    """Sequences in flight. ``living`` are the slots whose sequences go on; ``row[slot]`` is a sequence's row in the
    results."""

    on_finished: Callable[[int, list[int]], None]
    prefill_tokens: int = PREFILL_TOKENS

    def __init__(
        self,
        model: SharedBase,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        sampling: Sampling,
        stream: Sequence[int | str],
        slots: int,
        budgets: list[int],
        expected: Callable[[Prompt], float],
        pace: Pace,
    ) -> None:
        self.model, self.tokenizer, self.batch, self.sampling, self.pace = model, tokenizer, batch, sampling, pace
        self.device = next(model.parameters()).device
        rows, budget, slots = len(batch), max(budgets, default=1), min(slots, len(batch))
        config = model.causal_lm.config
        capacity = most_columns(batch.prompts, budgets) + SPARE_COLUMNS
        self.cache = SlotCache(config, slots=slots, capacity=capacity, device=self.device)
        self.shares_prefix = full_attention_only(config)
        self.waiting = longest_first(batch, expected)
        self.free, self.row = list(range(slots)), torch.zeros(slots, dtype=torch.long)
        self._go_on_with([])
        self.tokens = torch.zeros(slots, 1, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(slots, 1, dtype=torch.long, device=self.device)
        self.budgets = torch.tensor(budgets, device=self.device)
        self.uniforms = None if sampling.greedy or not rows else _uniforms(batch, budget, stream).to(self.device)
        self.stop_ids = torch.tensor(sampling.stop_ids, device=self.device)
        self.responses = torch.full((rows, budget), sampling.pad_id, device=self.device)
        self.logprobs = torch.zeros(rows, budget, device=self.device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=self.device)

    def may_enter(self) -> bool:
        """Enough slots are free for a prefill to be worth its pass, or nothing else is left to do."""
        total = len(self.free) + len(self.living)
        return bool(self.waiting) and bool(self.free) and (len(self.free) >= ENTRY_SHARE * total or not self.living)

    def enter(self) -> int:
        """Prefill the next prompts, put them into free slots and sample their first tokens; return how many."""
        rows, prompts = self._next_rows()
        lengths = [len(prompt.token_ids) for prompt in prompts]
        mask, cache, logits = self._prefill(prompts)
        number = {prompt.token_ids: i for i, prompt in enumerate(prompts)}
        source = [number[self.batch.prompts[row].token_ids] for row in rows]
        slots = [self.free.pop(0) for _ in rows]
        self.cache.make_room(self.living, entering=max(lengths))
        self.cache.admit(cache, mask, lengths, source, slots)
        self.row[slots] = torch.tensor(rows)
        chosen = torch.tensor(slots, device=self.device)
        self.positions[chosen, 0] = torch.tensor([lengths[i] for i in source], device=self.device)
        self._go_on_with(self.living + slots)
        self._record(slots, chosen, torch.tensor(rows, device=self.device), logits[source])
        return len(rows)

    def step(self) -> int:
        """Add one token to every living sequence; return how many tokens that made."""
        self.cache.make_room(self.living)
        logits = self._forward(self.tokens, self.cache.step_mask, self.positions, self.cache)
        self.cache.advance()
        self.positions += 1
        slots = self.living
        self._record(slots, self.chosen, self.rows, logits[self.chosen])
        return len(slots)

    def idle(self) -> None:
        """One forward pass that says nothing, for ranks that still have work."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.model.next_token_logits(one, one + 1, one, DynamicCache(config=self.model.causal_lm.config))

    def rollout(self) -> Rollout:
        """The results, on the CPU, cut to the longest response."""
        width = max(1, int(self.lengths.max())) if len(self.lengths) else 1
        return Rollout(
            responses=self.responses[:, :width].cpu(),
            lengths=self.lengths.cpu(),
            rollout_logprobs=self.logprobs[:, :width].cpu(),
            finished=self.finished.cpu(),
        )

    def _next_rows(self) -> tuple[list[int], list[Prompt]]:
        """Rows that enter now, and their prompts without repetition: a group's prompt is computed once."""
        rows: list[int] = []
        prompts: dict[tuple[int, ...], Prompt] = {}
        width = 0
        while self.waiting and len(rows) < len(self.free):
            prompt = self.batch.prompts[self.waiting[0]]
            width = max(width, len(prompt.token_ids))
            if rows and width * (len(prompts) + 1) > self.prefill_tokens and prompt.token_ids not in prompts:
                break
            prompts[prompt.token_ids] = prompt
            rows.append(self.waiting.pop(0))
        return rows, list(prompts.values())

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """Mask (n, width) without holes, cache and next-token logits (n, V) of prompts; what all have in common is
        computed once, for one row."""
        cache = DynamicCache(config=self.model.causal_lm.config)
        shared = common_prefix(prompts) if self.shares_prefix else 0
        if shared:
            return self._prefill_behind(shared, prompts, cache)
        ids, mask = (each.to(self.device) for each in left_padded(prompts, pad_id=self.sampling.pad_id))
        return mask, cache, self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)

    def _prefill_behind(
        self, shared: int, prompts: Sequence[Prompt], cache: DynamicCache
    ) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """The same where all begin with ``shared`` equal tokens. What follows them is padded on the right: padding
        between two parts of a prompt would spoil a bias by the distance of columns (MPT)."""
        prefix = torch.tensor([prompts[0].token_ids[:shared]], device=self.device)
        self._forward(prefix, torch.ones_like(prefix), torch.arange(shared, device=self.device)[None], cache)
        cache.batch_repeat_interleave(len(prompts))
        rests = right_padded(prompts, pad_id=self.sampling.pad_id, skip=shared)
        ids, rest = (each.to(self.device) for each in rests)
        mask = torch.cat([rest.new_ones(len(prompts), shared), rest], dim=1)
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1)[:, shared:], cache, rest.sum(1) - 1)
        return close_holes(cache, mask), cache, logits

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache | SlotCache,
        *last: torch.Tensor,
    ) -> torch.Tensor:
        with self.pace.forward_pass():
            return self.model.next_token_logits(ids, mask, positions, cache, *last)

    def _record(self, slots: list[int], chosen: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Choose a token for each of ``slots`` from ``logits`` (n, V); free the slots whose sequences end.

        ``chosen`` and ``rows`` (n,) are the slots and their rows, on the device. Reading which sequences end, and which
        have logits that are not finite, is the one time in a step that the CPU waits for a GPU.
        """
        s, now = self.sampling, self.lengths[rows]
        uniforms = None if self.uniforms is None else self.uniforms[rows, now]
        tokens, logprobs = choose_tokens(logits, uniforms, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
        self.responses[rows, now], self.logprobs[rows, now] = tokens, logprobs
        self.tokens[chosen, 0] = tokens
        self.lengths[rows] = length = now + 1
        finished = torch.isin(tokens, self.stop_ids)
        if s.stop_strings:
            finished |= self._stop_string_seen(rows, length)
        self.finished[rows] = finished
        over = finished | (length == self.budgets[rows])
        told = torch.add(over, logprobs, alpha=0).tolist()  # 1 where a sequence ends, NaN where its log-prob is
        broken = [slot for slot, ends in zip(slots, told, strict=True) if ends != ends]
        if broken:
            raise self._not_finite(broken[0])
        ended = [slot for slot, ends in zip(slots, told, strict=True) if ends]
        if ended:
            self._hand_over(self.row[ended])
        self._leave(ended)

    def _not_finite(self, slot: int) -> NotFiniteError:
        """What to say of the row in ``slot``, whose newest token has no log-prob."""
        row = int(self.row[slot])
        prompt, made = self.batch.prompts[row], int(self.lengths[row]) - 1
        written = self.responses[row, :made].tolist()
        ids = torch.tensor([[*prompt.token_ids, *written]], device=self.device)
        cache = DynamicCache(config=self.model.causal_lm.config)
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        place = first_not_finite(self.model, lambda: self._forward(ids, torch.ones_like(ids), positions, cache))
        return NotFiniteError(
            f"the policy's logits are NaN or infinite at token {made + 1} of a response to prompt {prompt.index}, "
            f"{shortened(prompt.text)}: {place}; {WAYS_OUT}"
        )

    def _hand_over(self, rows: torch.Tensor) -> None:
        """Tell of the ``rows`` (n,) that have ended, with their tokens."""
        here = rows.to(self.device)
        made = zip(rows.tolist(), self.responses[here].tolist(), self.lengths[here].tolist(), strict=True)
        for row, tokens, length in made:
            self.on_finished(row, tokens[:length])

    def _leave(self, slots: list[int]) -> None:
        """Free ``slots``; give idle ones up when nobody waits for them."""
        if slots:
            self.free += slots
            # An idle slot is computed along and must not count beyond what a model can embed.
            self.positions[torch.tensor(slots, device=self.device)] = 0
            self._go_on_with([slot for slot in self.living if slot not in set(slots)])
        if self.living and not self.waiting and len(self.free) >= IDLE_SHARE * (len(self.free) + len(self.living)):
            keep = torch.tensor(self.living, device=self.device)
            self.cache.keep(keep)
            self.tokens, self.positions, self.row = self.tokens[keep], self.positions[keep], self.row[keep.cpu()]
            self.free = []
            self._go_on_with(list(range(len(keep))))

    def _go_on_with(self, living: list[int]) -> None:
        """Note the slots whose sequences go on. Where they and their rows are is copied to the device only here: every
        copy makes the CPU wait."""
        self.living, self.rows = living, self.row[living].to(self.device)
        self.chosen = torch.tensor(living, dtype=torch.long, device=self.device)

    def _stop_string_seen(self, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(n,) bool: a stop string ends within the newest tokens of each row's response, of ``lengths`` (n,)."""
        strings = self.sampling.stop_strings
        reach = (
            max(len(s.encode()) for s in strings) + 4
        )  # a token may be a single byte, so this many hold the longest string
        tokens = zip(self.responses[rows].tolist(), lengths.tolist(), strict=True)
        tails = [row[max(0, end - reach) : end] for row, end in tokens]
        texts = self.tokenizer.batch_decode(tails)
        return torch.tensor([any(s in text for s in strings) for text in texts], dtype=torch.bool, device=self.device)


def most_columns(prompts: Sequence[Prompt], budgets: Sequence[int]) -> int:
    """Columns that no sequence outgrows: the largest sum of a prompt and its own budget.

    A response of b tokens writes b - 1 columns, since its first token comes from the prompt's pass and its last is
    never read. So a sequence has at most ``most_columns`` - 1 columns, and one that goes on has one less. All sequences
    end in the same column, so any that are in flight together, entering ones included, stand in as many columns as the
    longest has, and a buffer of ``most_columns`` always has a column for the next step. Budgets of other rows do not
    matter: in a later turn a long prompt has little budget left, and the sum is at most that of the first turn.
    """
    return max((len(p.token_ids) + budget for p, budget in zip(prompts, budgets, strict=True)), default=1)


def longest_first(batch: PromptBatch, expected: Callable[[Prompt], float]) -> list[int]:
    """Rows in the order in which they begin: long ones first, the samples of one prompt side by side."""
    return sorted(
        range(len(batch)), key=lambda row: (-expected(batch.prompts[row]), batch.prompts[row].index, batch.samples[row])
    )


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """Tokens that all ``prompts`` begin with, each keeping one of its own; 0 where sharing them would not pay."""
    first, last = (extreme(prompt.token_ids for prompt in prompts) for extreme in (min, max))
    most = min(len(prompt.token_ids) for prompt in prompts) - 1
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    shared = min(shared, most)
    return shared if len(prompts) > 1 and shared >= SHARED_PREFIX else 0


def left_padded(prompts: Sequence[Prompt], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as (B, P) ids and mask (B, P) int64, padded on the left so that all end in the same column."""
    ids, mask = right_padded(prompts, pad_id=pad_id)
    width = ids.shape[1]
    places = (torch.arange(width) + mask.sum(1, keepdim=True)) % width
    return ids.gather(1, places), mask.gather(1, places)


def right_padded(prompts: Sequence[Prompt], *, pad_id: int, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts without their first ``skip`` tokens as (B, P) ids and mask (B, P) int64, padded on the right."""
    width = max(len(prompt.token_ids) for prompt in prompts) - skip
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        own = prompt.token_ids[skip:]
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    return ids, mask


def _uniforms(batch: PromptBatch, budget: int, stream: Sequence[int | str]) -> torch.Tensor:
    """(B, budget) float64 in [0, 1): each row from the stream of its own prompt and sample."""
    rows = [
        torch.rand(budget, generator=derived_generator(*stream, prompt.index, sample), dtype=torch.float64)
        for prompt, sample in zip(batch.prompts, batch.samples, strict=True)
    ]
    return torch.stack(rows)
