"""Advantages: how much better each token was than the value function expected."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.masking import zero_outside


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate the advantage and the return of each real token; both are 0 outside the mask.

    ``delta_t = r_t + gamma V_next - V_t``, ``A_t = delta_t + gamma lambda A_next``, ``return_t = A_t + V_t``, where
    *next* is the row's next True position: tokens the policy did not write (tool output in the middle, padding) are
    stepped over, as if they were not there. V_t is the value of the prefix *before* token t.

    Whitening is not done here: it needs the whole batch (``masking.centre_and_scale``), and returns never get it.

    Shapes: rewards, values, mask (B, R), fp32 -> (advantages, returns), each (B, R). ``bootstrap`` (B,) is V_next of a
    row's last True position: the value after the last token of a truncated response, 0 for a finished one. Without it
    every response counts as finished.
    Source: Schulman et al., arXiv 1506.02438, equation 16.
    """
    advantages = torch.zeros_like(rewards)
    advantage = rewards.new_zeros(rewards.size(0))
    next_value = advantage if bootstrap is None else bootstrap
    for t in reversed(range(rewards.size(1))):
        real, value = mask[:, t], values[:, t]
        delta = rewards[:, t] + gamma * next_value - value
        advantage = torch.where(real, delta + gamma * gae_lambda * advantage, advantage)
        next_value = torch.where(real, value, next_value)
        advantages[:, t] = advantage
    return zero_outside(advantages, mask), zero_outside(advantages + values, mask)
