"""Truncated importance weights: correct for a rollout whose sampler is not exactly the policy that trains.

With ``rho = pi_old / pi_rollout``, the training path's probability of a sampled token over the sampler's own.
Truncation from above bounds the variance at the price of a small bias. The weights are constants: no gradient flows
through them.
Source: Ionides, "Truncated Importance Sampling" (2008); constants as in verl's ``rollout_corr_helper``.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_toolkit.algorithms.logprobs import bounded_exp, log_ratio
from rlhf_toolkit.algorithms.masking import zero_outside


def truncated_token_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """Weigh each token by ``min(rho_t, threshold)``; 0 outside the mask.

    Low variance, biased: it ignores that the prefix, too, came from the other sampler. log rho is clamped to +-20.

    Shapes: all (B, R) -> (B, R).
    """
    rho = bounded_exp(log_ratio(old_logprobs, rollout_logprobs, mask).detach())
    return zero_outside(rho.clamp(max=threshold), mask)


def truncated_sequence_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """Weigh every token of a response by ``min(prod_t rho_t, threshold)``; 0 outside the mask.

    Unbiased but for the truncation, with a variance that grows with the length. The sum of log rho is clamped to +-20.

    Shapes: all (B, R) -> (B, R), constant along each row.
    """
    rho = bounded_exp(log_ratio(old_logprobs, rollout_logprobs, mask).detach().sum(dim=1, keepdim=True))
    return zero_outside(rho.clamp(max=threshold), mask)
