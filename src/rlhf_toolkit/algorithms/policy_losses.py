"""Policy losses, per token: what ``aggregation`` then reduces to a number.

All are called alike, ``(logprobs, old_logprobs, advantages, mask, *, knobs, weights=None)``, and take the knobs that
they have by name. ``d = logprobs - old_logprobs``, ``r = exp(d)``, A the advantage; ``weights`` (see ``importance``)
multiply the loss, and no gradient flows to them or to the advantages. A token's loss depends on its own row alone, so
that the shares of micro-batches add up however the rows are cut; what looks at the whole mini-batch, the choice of
tokens for the covariance losses, is made beforehand (``SELECTORS``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.logprobs import bounded_exp, log_ratio
from rlhf_toolkit.algorithms.masking import zero_outside
from rlhf_toolkit.algorithms.token_selection import covariance_within, highest_covariance
from rlhf_toolkit.errors import ConfigError

SEQUENCE_LOG_RATIO_BOUND = 10.0
"""GSPO's log-ratio of a sequence is clamped to at most 10, as in verl."""


class PolicyLossTerms(NamedTuple):
    """A policy loss before its reduction, with what the metrics need. All (B, R)."""

    per_token: Tensor
    """The loss of each token, with gradient; 0 outside the mask."""
    clipped: Tensor
    """bool: the clipped ratio decided (no gradient here, but in cispo); False outside the mask."""
    dual_clipped: Tensor
    """bool: the dual clip decided (no gradient here); False outside the mask."""
    ratio: Tensor
    """Probability of the token now over then, detached; 1 outside the mask."""


def vanilla(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range_low: float,
    clip_range_high: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLossTerms:
    """Give PPO's clipped surrogate of each token, as a loss to minimise.

    With ``r = exp(logprobs - old_logprobs)``, the exponent clamped to +-20:
    ``loss = max(-A r, -A clamp(r, 1 - clip_range_low, 1 + clip_range_high))``; where A < 0 and a ``dual_clip`` c is
    given, ``min(loss, -A c)``, so that a token that has become far likelier than it was cannot dominate the batch.
    ``weights`` (see ``importance``) multiply the result; no gradient flows to them or to the advantages.

    Shapes: all (B, R). Raises ``ConfigError`` for a ``dual_clip`` that is not above 1: it would cut the unclipped loss.
    Source: Schulman et al., arXiv 1707.06347, equation 7; two bounds: DAPO, arXiv 2503.14476, section 3.1; dual clip:
    Ye et al., arXiv 1912.09729, equation 5.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ConfigError(f"dual_clip={dual_clip} must be above 1, the ratio of an unchanged policy; try 3.0, or None")
    gain = -zero_outside(advantages.detach(), mask)
    ratio = bounded_exp(log_ratio(logprobs, old_logprobs, mask))
    loss, clipped = _clipped_surrogate(gain, ratio, clip_range_low, clip_range_high)
    dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        ceiling = torch.where(gain > 0, gain * dual_clip, torch.inf)
        loss, dual_clipped = torch.minimum(loss, ceiling), loss > ceiling
    return PolicyLossTerms(_weighted(loss, weights, mask), clipped, dual_clipped, ratio.detach())


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range_low: float,
    clip_range_high: float,
    weights: Tensor | None = None,
) -> PolicyLossTerms:
    """Give the clipped surrogate with the sequence's ratio in place of the token's.

    ``loss = max(-A s, -A clamp(s, 1 - clip_range_low, 1 + clip_range_high))``, where s has the value of ``exp(mean of
    d over the row)``, its exponent at most 10, and the gradient of the token's own log-prob (GSPO-token). Such ratios
    stay close to 1: the paper clips at 3e-4 and 4e-4.

    Shapes: all (B, R). Source: Zheng et al., arXiv 2507.18071, section 4.3.
    """
    gain, ratios = -zero_outside(advantages.detach(), mask), log_ratio(logprobs, old_logprobs, mask)
    of_sequence = (ratios.sum(dim=1, keepdim=True) / _lengths(mask)).detach()
    sequence_ratio = (ratios - ratios.detach() + of_sequence).clamp(max=SEQUENCE_LOG_RATIO_BOUND).exp()
    loss, clipped = _clipped_surrogate(gain, sequence_ratio, clip_range_low, clip_range_high)
    return _terms(_weighted(loss, weights, mask), clipped, bounded_exp(ratios))


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    weights: Tensor | None = None,
) -> PolicyLossTerms:
    """Give a surrogate that saturates smoothly where PPO clips: ``loss = -A sigmoid(tau (r - 1)) 4 / tau``.

    tau is ``tau_positive`` where A > 0 and ``tau_negative`` elsewhere; at r = 1 the gradient is PPO's. d is clamped to
    +-20.

    Shapes: all (B, R). Raises ``ConfigError`` for a tau that is not positive. Source: Gao et al., arXiv 2511.20347.
    """
    if min(tau_positive, tau_negative) <= 0:
        raise ConfigError(f"{tau_positive=}, {tau_negative=}: both temperatures must be above 0; try 1.0 and 1.05")
    gain, ratio = -zero_outside(advantages.detach(), mask), bounded_exp(log_ratio(logprobs, old_logprobs, mask))
    tau = torch.where(gain < 0, tau_positive, tau_negative)
    loss = gain * (tau * (ratio - 1)).sigmoid() * (4 / tau)
    return _terms(_weighted(loss, weights, mask), torch.zeros_like(mask), ratio)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range_low: float,
    clip_range_high: float,
    weights: Tensor | None = None,
) -> PolicyLossTerms:
    """Give REINFORCE's loss weighed by the clipped ratio: ``loss = -A sg(clamp(r)) log pi``.

    The clamp is to ``[1 - clip_range_low, 1 + clip_range_high]`` and sg stops the gradient, so that a token beyond the
    range keeps a gradient, of bounded size: ``clipped`` marks it all the same. d is clamped to +-20.

    Shapes: all (B, R). Source: MiniMax, arXiv 2506.13585, section 3.1.
    """
    gain, ratio = -zero_outside(advantages.detach(), mask), bounded_exp(log_ratio(logprobs, old_logprobs, mask))
    limited = ratio.clamp(1 - clip_range_low, 1 + clip_range_high).detach()
    loss = gain * limited * zero_outside(logprobs, mask)
    return _terms(_weighted(loss, weights, mask), limited != ratio, ratio)


def gpg(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, weights: Tensor | None = None
) -> PolicyLossTerms:
    """Give REINFORCE's loss, without ratio or clipping: ``loss = -A log pi``.

    Shapes: all (B, R); the old log-probs are used for ``ratio`` only. Source: Chu et al., arXiv 2504.02546.
    """
    loss = -zero_outside(advantages.detach(), mask) * zero_outside(logprobs, mask)
    ratio = bounded_exp(log_ratio(logprobs, old_logprobs, mask))
    return _terms(_weighted(loss, weights, mask), torch.zeros_like(mask), ratio)


def dro(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    beta: float,
    weights: Tensor | None = None,
) -> PolicyLossTerms:
    """Give REINFORCE's loss with a quadratic pull to the old policy: ``loss = -A log pi + beta / 2 d^2``.

    d is not clamped. There is no usual ``beta``: it is a price in advantages for a squared nat.

    Shapes: all (B, R). Raises ``ConfigError`` for a beta that is not positive. Source: Richemond et al., arXiv
    2405.19107, with A in place of the reward less its value.
    """
    if beta <= 0:
        raise ConfigError(f"beta={beta} must be above 0: without the pull, dro is gpg; try 0.1")
    ratios = log_ratio(logprobs, old_logprobs, mask)
    loss = -zero_outside(advantages.detach(), mask) * zero_outside(logprobs, mask) + 0.5 * beta * ratios.square()
    return _terms(_weighted(loss, weights, mask), torch.zeros_like(mask), bounded_exp(ratios))


def geo_mean(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range_low: float,
    clip_range_high: float,
    weights: Tensor | None = None,
) -> PolicyLossTerms:
    """Give every real token its sequence's loss: minus the mean advantage times the geometric mean of clipped ratios.

    ``loss = -mean(A) exp(mean of sgn(A) min(sgn(A) d, sgn(A) clamp(d, -clip_range_low, clip_range_high)))``, means over
    the row's real tokens; the range is one of *log*-ratios (the paper's is 0.4 both ways). Aggregated by
    ``seq-mean-token-mean`` it is the mean of the sequences' losses, as the paper has it; verl takes that mean over each
    micro-batch, empty rows included. ``weights`` enter by their geometric mean too (of w + 1e-10).

    Shapes: all (B, R). Source: Zhao et al., arXiv 2507.20673.
    """
    advantages, ratios = zero_outside(advantages.detach(), mask), log_ratio(logprobs, old_logprobs, mask)
    sign, limited = advantages.sign(), ratios.clamp(-clip_range_low, clip_range_high)
    kept = sign * torch.minimum(sign * ratios, sign * limited)
    loss = -_row_mean(advantages, mask) * _row_mean(kept, mask).exp()
    if weights is not None:
        weights = zero_outside(weights.detach(), mask)
        loss = loss * _row_mean(zero_outside((weights + 1e-10).log(), mask), mask).exp()
    return _terms(zero_outside(loss, mask), sign * limited < sign * ratios, bounded_exp(ratios))


def kl_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    selected: Tensor,
    kl_cov_coef: float = 0.1,
    weights: Tensor | None = None,
) -> PolicyLossTerms:
    """Give the unclipped surrogate, with a KL penalty on the chosen tokens: ``-A r + [selected] kl_cov_coef |d|``.

    ``selected`` (B, R) bool comes from ``highest_covariance``. d is not clamped.

    Shapes: all (B, R). Source: Cui et al., arXiv 2505.22617.
    """
    gain, ratios = -zero_outside(advantages.detach(), mask), log_ratio(logprobs, old_logprobs, mask)
    ratio = ratios.exp()
    loss = gain * ratio + torch.where(selected & mask, kl_cov_coef * ratios.abs(), 0.0)
    return _terms(_weighted(loss, weights, mask), torch.zeros_like(mask), ratio)


def clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    selected: Tensor,
    clip_range_low: float,
    clip_range_high: float,
    weights: Tensor | None = None,
) -> PolicyLossTerms:
    """Give PPO's clipped surrogate, but 0 and no gradient on the chosen tokens, which count as ``clipped``.

    ``selected`` (B, R) bool comes from ``covariance_within``. d is not clamped.

    Shapes: all (B, R). Source: Cui et al., arXiv 2505.22617.
    """
    gain, ratio = -zero_outside(advantages.detach(), mask), log_ratio(logprobs, old_logprobs, mask).exp()
    loss, clipped = _clipped_surrogate(gain, ratio, clip_range_low, clip_range_high)
    selected = selected & mask
    return _terms(_weighted(loss.masked_fill(selected, 0.0), weights, mask), clipped | selected, ratio)


def _clipped_surrogate(gain: Tensor, ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The worse of ``gain * ratio`` with and without the ratio clipped, gain = -A; and where clipping decided."""
    unclipped, limited = gain * ratio, gain * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(unclipped, limited), limited > unclipped


def _weighted(loss: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
    """The loss times the weights, which are constants and may be anything outside the mask."""
    return loss if weights is None else loss * zero_outside(weights.detach(), mask)


def _lengths(mask: Tensor) -> Tensor:
    """The number of real tokens of each row, at least 1: (B, 1)."""
    return mask.sum(dim=1, keepdim=True).clamp(min=1)


def _row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over each row's real tokens of an x that is 0 elsewhere; 0 for an empty row: (B, R) -> (B, 1)."""
    return x.sum(dim=1, keepdim=True) / _lengths(mask)


def _terms(loss: Tensor, clipped: Tensor, ratio: Tensor) -> PolicyLossTerms:
    """The terms of a loss without a dual clip."""
    return PolicyLossTerms(loss, clipped, torch.zeros_like(clipped), ratio.detach())


POLICY_LOSSES: dict[str, Callable[..., PolicyLossTerms]] = {
    "vanilla": vanilla,
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "gpg": gpg,
    "dro": dro,
    "geo_mean": geo_mean,
    "kl_cov": kl_cov,
    "clip_cov": clip_cov,
}

AGGREGATION_OF: dict[str, str] = dict.fromkeys(("gspo", "sapo", "geo_mean"), "seq-mean-token-mean")
"""The aggregation that a loss's source prescribes; the others take any, ``token-mean`` by default."""

SELECTORS: dict[str, Callable[..., Tensor]] = {"kl_cov": highest_covariance, "clip_cov": covariance_within}
"""What chooses ``selected`` of a loss that takes it, called with the old log-probs of the whole mini-batch."""
