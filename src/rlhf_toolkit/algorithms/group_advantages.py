"""Advantages from groups: each response is measured against the other responses to the same prompt.

All take one score per response, the sum of its rewards, and give every real token of the response the same advantage.
``groups`` (B,) int64 says which rows answer the same prompt: those with equal numbers. A response alone in its group
has nothing to be measured against: its baseline is 0, as in verl. That is for prompts with one response each; where the
others of a group were dropped, ``rollout.shaping`` gives the one that is left (``groups.left_alone``) the advantage 0.

Where all scores of a group are equal, every advantage is exactly 0 (see ``groups``); verl's is a rounding error, which
GRPO divides by 1e-6.

The returns are what the row still earned from each token on, undiscounted; no advantage here is made from values.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_toolkit.algorithms.groups import group_deviations, group_means, group_sizes, group_sums
from rlhf_toolkit.algorithms.masking import masked_sum, zero_outside
from rlhf_toolkit.algorithms.rewards import reward_to_go


def grpo(rewards: Tensor, mask: Tensor, groups: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Measure each score in standard deviations of its group: ``(s - mean) / (std + epsilon)``.

    The standard deviation is the unbiased one; a response alone in its group keeps its score, over ``1 + epsilon``.

    Shapes: rewards, mask (B, R), groups (B,) -> (advantages, returns), each (B, R), 0 outside the mask.
    Source: Shao et al., arXiv 2402.03300, section 4.1.2.
    """
    scores, alone = _scores(rewards, mask), group_sizes(groups) == 1
    deviations = group_deviations(scores, groups).masked_fill(alone, 1.0)
    return _on_every_token((scores - _baselines(scores, groups)) / (deviations + epsilon), rewards, mask)


def dr_grpo(rewards: Tensor, mask: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the group's mean: ``s - mean``, so that easy and hard prompts weigh alike.

    The other half of Dr. GRPO is the aggregation ``seq-mean-token-sum-norm``.

    Shapes: rewards, mask (B, R), groups (B,) -> (advantages, returns), each (B, R), 0 outside the mask.
    Source: Liu et al., arXiv 2503.20783.
    """
    scores = _scores(rewards, mask)
    return _on_every_token(scores - _baselines(scores, groups), rewards, mask)


def rloo(rewards: Tensor, mask: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean of the *other* responses of the group: ``n / (n - 1) (s - mean)`` for a group of n.

    Shapes: rewards, mask (B, R), groups (B,) -> (advantages, returns), each (B, R), 0 outside the mask.
    Source: Ahmadian et al., arXiv 2402.14740.
    """
    scores, sizes = _scores(rewards, mask), group_sizes(groups)
    others = (sizes - 1).clamp(min=1)
    return _on_every_token((scores - _baselines(scores, groups)) * sizes / others, rewards, mask)


def reinforce_plus_plus_baseline(rewards: Tensor, mask: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the group's mean, ``s - mean``; its source then whitens over the tokens of the whole batch.

    Without that whitening it is ``dr_grpo``.

    Shapes: rewards, mask (B, R), groups (B,) -> (advantages, returns), each (B, R), 0 outside the mask.
    Source: Hu et al., arXiv 2501.03262, "REINFORCE++-baseline".
    """
    return dr_grpo(rewards, mask, groups)


def opo(rewards: Tensor, mask: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the group's mean weighted by length, ``s - sum(l s) / sum(l)``: the baseline of least variance.

    It is optimal where a response's squared gradient grows with its number l of real tokens.

    Shapes: rewards, mask (B, R), groups (B,) -> (advantages, returns), each (B, R), 0 outside the mask.
    Source: Hao et al., arXiv 2505.23585.
    """
    scores, lengths = _scores(rewards, mask), mask.sum(dim=1).double()
    # A group without a real token has length 0, and no token whose advantage could be asked for.
    baselines = group_sums(lengths * scores, groups) / group_sums(lengths, groups).clamp(min=1)
    return _on_every_token(scores - baselines.masked_fill(group_sizes(groups) == 1, 0.0), rewards, mask)


def _scores(rewards: Tensor, mask: Tensor) -> Tensor:
    """The sum of each row's rewards, (B,) float64."""
    return masked_sum(rewards, mask, dim=1).double()


def _baselines(scores: Tensor, groups: Tensor) -> Tensor:
    """The mean score of each row's group; 0 for a row that is alone in it. (B,)"""
    return group_means(scores, groups).masked_fill(group_sizes(groups) == 1, 0.0)


def _on_every_token(per_row: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Give every real token its row's advantage, and add the returns: (advantages, returns)."""
    return zero_outside(per_row.to(rewards.dtype).unsqueeze(1), mask), reward_to_go(rewards, mask)
