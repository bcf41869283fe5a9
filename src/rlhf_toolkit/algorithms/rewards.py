"""From one score per response to one reward per token: penalties and scaling of scores, KL shaping, reward-to-go."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.masking import last_index, zero_outside
from rlhf_toolkit.errors import ConfigError, DataError


def missing_eos_penalty(scores: Tensor, finished: Tensor, *, penalty: float) -> Tensor:
    """Subtract ``penalty`` from the score of every response that ran out of budget before it stopped.

    ``finished`` is the sampler's own flag: looking for EOS among the tokens misses custom stop ids and finds the
    prompt's.

    Shapes: scores (B,), finished (B,) bool -> (B,). Source: Huang et al., arXiv 2403.17031, the "EOS trick".
    """
    return torch.where(finished, scores, scores - penalty)


def soft_overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """Give what to add to the score of a long response: 0 up to ``max_length - buffer`` tokens, then down linearly.

    ``min(0, factor (max_length - buffer - length) / buffer)``: ``-factor`` at ``max_length``, the longest there is.

    Shapes: lengths (B,) integer, in tokens -> (B,) fp32. Raises ``ConfigError`` for a buffer that does not fit.
    Source: DAPO, arXiv 2503.14476, section 3.4; as in verl's ``dapo`` reward manager.
    """
    if not 0 < buffer <= max_length:
        raise ConfigError(f"buffer={buffer} must be above 0 and at most max_length={max_length}; try {max_length // 4}")
    return (factor * (max_length - buffer - lengths).float() / buffer).clamp(max=0)


def whiten_scores(scores: Tensor, *, of: Tensor | None = None, epsilon: float = 1e-8) -> Tensor:
    """Move the scores to mean 0 and scale them to standard deviation 1; equal scores become exactly 0.

    ``(s - mean) / (std + epsilon)``, std unbiased, over all scores given: hand over those of all ranks. With ``of``
    mean and std are those of other scores, so that both can be compared. To scale without moving the mean:
    ``masking.scale_only``.

    Shapes: (B,) -> (B,), of (any,). Raises ``DataError`` for fewer than 2 scores, which have no deviation.
    """
    wide = (scores if of is None else of).double()
    if len(wide) < 2:
        raise DataError(f"the deviation of {len(wide)} score(s) is undefined: it takes at least 2; use a larger batch")
    return ((scores.double() - wide.mean()) / (wide.std() + epsilon)).to(scores.dtype)


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Charge every token its KL and pay the score on the last real one; 0 outside the mask.

    ``reward_t = -kl_coef * kl_t + [t is the row's last True position] * score``. The last True position, not the last
    position of the response: GAE skips what the policy did not write, and a score paid there would be lost.

    Shapes: scores (B,), kl (B, R), mask (B, R) -> (B, R). Raises ``DataError`` for a row without a real token, whose
    score has nowhere to go. Source: Ziegler et al., arXiv 1909.08593, section 2.
    """
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise DataError(f"row(s) {empty} have no real response token to carry the score; drop them before shaping")
    rewards = zero_outside(-kl_coef * kl, mask)
    rows = torch.arange(mask.size(0), device=mask.device)
    rewards[rows, last_index(mask)] += scores
    return rewards


def reward_to_go(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Sum what each real token and those after it in its row earned: ``G_t = r_t + gamma G_next``; 0 outside the mask.

    *next* is the row's next True position, as in ``advantages.gae``: a hole neither earns nor discounts.

    Shapes: rewards, mask (B, R) -> (B, R).
    """
    returns = torch.zeros_like(rewards)
    following = rewards.new_zeros(rewards.size(0))
    for t in reversed(range(rewards.size(1))):
        following = torch.where(mask[:, t], rewards[:, t] + gamma * following, following)
        returns[:, t] = following
    return zero_outside(returns, mask)
