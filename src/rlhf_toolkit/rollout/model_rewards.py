"""Rewards that are models: an adapter on the shared base, or a reward model with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf_toolkit.data.response_texts import response_texts
from rlhf_toolkit.distributed.collectives import all_gather, rank, world_size
from rlhf_toolkit.models.reward_model import RewardModel
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import REWARD
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.rollout.sampled import Sampled
from rlhf_toolkit.rollout.sampler import Sampler
from rlhf_toolkit.types import Prompt


class Passes(Protocol):
    """What runs the forward passes of a rollout; ``scored_sampler.ScoredSampler`` is one."""

    sampler: Sampler

    def pass_in_order(self, shared: SharedBase, sampled: Sampled, *, roles: Sequence[str]) -> RoleOutputs:
        """What ``roles`` say about the responses. A collective."""


class ModelReward(Protocol):
    """Scores a rollout that all ranks hold; ``weight`` times it joins the scores."""

    name: str
    weight: float

    def __call__(self, shared: SharedBase, sampled: Sampled, prompts: Sequence[Prompt], passes: Passes) -> Tensor:
        """(B,) fp32, the same on every rank; ``prompts`` are the rows' own. A collective, inside the window."""


@dataclass
class AdapterReward:
    """The reward role: a frozen adapter and head on the base that all roles share, read at the last token."""

    weight: float = 1.0
    name: str = "adapter"

    def __call__(self, shared: SharedBase, sampled: Sampled, prompts: Sequence[Prompt], passes: Passes) -> Tensor:
        """One pass of the reward role over the rollout."""
        return passes.pass_in_order(shared, sampled, roles=(REWARD,)).reward_scores


@dataclass
class TextReward:
    """A reward model of its own reads the texts; each rank its share.

    It reads them without special tokens, whatever other rewards see: in its own template the policy's would open and
    close turns, or mean nothing.
    """

    model: RewardModel
    weight: float = 1.0
    name: str = "model"

    def __call__(self, shared: SharedBase, sampled: Sampled, prompts: Sequence[Prompt], passes: Passes) -> Tensor:
        """Scores of all rows; ranks take rows in turn."""
        mine, sampler = range(rank(), len(sampled), world_size()), passes.sampler
        texts = response_texts([sampled.tokens_of(i) for i in mine], sampler.tokenizer)
        found = self.model.scores([prompts[i] for i in mine], texts, note_retry=sampler.note_retry)
        scores = torch.zeros(len(sampled))
        for number, share in enumerate(all_gather(found)):
            scores[number :: world_size()] = torch.tensor(share)
        return scores
