"""What sampling gave, on every rank: the rollout of all ranks with its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.masking import response_mask
from rlhf_toolkit.data.layout import join, stack_rows
from rlhf_toolkit.distributed.collectives import all_gather
from rlhf_toolkit.types import PromptBatch, Rollout

Sample = dict[str, str | float]


@dataclass(frozen=True)
class Sampled:
    """A rollout of all ranks on every rank, with its scores: rows are in the rollout's own order, whichever rank has
    sampled them."""

    sequences: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    rollout_logprobs: Tensor
    finished: Tensor
    raw_scores: Tensor
    prompts: list[str] = field(repr=False)
    responses: list[str] = field(repr=False)

    @property
    def token_mask(self) -> Tensor:
        """(B, R) bool, True at real response tokens."""
        return response_mask(self.response_lengths, self.rollout_logprobs.shape[1])

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return (self.prompt_lengths + self.response_lengths).tolist()


def as_samples(sampled: Sampled, scores: Tensor) -> list[Sample]:
    """Prompt, response and score of every row, for the logs."""
    rows = zip(sampled.prompts, sampled.responses, scores.tolist(), strict=True)
    return [{"prompt": prompt, "response": response, "score": value} for prompt, response, value in rows]


def gather_rollout(
    batch: PromptBatch,
    rollout: Rollout,
    texts: list[str],
    scores: list[float],
    shares: Sequence[Sequence[int]],
    *,
    pad_id: int,
) -> Sampled:
    """Put the ranks' shares together on every rank, rows in their own order whichever rank has sampled them."""
    ids = [prompt.token_ids for prompt in batch.prompts]
    mine = {
        "sequences": join(ids, rollout.responses, rollout.lengths, pad_id=pad_id),
        "prompt_lengths": torch.tensor([len(i) for i in ids]),
        "response_lengths": rollout.lengths,
        "rollout_logprobs": rollout.rollout_logprobs,
        "finished": rollout.finished,
        "raw_scores": torch.tensor(scores, dtype=torch.float32),
    }
    everyone = all_gather((mine, [prompt.text for prompt in batch.prompts], texts))
    place = torch.tensor([row for share in shares for row in share]).argsort()
    fills = {"sequences": pad_id}
    columns = {name: stack_rows([part[name] for part, _, _ in everyone], fill=fills.get(name, 0)) for name in mine}
    prompts = [text for _, texts, _ in everyone for text in texts]
    responses = [text for _, _, texts in everyone for text in texts]
    return Sampled(
        **{name: column[place] for name, column in columns.items()},
        prompts=[prompts[i] for i in place.tolist()],
        responses=[responses[i] for i in place.tolist()],
    )
