"""The decode loop: prompts in, responses with log-probs and a finished flag out.

A fixed number of sequences, the slots, is in flight. A sequence that has finished leaves, the next prompt enters, so
that nobody decodes padding; memory for keys and values is slots x (the longest prompt with its token budget) whatever
the number of prompts. What a row's tokens are follows from its own logits and its own random stream: order, slots and
company do not matter.

``decode`` is the loop, ``InFlight`` what it moves: the slots, where prompts enter (``prefill``), every step adds a
token to each living sequence, and those that have ended leave. ``Responses`` chooses the tokens and keeps them, row by
row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from rlhf_toolkit.errors import NotFiniteError, shortened
from rlhf_toolkit.models.finite import WAYS_OUT, first_not_finite
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.slot_cache import SlotCache, full_attention_only
from rlhf_toolkit.planning.memory import PREFILL_TOKENS
from rlhf_toolkit.rollout.logit_changes import LogitChanges, LogitRules
from rlhf_toolkit.rollout.prefill import common_prefix, prefill
from rlhf_toolkit.rollout.sampling import choose_tokens
from rlhf_toolkit.seeding import derived_generator
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout

IDLE_SHARE = 0.25  # slots that nobody will enter any more are given up when they are at least this share
ENTRY_SHARE = 0.125  # prompts enter when at least this share of the slots is free: entering costs a forward pass
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
    min_p: float = 0.0
    rules: LogitRules = LogitRules()  # noqa: RUF009  frozen
    stop_strings: tuple[str, ...] = ()
    greedy: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether tokens are drawn from the policy's whole tempered distribution."""
        return not (self.top_k or self.top_p < 1.0 or self.min_p or self.rules)


class Pace(Protocol):
    """Whether a rank may run forward passes as it likes (``Alone``) or must run as many as all others (streaming)."""

    def together(self, phase: str = "sampling") -> AbstractContextManager[object]:
        """The context in which all passes of a batch run."""

    def forward_pass(self, idle: Callable[[], object] | None = None) -> AbstractContextManager[object]:
        """The context in which a rank that has work runs one forward pass; ``idle`` is one like it over next to
        nothing, in case that it fails."""

    def until_others_finish(self, idle: Callable[[], object]) -> None:
        """Run ``idle`` as often as other ranks need a partner. Called once, when this rank has no more work."""


class Alone:
    """The pace in the window, where a forward pass needs no other rank: nothing is done around any of them."""

    def together(self, phase: str = "sampling") -> AbstractContextManager[object]:
        """A context that does nothing: no other rank has to hear of a failure."""
        return nullcontext()

    def forward_pass(self, idle: Callable[[], object] | None = None) -> AbstractContextManager[object]:
        """A context that does nothing: the pass waits for no other rank."""
        return nullcontext()

    def until_others_finish(self, idle: Callable[[], object]) -> None:
        """Return at once: no other rank needs a partner."""


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
    and its sample number. ``slots`` are sequences in flight, by default all; prompts that enter at once have at most
    ``prefill_tokens``, unless a single one is longer; ``budgets`` are tokens for each row, by default
    ``sampling.max_new_tokens`` for all. Prompts whose responses are ``expected`` to be long begin first, so that the
    tail is short. ``on_tokens`` hears of the tokens made in each step, ``on_finished`` of each row that ends, with its
    tokens. Raises NotFiniteError where a row's logits are NaN or infinite.
    """
    budgets, pace = [sampling.max_new_tokens] * len(batch) if budgets is None else list(budgets), pace or Alone()
    with pace.together():
        responses = Responses(tokenizer, batch, sampling, budgets, stream, next(model.parameters()).device)
        state = InFlight(
            model, responses, longest_first(batch, expected), slots or len(batch), pace, prefill_tokens, on_finished
        )
        while state.waiting or state.living:
            on_tokens(state.enter() if state.may_enter() else state.step())
        pace.until_others_finish(state.idle)
    return responses.rollout()


class InFlight:
    """The sequences in flight. ``waiting`` are the rows that have not begun, in the order in which they will begin.
    ``living`` are the slots whose sequences go on, ``free`` those that the next sequences may enter, and ``row[slot]``
    is a sequence's row in ``responses``."""

    def __init__(
        self,
        model: SharedBase,
        responses: Responses,
        waiting: list[int],
        slots: int,
        pace: Pace,
        prefill_tokens: int = PREFILL_TOKENS,
        on_finished: Callable[[int, list[int]], None] = lambda row, tokens: None,
    ) -> None:
        self.model, self.responses, self.waiting, self.pace = model, responses, waiting, pace
        self.prefill_tokens, self.on_finished, self.device = prefill_tokens, on_finished, responses.device
        config, slots = model.causal_lm.config, min(slots, len(waiting))
        capacity = responses.columns + SPARE_COLUMNS
        self.cache = SlotCache(config, slots=slots, capacity=capacity, device=self.device)
        self.shares_prefix = full_attention_only(config)
        self.free, self.row = list(range(slots)), torch.zeros(slots, dtype=torch.long)
        self.tokens = torch.zeros(slots, 1, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(slots, 1, dtype=torch.long, device=self.device)
        self._go_on_with([])

    def may_enter(self) -> bool:
        """Whether enough slots are free for a prefill to be worth its pass, or nothing else is left to do."""
        total = len(self.free) + len(self.living)
        return bool(self.waiting) and bool(self.free) and (len(self.free) >= ENTRY_SHARE * total or not self.living)

    def enter(self) -> int:
        """Prefill the next prompts, put them into free slots and sample their first tokens; return how many."""
        rows, once, width = list[int](), dict[tuple[int, ...], Prompt](), 0  # a group's prompt is computed once
        while self.waiting and len(rows) < len(self.free):
            prompt = self.responses.batch.prompts[self.waiting[0]]
            width = max(width, len(prompt.token_ids))
            if rows and width * (len(once) + 1) > self.prefill_tokens and prompt.token_ids not in once:
                break
            once[prompt.token_ids] = prompt
            rows.append(self.waiting.pop(0))
        prompts = list(once.values())
        lengths = [len(prompt.token_ids) for prompt in prompts]
        number = {prompt.token_ids: i for i, prompt in enumerate(prompts)}
        source = [number[self.responses.batch.prompts[row].token_ids] for row in rows]
        cache, mask, logits = prefill(
            self._forward,
            prompts,
            self._new_cache(),
            shared=common_prefix(prompts) if self.shares_prefix else 0,
            pad_id=self.responses.sampling.pad_id,
            device=self.device,
        )
        slots = [self.free.pop(0) for _ in rows]
        self.cache.make_room(self.living, entering=max(lengths))
        self.cache.admit(cache, mask, lengths, source, slots)
        self.row[slots] = torch.tensor(rows)
        chosen = torch.tensor(slots, device=self.device)
        self.positions[chosen, 0] = torch.tensor([lengths[i] for i in source], device=self.device)
        self._go_on_with(self.living + slots)
        self._write(slots, chosen, torch.tensor(rows, device=self.device), logits[source])
        return len(rows)

    def step(self) -> int:
        """Add one token to every living sequence; return how many tokens that made."""
        self.cache.make_room(self.living)
        logits = self._forward(self.tokens, self.cache.step_mask, self.positions, self.cache)
        self.cache.advance()
        self.positions += 1
        slots = self.living
        self._write(slots, self.chosen, self.rows, logits[self.chosen])
        return len(slots)

    def idle(self) -> None:
        """Run a forward pass whose result nobody reads, as the partner of ranks that still have work."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.model.next_token_logits(one, one + 1, one, self._new_cache())

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        cache: DynamicCache | SlotCache,
        *last: torch.Tensor,
    ) -> torch.Tensor:
        with self.pace.forward_pass(self.idle):
            return self.model.next_token_logits(ids, mask, positions, cache, *last)

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.causal_lm.config)

    def _write(self, slots: list[int], chosen: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Write the next token of each of ``slots`` from ``logits`` (n, V); free the slots whose sequences end.

        ``chosen`` and ``rows`` (n,) are the slots and their rows, on the device. Reading which sequences end, and which
        have logits that are not finite, is the one time in a step that the CPU waits for a GPU.
        """
        tokens, ends = self.responses.add(rows, logits)
        self.tokens[chosen, 0] = tokens
        told = dict(zip(slots, ends.tolist(), strict=True))
        broken = [slot for slot, end in told.items() if end != end]
        if broken:
            row = int(self.row[broken[0]])
            prompt, written = self.responses.batch.prompts[row], self.responses.before_last(row)
            ids = torch.tensor([[*prompt.token_ids, *written]], device=self.device)
            cache, positions = self._new_cache(), torch.arange(ids.shape[1], device=self.device)[None]
            place = first_not_finite(self.model, lambda: self._forward(ids, torch.ones_like(ids), positions, cache))
            raise NotFiniteError(
                f"the policy's logits are NaN or infinite at token {len(written) + 1} of a response to prompt "
                f"{prompt.index}, {shortened(prompt.text)}: {place}; {WAYS_OUT}"
            )
        ended = [slot for slot, end in told.items() if end]
        if ended:
            for row, response in self.responses.written(self.row[ended]):
                self.on_finished(row, response)
            self.free += ended
            # An idle slot is computed along and must not count beyond what a model can embed.
            self.positions[torch.tensor(ended, device=self.device)] = 0
            self._go_on_with([slot for slot in self.living if slot not in set(ended)])
        self._give_up_idle_slots()

    def _give_up_idle_slots(self) -> None:
        """Go on without the free slots where no row waits for them and they are at least ``IDLE_SHARE`` of all."""
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


class Responses:
    """The responses to the rows of ``batch``, as far as they are written, on ``device``. No sequence outgrows
    ``columns`` columns."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        sampling: Sampling,
        budgets: list[int],
        stream: Sequence[int | str],
        device: torch.device,
    ) -> None:
        self.tokenizer, self.batch, self.sampling, self.device = tokenizer, batch, sampling, device
        self.columns = most_columns(batch.prompts, budgets)
        rows, budget = len(batch), max(budgets, default=1)
        self.budgets = torch.tensor(budgets, device=device)
        self.uniforms = None if sampling.greedy or not rows else uniforms_of(batch, budget, stream).to(device)
        self.stop_ids = torch.tensor(sampling.stop_ids, device=device)
        self.tokens = torch.full((rows, budget), sampling.pad_id, device=device)
        self.logprobs = torch.zeros(rows, budget, device=device)
        self.drawn = None if sampling.is_whole or sampling.greedy else torch.zeros(rows, budget, device=device)
        self.changes = LogitChanges(sampling.rules, batch.prompts, budget, device) if sampling.rules else None
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)

    def add(self, rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose and write the next token of each of ``rows`` (n,) from ``logits`` (n, V).

        Returns the tokens (n,), and for each row (n,) 1 where it ends with them, 0 where it goes on, and NaN where the
        token's log-prob is not finite.
        """
        s, now = self.sampling, self.lengths[rows]
        uniforms = None if self.uniforms is None else self.uniforms[rows, now]
        changed = None if self.changes is None else partial(self.changes.changed, rows=rows, now=now)
        filters: dict[str, Any] = {"top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}
        choice = choose_tokens(logits, uniforms, temperature=s.temperature, **filters, changed=changed)
        tokens, logprobs = choice.tokens, choice.logprobs
        self.tokens[rows, now], self.logprobs[rows, now] = tokens, logprobs
        if self.drawn is not None:
            self.drawn[rows, now] = choice.drawn
        if self.changes is not None:
            self.changes.note(rows, now, tokens)
        self.lengths[rows] = length = now + 1
        finished = torch.isin(tokens, self.stop_ids)
        if s.stop_strings:
            # A token may be a single byte, so this many hold the longest string.
            reach = max(len(string.encode()) for string in s.stop_strings) + 4
            newest = zip(self.tokens[rows].tolist(), length.tolist(), strict=True)
            texts = self.tokenizer.batch_decode([row[max(0, end - reach) : end] for row, end in newest])
            stopped = [any(string in text for string in s.stop_strings) for text in texts]
            finished |= torch.tensor(stopped, dtype=torch.bool, device=self.device)
        self.finished[rows] = finished
        over = finished | (length == self.budgets[rows])
        return tokens, torch.add(over, logprobs, alpha=0)

    def written(self, rows: torch.Tensor) -> Iterator[tuple[int, list[int]]]:
        """Each of ``rows`` (n,), on the CPU, with its tokens."""
        here = rows.to(self.device)
        made = zip(rows.tolist(), self.tokens[here].tolist(), self.lengths[here].tolist(), strict=True)
        return ((row, tokens[:length]) for row, tokens, length in made)

    def before_last(self, row: int) -> list[int]:
        """The tokens of ``row`` but its newest."""
        tokens: list[int] = self.tokens[row, : int(self.lengths[row]) - 1].tolist()
        return tokens

    def rollout(self) -> Rollout:
        """The results, on the CPU, cut to the longest response."""
        width = max(1, int(self.lengths.max())) if len(self.lengths) else 1
        return Rollout(
            responses=self.tokens[:, :width].cpu(),
            lengths=self.lengths.cpu(),
            rollout_logprobs=self.logprobs[:, :width].cpu(),
            finished=self.finished.cpu(),
            drawn_logprobs=None if self.drawn is None else self.drawn[:, :width].cpu(),
        )


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


def uniforms_of(batch: PromptBatch, budget: int, stream: Sequence[int | str]) -> torch.Tensor:
    """(B, budget) float64 in [0, 1): each row from the stream of its own prompt and sample."""
    rows = [
        torch.rand(budget, generator=derived_generator(*stream, prompt.index, sample), dtype=torch.float64)
        for prompt, sample in zip(batch.prompts, batch.samples, strict=True)
    ]
    return torch.stack(rows)
