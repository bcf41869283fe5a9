"""Masks from lengths, and the statistics of what a mask keeps.

The statistics work on any shape, as long as ``x`` and ``mask`` share it, and are over everything they are given: for a
global statistic hand over the whole batch of all ranks, not a piece of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_toolkit.errors import DataError

WHITENING_EPSILON = 1e-8
"""Added to a variance before its inverse square root, as in verl's ``masked_whiten``."""


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Mark the first ``lengths[b]`` of ``width`` response positions as real.

    Masks come from lengths, never from token ids, so that a pad token that equals EOS cannot hide the EOS.

    Shapes: lengths (B,) integer -> (B, width) bool. A length beyond ``width`` counts as ``width``.
    """
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def last_index(mask: Tensor) -> Tensor:
    """Find the position of the last True in each row; -1 for a row that has none.

    Shapes: mask (B, R), R >= 1 -> (B,) int64.
    """
    positions = torch.arange(mask.size(1), device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Keep ``x`` where the mask is True and put 0 elsewhere, whatever stood there.

    Applied to an input, before any arithmetic, it also keeps NaN out of the gradient: a product with the mask would not
    (``NaN * 0`` is NaN), nor would blanking only the output (its zero gradient meets the NaN on the way back).
    """
    return torch.where(mask, x, 0.0)


def masked_sum(x: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Sum ``x`` where the mask is True: over everything, or along ``dim``."""
    return zero_outside(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, *, count: float | Tensor | None = None) -> Tensor:
    """Divide the masked sum of ``x`` by ``count``, or by the number of True entries when no count is given.

    Give the count of the whole batch, and the means of its pieces add up to the mean of the whole. Without a count the
    mean of nothing is 0.

    Shapes: x and mask alike -> scalar.
    """
    return masked_sum(x, mask) / (mask.sum().clamp(min=1) if count is None else count)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Estimate the unbiased variance of ``x`` where the mask is True.

    ``sum (x - mean)^2 / (n - 1)`` over the n entries that are True.

    Shapes: x and mask alike -> scalar. Raises ``DataError`` when n < 2, where the estimate does not exist.
    """
    count = int(mask.sum())
    if count < 2:
        raise DataError(f"the variance of {count} real token(s) is undefined: it takes at least 2; use a larger batch")
    return masked_sum((x - masked_mean(x, mask)).square(), mask) / (count - 1)


def centre_and_scale(x: Tensor, mask: Tensor) -> Tensor:
    """Whiten ``x`` to mean 0 and variance 1 over the mask; 0 outside it.

    ``(x - mean) * rsqrt(var + 1e-8)``, var unbiased. For advantages. An entry that is True alone is its own mean, so it
    becomes 0 whatever the scale.

    Shapes: x and mask alike -> the same.
    """
    if int(mask.sum()) < 2:
        return torch.zeros_like(x)
    mean, scale = masked_mean(x, mask), torch.rsqrt(masked_var(x, mask) + WHITENING_EPSILON)
    return zero_outside((x - mean) * scale, mask)


def scale_only(x: Tensor, mask: Tensor) -> Tensor:
    """Scale ``x`` to variance 1 about its own mean, which stays what it was; 0 outside the mask.

    ``(x - mean) * rsqrt(var + 1e-8) + mean``, var unbiased. For rewards, where moving the mean would change which
    behaviour is worth having. An entry that is True alone stays what it is.

    Shapes: x and mask alike -> the same.
    """
    return zero_outside(centre_and_scale(x, mask) + masked_mean(x, mask), mask)
