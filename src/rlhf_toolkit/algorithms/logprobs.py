"""Log-probabilities of tokens, and the ratio of two policies on them."""

from __future__ import annotations

from torch import Tensor

from rlhf_toolkit.algorithms.masking import zero_outside

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before ``exp``: e^20 is still finite in every sum of fp32 losses."""


def logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Give the log-probability of each target and the entropy of each distribution, in nats and fp32.

    ``logprob = z_target - logsumexp(z)``; ``entropy = logsumexp(z) - sum_v softmax(z)_v z_v``.

    The plain formula, for small batches and as the oracle of the chunked heads in ``models``: it holds several copies
    of ``logits``. Logits must be finite (a banned token is -1e9, not -inf).

    Shapes: logits (..., V), targets (...) int64 -> two of (...).
    """
    logits = logits.float()
    normaliser = logits.logsumexp(dim=-1)
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected = (logits.softmax(dim=-1) * logits).sum(dim=-1)
    return chosen - normaliser, normaliser - expected


def log_ratio(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Subtract two policies' log-probs of the same tokens; 0 (a ratio of 1) outside the mask.

    Not clamped: a sum over a sequence must be taken before ``LOG_RATIO_BOUND`` is applied.

    Shapes: all (B, R) -> (B, R), nats.
    """
    return zero_outside(logprobs - other_logprobs, mask)


def bounded_exp(log_ratios: Tensor) -> Tensor:
    """Exponentiate log-ratios clamped to +-``LOG_RATIO_BOUND``; beyond the bound the gradient is 0."""
    return log_ratios.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
