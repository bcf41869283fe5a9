"""Advantages: how much better each token was than expected. Those from groups are in ``group_advantages``.

Every estimator takes what it needs by the names of its parameters: ``rewards``, ``mask`` and, where it asks for them,
``values``, ``groups``, ``baselines``, ``bootstrap``, ``gamma``, ``gae_lambda``; any other is a constant of its own with
a default. It returns ``(advantages, returns)``, each (B, R), fp32, 0 outside the mask. None whitens: that takes the
whole batch of all ranks, and is ``masking.centre_and_scale``; ``WHITENED`` names those that are meant for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.group_advantages import dr_grpo, grpo, opo, reinforce_plus_plus_baseline, rloo
from rlhf_toolkit.algorithms.masking import zero_outside
from rlhf_toolkit.algorithms.rewards import reward_to_go


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate the advantage and the return of each real token; both are 0 outside the mask.

    ``delta_t = r_t + gamma V_next - V_t``, ``A_t = delta_t + gamma lambda A_next``, ``return_t = A_t + V_t``, where
    *next* is the row's next True position: tokens the policy did not write (tool output in the middle, padding) are
    stepped over, as if they were not there. V_t is the value of the prefix *before* token t.

    Whitening is not done here: it needs the whole batch (``masking.centre_and_scale``), and returns never get it.

    Shapes: rewards, values, mask (B, R), fp32 -> (advantages, returns), each (B, R). ``bootstrap`` (B,) is V_next of a
    row's last True position: the value after the last token of a truncated response, 0 for a finished one. Without it
    every response counts as finished. ``gae_lambda`` may be (B,), one for each row.
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


def vapo(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    value_lambda: float = 1.0,
    alpha: float = 0.05,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages by GAE with a lambda that grows with the response, and returns with one of their own.

    Advantages: ``lambda = max(0, 1 - 1 / (alpha l))`` for a row of l real tokens, so that the weights of its TD errors
    sum to ``alpha l`` whatever its length (rows of at most ``1 / alpha`` tokens: lambda = 0, where the formula is
    negative). Returns: ``value_lambda``, 1 for targets that the value function's own error does not bias.

    Shapes: rewards, values, mask (B, R), bootstrap (B,) as for ``gae`` -> (advantages, returns), each (B, R).
    Source: Yue et al., arXiv 2504.05118, section 4.2; decoupled lambdas: arXiv 2503.01491.
    """
    lengths = mask.sum(dim=1).clamp(min=1)
    by_length = (1 - 1 / (alpha * lengths)).clamp(min=0)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, gae_lambda=by_length, bootstrap=bootstrap)
    _, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=value_lambda, bootstrap=bootstrap)
    return advantages, returns


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    """Take the discounted reward-to-go as advantage and as return; its source then whitens the advantages.

    Shapes: rewards, mask (B, R) -> (advantages, returns), each (B, R), 0 outside the mask.
    Source: Hu et al., arXiv 2501.03262.
    """
    returns = reward_to_go(rewards, mask, gamma=gamma)
    return returns, returns


def remax(rewards: Tensor, mask: Tensor, baselines: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the score of the greedy response to the same prompt from the undiscounted reward-to-go.

    Shapes: rewards, mask (B, R), baselines (B,) -> (advantages, returns), each (B, R), 0 outside the mask.
    Source: Li et al., arXiv 2310.10505, algorithm 1.
    """
    returns = reward_to_go(rewards, mask)
    return zero_outside(returns - baselines.unsqueeze(1), mask), returns


ADVANTAGE_ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gae": gae,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "remax": remax,
    "opo": opo,
    "vapo": vapo,
}

WHITENED = frozenset({"gae", "vapo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"})
"""The estimators whose sources whiten the advantages over all real tokens of the whole batch afterwards."""
