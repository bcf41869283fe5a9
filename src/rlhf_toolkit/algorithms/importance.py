"""Importance weights: correct for a rollout whose sampler is not exactly the policy that trains.

With ``rho = pi_old / pi_rollout``, the training path's probability of a sampled token over the sampler's own.
Truncation from above bounds the variance at the price of a small bias. Masking gives weight 0 to what lies outside a
range, on both sides: where sampler and policy disagree that much, the token says more of their difference than of the
reward. The weights are constants: no gradient flows through them.
Source: Ionides, "Truncated Importance Sampling" (2008); masking: "IcePop", arXiv 2510.18855; constants as in verl's
``rollout_corr_helper``.
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
    return zero_outside(_token_ratios(old_logprobs, rollout_logprobs, mask).clamp(max=threshold), mask)


def truncated_sequence_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """Weigh every token of a response by ``min(prod_t rho_t, threshold)``; 0 outside the mask.

    Unbiased but for the truncation, with a variance that grows with the length. The sum of log rho is clamped to +-20.

    Shapes: all (B, R) -> (B, R), constant along each row.
    """
    return zero_outside(_sequence_ratios(old_logprobs, rollout_logprobs, mask).clamp(max=threshold), mask)


def masked_token_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, floor: float, cap: float
) -> Tensor:
    """Weigh each token by ``rho_t`` where ``floor <= rho_t <= cap``, by 0 where not; 0 outside the mask.

    A token of weight 0 is still counted where the loss is averaged. log rho is clamped to +-20.

    Shapes: all (B, R) -> (B, R).
    """
    return zero_outside(_within(_token_ratios(old_logprobs, rollout_logprobs, mask), floor, cap), mask)


def masked_sequence_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, floor: float, cap: float
) -> Tensor:
    """Weigh every token of a response by ``prod_t rho_t`` where that lies in [floor, cap], by 0 where not.

    0 outside the mask. The longer the response, the rarer is a product near 1. The sum of log rho is clamped to +-20.

    Shapes: all (B, R) -> (B, R), constant along each row.
    """
    return zero_outside(_within(_sequence_ratios(old_logprobs, rollout_logprobs, mask), floor, cap), mask)


def _token_ratios(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """rho of each token, (B, R); 1 outside the mask."""
    return bounded_exp(log_ratio(old_logprobs, rollout_logprobs, mask).detach())


def _sequence_ratios(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """rho of each response, the product of its tokens', (B, 1)."""
    return bounded_exp(log_ratio(old_logprobs, rollout_logprobs, mask).detach().sum(dim=1, keepdim=True))


def _within(rho: Tensor, floor: float, cap: float) -> Tensor:
    """rho, and 0 where it lies outside [floor, cap]."""
    return zero_outside(rho, (rho >= floor) & (rho <= cap))


NO_CORRECTION = "none"
_TRUNCATED = {"token": truncated_token_weights, "sequence": truncated_sequence_weights}
_MASKED = {"token_mask": masked_token_weights, "sequence_mask": masked_sequence_weights}
WEIGHTS: dict[str, Callable[..., Tensor]] = {**_TRUNCATED, **_MASKED}


@dataclass(frozen=True)
class Correction:
    """Which weights correct a rollout: ``none``, or one of ``WEIGHTS``.

    ``token`` and ``sequence`` are truncated at ``cap``; ``token_mask`` and ``sequence_mask`` are 0 outside
    [``floor``, ``cap``]. The floor says nothing to the others.

    Raises ``ConfigError`` for another kind, for a cap below 1, which would cut the weights of equal samplers, and for a
    floor that is negative or above 1, which would mask them.
    """

    kind: str = NO_CORRECTION
    cap: float = 2.0
    floor: float = 0.5

    def __post_init__(self) -> None:
        """Check all settings."""
        if self.kind != NO_CORRECTION and self.kind not in WEIGHTS:
            kinds = ", ".join([NO_CORRECTION, *WEIGHTS])
            raise ConfigError(f"kind={self.kind!r} is not a correction; choose one of {kinds}")
        if not self.cap >= 1:
            raise ConfigError(f"cap={self.cap} must be at least 1, the weight of equal samplers; try 2.0")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor={self.floor} must be from 0 to 1, the weight of equal samplers; try 0.5")

    def weights(self, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor | None:
        """Weights (B, R) for the policy loss, without gradient and 0 outside the mask; None: no correction."""
        if self.kind == NO_CORRECTION:
            return None
        bounds = {"floor": self.floor, "cap": self.cap} if self.kind in _MASKED else {"threshold": self.cap}
        return WEIGHTS[self.kind](old_logprobs, rollout_logprobs, mask, **bounds)

    def cut_share(self, weights: Tensor, mask: Tensor) -> Tensor:
        """The share of real tokens whose weight is at the cap or, for the mask kinds, 0. (B, R) -> scalar."""
        if self.kind in _MASKED:
            return masked_share(weights, mask)
        return capped_share(weights, mask, threshold=self.cap)


def mean_weight(weights: Tensor, mask: Tensor) -> Tensor:
    """Average the weights over real tokens: 1 in expectation for token weights without a cap. (B, R) -> scalar."""
    return masked_mean(weights, mask)


def capped_share(weights: Tensor, mask: Tensor, *, threshold: float) -> Tensor:
    """Give the share of real tokens whose weight reached ``threshold``. Shapes: (B, R) -> scalar."""
    return masked_mean((weights >= threshold).float(), mask)


def masked_share(weights: Tensor, mask: Tensor) -> Tensor:
    """Give the share of real tokens whose weight is 0: what ``token_mask`` or ``sequence_mask`` left out.

    Shapes: (B, R) -> scalar.
    """
    return masked_mean((weights == 0).float(), mask)


def effective_sample_share(weights: Tensor, mask: Tensor) -> Tensor:
    """Give Kish's effective sample size over real tokens as a share of their number n, in [1/n, 1].

    ``(sum w)^2 / (n sum w^2)``: 1 for equal weights, 1/n where one token has it all; 0 where every weight is 0.

    Shapes: (B, R) -> scalar. Source: Kish, "Survey Sampling" (1965), section 11.7.
    """
    return masked_mean(weights, mask).square() / masked_mean(weights.square(), mask).clamp(min=1e-30)
