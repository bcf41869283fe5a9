"""Truncated importance weights: correct for a rollout whose sampler is not exactly the policy that trains.

With ``rho = pi_old / pi_rollout``, the training path's probability of a sampled token over the sampler's own.
Truncation from above bounds the variance at the price of a small bias. The weights are constants: no gradient flows
through them.
Source: Ionides, "Truncated Importance Sampling" (2008); constants as in verl's ``rollout_corr_helper``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlhf_toolkit.algorithms.logprobs import bounded_exp, log_ratio
from rlhf_toolkit.algorithms.masking import masked_mean, zero_outside
from rlhf_toolkit.errors import ConfigError


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


NO_CORRECTION = "none"
WEIGHTS: dict[str, Callable[..., Tensor]] = {"token": truncated_token_weights, "sequence": truncated_sequence_weights}


@dataclass(frozen=True)
class Correction:
    """Which weights correct a rollout: ``none``, ``token`` or ``sequence``, truncated at ``cap``.

    Raises ``ConfigError`` for another kind, and for a cap below 1: it would cut the weights of equal samplers.
    """

    kind: str = NO_CORRECTION
    cap: float = 2.0

    def __post_init__(self) -> None:
        """Check both settings."""
        if self.kind != NO_CORRECTION and self.kind not in WEIGHTS:
            raise ConfigError(f"kind={self.kind!r} is not a correction; choose none, {' or '.join(WEIGHTS)}")
        if self.cap < 1:
            raise ConfigError(f"cap={self.cap} must be at least 1, the weight of equal samplers; try 2.0")

    def weights(self, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor | None:
        """Weights (B, R) for the policy loss, without gradient and 0 outside the mask; None: no correction."""
        if self.kind == NO_CORRECTION:
            return None
        return WEIGHTS[self.kind](old_logprobs, rollout_logprobs, mask, threshold=self.cap)


def mean_weight(weights: Tensor, mask: Tensor) -> Tensor:
    """Average the weights over real tokens: 1 in expectation for token weights without a cap. (B, R) -> scalar."""
    return masked_mean(weights, mask)


def capped_share(weights: Tensor, mask: Tensor, *, threshold: float) -> Tensor:
    """Give the share of real tokens whose weight reached ``threshold``. Shapes: (B, R) -> scalar."""
    return masked_mean((weights >= threshold).float(), mask)


def effective_sample_share(weights: Tensor, mask: Tensor) -> Tensor:
    """Give Kish's effective sample size over real tokens as a share of their number n, in [1/n, 1].

    ``(sum w)^2 / (n sum w^2)``: 1 for equal weights, 1/n where one token has it all; 0 where every weight is 0.

    Shapes: (B, R) -> scalar. Source: Kish, "Survey Sampling" (1965), section 11.7.
    """
    return masked_mean(weights, mask).square() / masked_mean(weights.square(), mask).clamp(min=1e-30)
