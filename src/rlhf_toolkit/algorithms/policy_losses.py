"""Policy losses, per token: what ``aggregation`` then reduces to a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.logprobs import bounded_exp, log_ratio
from rlhf_toolkit.algorithms.masking import zero_outside
from rlhf_toolkit.errors import ConfigError


class PolicyLossTerms(NamedTuple):
    """A policy loss before its reduction, with what the metrics need. All (B, R)."""

    per_token: Tensor
    """The loss of each token, with gradient; 0 outside the mask."""
    clipped: Tensor
    """bool: the clipped ratio decided (no gradient here); False outside the mask."""
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
    unclipped, limited = gain * ratio, gain * ratio.clamp(1 - clip_range_low, 1 + clip_range_high)
    loss, clipped = torch.maximum(unclipped, limited), limited > unclipped
    dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        ceiling = torch.where(gain > 0, gain * dual_clip, torch.inf)
        loss, dual_clipped = torch.minimum(loss, ceiling), loss > ceiling
    if weights is not None:
        loss = loss * zero_outside(weights.detach(), mask)
    return PolicyLossTerms(loss, clipped, dual_clipped, ratio.detach())


POLICY_LOSSES: dict[str, Callable[..., PolicyLossTerms]] = {"vanilla": vanilla}
