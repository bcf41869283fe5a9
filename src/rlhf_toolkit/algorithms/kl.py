"""How far the policy has moved from the reference: per-token estimators of KL(policy || reference).

All estimate from one sampled token, with ``x = logprobs - ref_logprobs`` in nats, the token sampled from the policy.
In a loss the gradient matters: that of k1 and k3 is not the KL's in expectation, k2's is. A name with a ``+`` is the
estimator's value with k2's gradient.
Source: Schulman, "Approximating KL Divergence" (2020), which names k1, k2, k3; constants as in verl's ``kl_penalty``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.kl_names import GRADIENT_OF_K2, OWN_GRADIENT
from rlhf_toolkit.algorithms.logprobs import LOG_RATIO_BOUND
from rlhf_toolkit.algorithms.masking import masked_mean, zero_outside
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


Estimator = Callable[[Tensor, Tensor], Tensor]


def with_gradient_of_k2(estimator: Estimator) -> Estimator:
    """Make the straight-through variant: ``k2 - sg(k2) + sg(estimator)``, sg being the stopped gradient.

    Its value is the estimator's, its gradient k2's, ``x`` times that of ``logprobs``, whose expectation is the gradient
    of the KL. Shapes as the estimator's.
    """

    def straight_through(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        backward = kl_k2(logprobs, ref_logprobs)
        return backward - backward.detach() + estimator(logprobs, ref_logprobs).detach()

    return straight_through


_BASE: dict[str, Estimator] = dict(zip(OWN_GRADIENT, (kl_k1, kl_abs, kl_k2, kl_k3), strict=True))

KL_ESTIMATORS: dict[str, Estimator] = _BASE | dict(
    zip(GRADIENT_OF_K2, map(with_gradient_of_k2, _BASE.values()), strict=True)
)


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


class ApproximateKL(NamedTuple):
    """KL(old policy || policy), mean over tokens that the old one sampled, in nats. Scalars without gradient."""

    k1: Tensor
    """``mean(old - now)``: unbiased; it can be below 0 while the policy moves."""
    k3: Tensor
    """``mean(r - 1 - log r)``, r the ratio of now to old: never below 0, so fit for a limit."""


def approximate_kl(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, *, count: float | Tensor | None = None
) -> ApproximateKL:
    """Estimate how far an update has moved the policy from the one that sampled: what a target KL is compared with.

    Give the ``count`` of the whole mini-batch's real tokens, and the shares of its pieces add up to its mean. Each
    token's k3 is bounded as in ``kl_k3``.

    Shapes: all (B, R) -> two scalars. Source: Schulman, "Approximating KL Divergence" (2020).
    """
    now, old = logprobs.detach(), old_logprobs.detach()
    k1, k3 = (masked_mean(kl_penalty(old, now, mask, estimator=name), mask, count=count) for name in ("k1", "k3"))
    return ApproximateKL(k1, k3)
