"""Which tokens of a mini-batch the covariance losses treat apart: those that cost the policy the most entropy.

A token's covariance is ``(A - mean A) (log pi - mean log pi)``, means over the real tokens of the whole mini-batch: its
share in how fast the entropy falls. Both choosers are called once, before the update, with the old log-probs of the
whole mini-batch of all ranks, and their choice travels with the rows: a choice made in each micro-batch, as in verl,
would depend on the cut.
Source: Cui et al., arXiv 2505.22617.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_toolkit.errors import ConfigError


def highest_covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor, *, share: float = 2e-4) -> Tensor:
    """Choose the ``share`` of real tokens with the highest covariance, rounded down, but at least one: for ``kl_cov``.

    Ties are broken as ``torch.topk`` does on CPU. Without a real token nothing is chosen.

    Shapes: all (B, R) -> (B, R) bool. Raises ``ConfigError`` for a share outside (0, 1].
    """
    covariances, count = _covariances(logprobs, advantages, mask), _count(mask, share)
    return _selected(covariances.topk(count).indices, mask)


def covariance_within(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    share: float = 2e-4,
    lowest: float = 1.0,
    highest: float = 5.0,
    generator: torch.Generator,
) -> Tensor:
    """Draw the ``share`` of real tokens, rounded down, but at least one, from those between two covariances.

    For ``clip_cov``. Both bounds are outside; where fewer tokens lie between them, all those are chosen, also if that
    is none. The choice is made by ``generator``, a CPU generator.

    Shapes: all (B, R) -> (B, R) bool. Raises ``ConfigError`` for a share outside (0, 1] or bounds in the wrong order.
    """
    if lowest >= highest:
        raise ConfigError(f"lowest={lowest} must be below highest={highest}: no covariance lies between; try 1.0, 5.0")
    covariances, count = _covariances(logprobs, advantages, mask), _count(mask, share)
    between = ((covariances > lowest) & (covariances < highest)).nonzero().flatten()
    drawn = torch.randperm(len(between), generator=generator)[:count]
    return _selected(between[drawn], mask)


def _covariances(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The covariance of each real token, in reading order: (N,) on CPU, where ties are broken the same everywhere."""
    logprobs, advantages = logprobs.detach()[mask].cpu(), advantages.detach()[mask].cpu()
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())


def _count(mask: Tensor, share: float) -> int:
    """How many of the real tokens ``share`` are: rounded down, at least 1, and 0 of 0."""
    if not 0 < share <= 1:
        raise ConfigError(f"share={share} must be above 0 and at most 1: it is a share of all tokens; try 2e-4")
    tokens = int(mask.sum())
    return min(max(int(tokens * share), 1), tokens)


def _selected(chosen: Tensor, mask: Tensor) -> Tensor:
    """Mark the chosen of the real tokens, numbered in reading order: (B, R) bool."""
    real = mask.flatten().nonzero().flatten()
    selected = mask.new_zeros(mask.numel())
    selected[real[chosen.to(mask.device)]] = True
    return selected.view(mask.shape)
