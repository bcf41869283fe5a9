"""The ratio of two policies on the same tokens, from their log-probabilities."""

from __future__ import annotations

from torch import Tensor

from rlhf_toolkit.algorithms.masking import zero_outside

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before ``exp``: e^20 is still finite in every sum of fp32 losses."""


def log_ratio(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Subtract two policies' log-probs of the same tokens; 0 (a ratio of 1) outside the mask.

    Not clamped: a sum over a sequence must be taken before ``LOG_RATIO_BOUND`` is applied.

    Shapes: all (B, R) -> (B, R), nats.
    """
    return zero_outside(logprobs - other_logprobs, mask)


def bounded_exp(log_ratios: Tensor) -> Tensor:
    """Exponentiate log-ratios clamped to +-``LOG_RATIO_BOUND``; beyond the bound the gradient is 0."""
    return log_ratios.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
