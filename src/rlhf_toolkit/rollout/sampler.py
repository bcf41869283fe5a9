"""Where and how responses are sampled: in the window or streamed, with how many slots, with which weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from rlhf_toolkit.data.response_texts import response_texts
from rlhf_toolkit.distributed import stopping
from rlhf_toolkit.distributed.collectives import agreement, any_rank, rank, world_size
from rlhf_toolkit.distributed.streaming import streamed
from rlhf_toolkit.distributed.topology import free_memory
from rlhf_toolkit.distributed.zero3 import gathered, is_sharded, offloads_optimizer, zero_stage
from rlhf_toolkit.errors import OutOfMemoryError
from rlhf_toolkit.models.decoding_weights import EXACT, decoding_weights
from rlhf_toolkit.models.inference import bare, inference
from rlhf_toolkit.models.roles import POLICY
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.slot_cache import column_bytes, state_bytes
from rlhf_toolkit.models.state_steps import steps_in_place
from rlhf_toolkit.planning.memory import STREAM, WINDOW, Placement, place
from rlhf_toolkit.rollout.decoding import Alone, Pace, Sampling, decode
from rlhf_toolkit.rollout.sizes import Estimate, RolloutSize, model_size, needs_of, sharding
from rlhf_toolkit.rollout.turns import Environment, decode_with_turns
from rlhf_toolkit.texts import say
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout


class Sampler:
    """Samples with the policy of an engine's model. ``mode``, ``slots`` and ``weights`` are those of the experiment;
    what is left open is chosen at first use from the memory that is free then, the same on every rank. ``left_out`` are
    the ids that no text of a response has; None: the tokenizer's special tokens (``response_texts``)."""

    placement: Placement | None = None
    estimate: Estimate | None = None
    retries = 0
    """How often memory has run out in a rollout."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        size: RolloutSize,
        *,
        mode: str = WINDOW,
        slots: int | None = None,
        weights: str = EXACT,
        on_tokens: Callable[[int], None] = lambda count: None,
        environment: Environment | None = None,
        left_out: Collection[int] | None = None,
    ) -> None:
        self.tokenizer, self.size, self.environment, self.left_out = tokenizer, size, environment, left_out
        self.mode, self.slots, self.weights, self.on_tokens = mode, slots, weights, on_tokens
        self._pace: Pace = Alone()

    def texts(self, rows: list[list[int]]) -> list[str]:
        """What rewards, the environment and samples read of responses of these tokens."""
        return response_texts(rows, self.tokenizer, self.left_out)

    def place(self, model: nn.Module) -> Placement:
        """Decide, once, how rollouts run. A collective. Raises ConfigError where nothing fits."""
        if self.placement is None:
            shared = bare(model)
            free, sharded = free_memory(next(shared.parameters()).device), is_sharded(model)
            with streamed(model) as pace, inference(model), pace.together("the first pass"):
                cache = one_token(shared, pace)
            on_cpu = next(shared.parameters()).device.type == "cpu"
            size = model_size(shared, column_bytes(cache), state=state_bytes(cache), on_cpu=on_cpu)
            how = sharding(
                size,
                ranks=world_size(),
                stage=zero_stage(model),
                on_cpu=on_cpu,
                offloaded=offloads_optimizer(model),
                eight_bit=self.size.eight_bit,
            )
            self.estimate = Estimate(size, how, needs_of(size, how, self.size, self.weights))
            self.placement = place(
                self.estimate.needs, free=free, rows=self.size.rows, mode=self.mode, slots=self.slots, sharded=sharded
            )
        return self.placement

    @contextmanager
    def opened(self, model: nn.Module) -> Iterator[SharedBase]:
        """Inside, the yielded SharedBase can decode and run roles, without autograd."""
        if self.place(model).mode == STREAM:
            with streamed(model) as self._pace, inference(model) as shared:
                yield shared
        else:
            self._pace = Alone()
            with gathered(model), inference(model) as shared:
                yield shared

    def decode(
        self,
        shared: SharedBase,
        batch: PromptBatch,
        sampling: Sampling,
        *,
        stream: Sequence[int | str],
        expected: Callable[[Prompt], float] = lambda prompt: 0.0,
        on_finished: Callable[[int, list[int]], None] = lambda row, tokens: None,
    ) -> Rollout:
        """Sample one response for each row of ``batch``, of several turns where there is an environment
        (``decoding.decode``, ``turns.decode_with_turns``). Called inside ``opened``; what one rank fails with, all
        raise. Where memory runs out on one, all sample again with half the slots: responses do not depend on them."""
        told = set[int]()

        def count(tokens: int) -> None:
            """After each step: what is raised here all ranks raise."""
            stopping.check()
            self.on_tokens(tokens)

        def tell_once(row: int, tokens: list[int]) -> None:
            """A row that has ended ends with the same tokens when it is sampled again."""
            if row not in told:
                told.add(row)
                on_finished(row, tokens)

        while True:
            try:
                return self._attempt(
                    shared, batch, sampling, stream=stream, expected=expected, on_tokens=count, on_finished=tell_once
                )
            except OutOfMemoryError as error:
                if self.placement is None or self.placement.slots == 1:
                    raise
                said = str(error)  # the error itself holds the frames of the attempt, and they its tensors
            slots, tokens = self.placement.slots // 2, max(1, self.placement.prefill_tokens // 2)
            self.placement = replace(self.placement, slots=slots, prefill_tokens=tokens)  # from now on, on all ranks
            self.note_retry(f"a rollout is sampled again with {slots} slot(s)", said)

    def note_retry(self, what: str, said: str) -> None:
        """Count work of a rollout that all ranks do again after ``said``, and say ``what`` on rank 0."""
        self.retries += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if rank() == 0:
            say(f"{what}: {said}")

    def _attempt(
        self,
        shared: SharedBase,
        batch: PromptBatch,
        sampling: Sampling,
        *,
        stream: Sequence[int | str],
        expected: Callable[[Prompt], float],
        on_tokens: Callable[[int], None],
        on_finished: Callable[[int, list[int]], None],
    ) -> Rollout:
        alone, environment = isinstance(self._pace, Alone), self.environment
        options: dict[str, Any] = {"expected": expected, "pace": self._pace, "on_tokens": on_tokens}
        if self.placement is not None:
            options |= {"slots": self.placement.slots, "prefill_tokens": self.placement.prefill_tokens}
        if environment is None:
            options["on_finished"] = on_finished

        def turn(part: PromptBatch, budgets: list[int] | None, number: int) -> Rollout:
            """What the policy writes in one turn. The first has the random stream of a response of a single turn."""
            name = stream if number == 0 else (*stream, "turn", number)
            return decode(shared, self.tokenizer, part, sampling, stream=name, budgets=budgets, **options)

        # Around a whole decode in the window. While streaming ``InStep`` takes care of its forward passes.
        agreeing = agreement("sampling") if alone else nullcontext()
        keep = self.placement is None or self.placement.keeps_matrices
        weights = decoding_weights(shared, POLICY, self.weights, keep_matrices=keep)
        with agreeing, weights, steps_in_place(shared), bare_tensors(self._pace):
            if environment is None:
                rollout = turn(batch, None, 0)
            else:
                rollout = decode_with_turns(
                    turn,
                    self.tokenizer,
                    batch,
                    environment,
                    texts_of=self.texts,
                    budget=sampling.max_new_tokens,
                    pad_id=sampling.pad_id,
                    stop_ids=sampling.stop_ids,
                    # In the window ranks take as many turns as they need; while streaming, all take as many.
                    anyone=bool if alone else any_rank,
                    agreeing=nullcontext if alone else partial(agreement, "the environment"),
                )
                # In the window the agreement around all of it hears of this as well: one within another would hang.
                with nullcontext() if alone else agreement("sampling"):
                    for row, tokens in enumerate(tokens_of(rollout)):
                        on_finished(row, tokens)
        return copied(rollout)


def copied(rollout: Rollout) -> Rollout:
    """A copy of ``rollout`` in ordinary tensors: those made under ``bare_tensors`` can have no part in autograd."""
    columns = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    clones: dict[str, Any] = {name: x.clone() for name, x in columns.items() if isinstance(x, torch.Tensor)}
    return replace(rollout, **clones)


def tokens_of(rollout: Rollout) -> list[list[int]]:
    """The tokens of each response, without padding."""
    return [row[:length] for row, length in zip(rollout.responses.tolist(), rollout.lengths.tolist(), strict=True)]


def bare_tensors(pace: Pace) -> AbstractContextManager[object]:
    """In the window, tensors without autograd's bookkeeping: a decode step has some 2,000 operations, and without it
    takes a twelfth less time. ZeRO's hooks, which stay on while streaming, write to parameters and need it."""
    return torch.inference_mode() if isinstance(pace, Alone) else nullcontext()


def one_token(shared: SharedBase, pace: Pace) -> DynamicCache:
    """The cache of one token that every rank decodes: what keys, values and states take is measured in it, exact for
    every architecture."""
    one = torch.ones(1, 1, dtype=torch.long, device=next(shared.parameters()).device)

    def decode_one() -> DynamicCache:
        cache = DynamicCache(config=shared.causal_lm.config)
        shared.next_token_logits(one, one, one - 1, cache)
        return cache

    with pace.forward_pass(decode_one):
        cache = decode_one()
    pace.until_others_finish(decode_one)
    return cache
