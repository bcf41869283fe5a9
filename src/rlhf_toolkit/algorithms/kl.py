"""How far the policy has moved from the reference: per-token estimators of KL(policy || reference).

All estimate from one sampled token, with ``x = logprobs - ref_logprobs`` in nats, the token sampled from the policy.
Source: Schulman, "Approximating KL Divergence" (2020), which names k1, k2, k3; constants as in verl's ``kl_penalty``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.logprobs import LOG_RATIO_BOUND
from rlhf_toolkit.algorithms.masking import zero_outside
from rlhf_toolkit.errors import ConfigError

K3_BOUND = 10.0
"""k3 is clamped to +-10, as in verl; its gradient is 0 once the reference is about e^2.6 times likelier."""


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``x``: unbiased, of either sign, high variance. Shapes: all (B, R)."""
    return logprobs - ref_logprobs


def kl_abs(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``|x|``: never negative, biased upwards. Shapes: all (B, R)."""
    return (logprobs - ref_logprobs).abs()


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``x^2 / 2``: never negative, small bias while the policies are close. Shapes: all (B, R)."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``e^-x - 1 + x``: never negative, unbiased, low variance; -x clamped to +-20, the result to +-10.

    Shapes: all (B, R).
    """
    negated = (ref_logprobs - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    # expm1, because exp(y) - 1 has no correct digit left at the small y of the first updates.
    return (torch.expm1(negated) - negated).clamp(-K3_BOUND, K3_BOUND)


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl_k1,
    "abs": kl_abs,
    "k2": kl_k2,
    "k3": kl_k3,
}


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None = None, *, estimator: str) -> Tensor:
    """Estimate the KL of each token by the named estimator; 0 outside the mask, when one is given.

    A KL that is part of a loss needs the mask here, not only in the sum that follows: see ``zero_outside``.

    Shapes: all (B, R) -> (B, R), nats. Raises ``ConfigError`` for a name that ``KL_ESTIMATORS`` does not have.
    """
    if estimator not in KL_ESTIMATORS:
        raise ConfigError(f"estimator={estimator!r} is not a KL estimator; choose one of {', '.join(KL_ESTIMATORS)}")
    if mask is not None:
        logprobs, ref_logprobs = zero_outside(logprobs, mask), zero_outside(ref_logprobs, mask)
    return KL_ESTIMATORS[estimator](logprobs, ref_logprobs)
