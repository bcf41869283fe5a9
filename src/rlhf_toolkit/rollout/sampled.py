"""What sampling gave, on every rank: the rollout of all ranks with its scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.masking import length_mask
from rlhf_toolkit.data.layout import join, stack_rows
from rlhf_toolkit.distributed.collectives import all_gather
from rlhf_toolkit.rewards.scores import Scores
from rlhf_toolkit.types import PromptBatch, Rollout

Sample = dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """A rollout of all ranks on every rank, with its scores: rows are in the rollout's own order, whichever rank has
    sampled them.

    ``written`` (B, R) bool, True at tokens of the policy, also where the row goes on with an environment's answer;
    ``raw_scores`` (B,) as the rewards gave them, and ``parts``, each reward's own, NaN where it failed; ``kept`` (B,)
    bool, False where a response has no score and is left out; ``token_rewards`` (B, R), what rewards of tokens put
    elsewhere than on the last one, so that each row's sum is 0; ``groups`` (B,), equal for the responses to one prompt;
    ``baselines`` (B,), the score of the greedy response to the row's prompt, or None; ``drawn_logprobs`` (B, R) in what
    tokens were drawn from, None where that is the policy's whole distribution; ``failures``, how many calls of each
    reward failed; ``dropped``, why there is no score, by the rows that have none.
    """

    sequences: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    rollout_logprobs: Tensor
    finished: Tensor
    written: Tensor
    raw_scores: Tensor
    kept: Tensor
    groups: Tensor
    token_rewards: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    baselines: Tensor | None = None
    drawn_logprobs: Tensor | None = None
    prompts: list[str] = field(repr=False, default_factory=list)
    responses: list[str] = field(repr=False, default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)

    @property
    def token_mask(self) -> Tensor:
        """(B, R) bool, True at tokens that the policy wrote."""
        return length_mask(self.response_lengths, self.written.shape[1]) & self.written

    @property
    def spoiled(self) -> Tensor:
        """(B,) bool, True where a score is not finite, or a reward with ``on_failure: skip`` failed: updates with the
        row are left out."""
        return ~self.kept & self.raw_scores.isnan()

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return (self.prompt_lengths + self.response_lengths).tolist()

    def tokens_of(self, row: int) -> list[int]:
        """The response of ``row``."""
        start = int(self.prompt_lengths[row])
        return self.sequences[row, start : start + int(self.response_lengths[row])].tolist()

    def __len__(self) -> int:
        return len(self.finished)

    def plus(self, name: str, scores: Tensor, weight: float) -> Sampled:
        """With one more reward: ``weight`` times ``scores`` (B,). A row whose score is not finite is spoiled."""
        total, there = self.raw_scores + weight * scores, scores.isfinite()
        failed = {} if there.all() else {name: int((~there).sum())}
        return replace(
            self,
            raw_scores=torch.where(total.isfinite(), total, torch.nan),
            kept=self.kept & total.isfinite(),
            token_rewards=torch.where(total.isfinite()[:, None], self.token_rewards, 0.0),
            parts={**self.parts, name: torch.where(there, scores, torch.nan)},
            failures={**self.failures, **failed},
            dropped={
                row: self.dropped.get(row, f"reward {name} gave {scores[row].item()}")
                for row in (~(self.kept & total.isfinite())).nonzero().flatten().tolist()
            },
        )

    def rows(self, index: Sequence[int]) -> Sampled:
        """The rows ``index``, in that order. ``failures`` stay those of the whole."""
        picked = {name: getattr(self, name)[list(index)] for name in COLUMNS}
        return replace(
            self,
            **picked,
            parts={name: part[list(index)] for name, part in self.parts.items()},
            baselines=None if self.baselines is None else self.baselines[list(index)],
            drawn_logprobs=None if self.drawn_logprobs is None else self.drawn_logprobs[list(index)],
            prompts=[self.prompts[i] for i in index],
            responses=[self.responses[i] for i in index],
            dropped={new: self.dropped[row] for new, row in enumerate(index) if row in self.dropped},
        )


COLUMNS = tuple(each.name for each in fields(Sampled) if each.type == "Tensor")


def as_samples(sampled: Sampled, scores: Tensor) -> list[Sample]:
    """Every row for the logs: prompt, response, score, what each reward gave before its weight, the prompt's ``row`` in
    the dataset and, where there is no score, why; None for what is no number, since JSON has no NaN."""
    parts = {name: part.tolist() for name, part in sampled.parts.items()}
    texts, scored = zip(sampled.prompts, sampled.responses, strict=True), scores.tolist()
    return [
        {
            "prompt": prompt,
            "response": response,
            "score": _finite(scored[i]),
            "rewards": {name: _finite(part[i]) for name, part in parts.items()},
            "row": int(sampled.groups[i]),
            **({"dropped": sampled.dropped[i]} if i in sampled.dropped else {}),
        }
        for i, (prompt, response) in enumerate(texts)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sampled_here(batch: PromptBatch, rollout: Rollout, texts: list[str], scores: Scores, *, pad_id: int) -> Sampled:
    """What one rank has sampled for ``batch``, with its scores."""
    ids, width = [prompt.token_ids for prompt in batch.prompts], rollout.responses.shape[1]
    token_rewards = torch.zeros(len(batch), width)
    for row, rewards in enumerate(scores.token_rewards or []):
        token_rewards[row, : len(rewards)] = torch.tensor(rewards)
        token_rewards[row, len(rewards) - 1] -= scores.totals[row]
    return Sampled(
        sequences=join(ids, rollout.responses, rollout.lengths, pad_id=pad_id),
        prompt_lengths=torch.tensor([len(i) for i in ids]),
        response_lengths=rollout.lengths,
        rollout_logprobs=rollout.rollout_logprobs,
        finished=rollout.finished,
        written=torch.ones(len(batch), width, dtype=torch.bool) if rollout.written is None else rollout.written,
        raw_scores=torch.tensor(scores.totals, dtype=torch.float32),
        kept=torch.tensor(scores.kept),
        groups=torch.tensor([prompt.index for prompt in batch.prompts]),
        token_rewards=token_rewards,
        parts={name: torch.tensor(part, dtype=torch.float32) for name, part in scores.parts.items()},
        drawn_logprobs=rollout.drawn_logprobs,
        prompts=[prompt.text for prompt in batch.prompts],
        responses=texts,
        failures=dict(scores.failures),
        dropped=dict(scores.dropped),
    )


def joined(parts: Sequence[Sampled], *, pad_id: int) -> Sampled:
    """The rows of all ``parts`` under one another; their failures added up."""
    starts = itertools.accumulate((len(part) for part in parts), initial=0)
    fills, drawn = {"sequences": pad_id}, [p.drawn_logprobs for p in parts if p.drawn_logprobs is not None]
    return Sampled(
        **{name: stack_rows([getattr(p, name) for p in parts], fill=fills.get(name, 0)) for name in COLUMNS},
        parts={name: torch.cat([p.parts[name] for p in parts]) for name in parts[0].parts},
        drawn_logprobs=stack_rows(drawn, fill=0) if drawn else None,
        prompts=[text for p in parts for text in p.prompts],
        responses=[text for p in parts for text in p.responses],
        failures={name: sum(p.failures.get(name, 0) for p in parts) for name in parts[0].parts},
        dropped={start + i: why for start, p in zip(starts, parts, strict=False) for i, why in p.dropped.items()},
    )


def gather_rollout(mine: Sampled, shares: Sequence[Sequence[int]], *, pad_id: int) -> Sampled:
    """The ranks' shares together on every rank, rows in their own order whichever rank has sampled them."""
    place = torch.tensor([row for share in shares for row in share]).argsort()
    return joined(all_gather(mine), pad_id=pad_id).rows(place.tolist())
