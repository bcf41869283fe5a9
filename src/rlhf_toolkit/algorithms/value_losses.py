"""Value losses, per token: what ``aggregation`` then reduces to a number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.masking import zero_outside


class ValueLossTerms(NamedTuple):
    """A value loss before its reduction, with what the metrics need. Both (B, R)."""

    per_token: Tensor
    """The loss of each token, with gradient; 0 outside the mask."""
    clipped: Tensor
    """bool: the clipped value decided; False outside the mask."""


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_clip_range: float | None,
) -> ValueLossTerms:
    """Give half the squared error of each value, the worse of the value as it is and as clipped to the old one.

    ``loss = 0.5 max((V - G)^2, (clamp(V, V_old - e, V_old + e) - G)^2)`` with e = ``value_clip_range``, G the return;
    ``None`` means no clipping: ``0.5 (V - G)^2``.

    Shapes: all (B, R). Source: baselines' ppo2; "The 37 Implementation Details of PPO" (2022), detail 9.
    """
    values, old_values = zero_outside(values, mask), zero_outside(old_values.detach(), mask)
    returns = zero_outside(returns.detach(), mask)
    error = (values - returns).square()
    if value_clip_range is None:
        return ValueLossTerms(0.5 * error, torch.zeros_like(mask))
    limited = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
    limited_error = (limited - returns).square()
    return ValueLossTerms(0.5 * torch.maximum(error, limited_error), limited_error > error)
