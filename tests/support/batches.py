"""Small random batches with every shape of mask that a rollout makes, and the ways to disturb them."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 1, 1, 0],  # tool output in the middle, then padding
        [1, 0, 0, 0, 0, 0, 0],  # one token
        [1, 1, 1, 0, 0, 0, 0],
        [0, 1, 0, 1, 0, 0, 0],  # starts with a token that is not the policy's
    ],
    dtype=torch.bool,
)
"""What every test here uses: B = 5, R = 7, 17 real tokens."""


def noise(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Standard normal numbers, the same for the same seed."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def like_mask(seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of MASK's shape."""
    return noise(*MASK.shape, seed=seed, scale=scale)


def poisoned(x: Tensor, mask: Tensor = MASK) -> Tensor:
    """``x`` with NaN, +inf and -inf, in turn, wherever the mask is False."""
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(x.numel())[: x.numel()].view_as(x)
    return torch.where(mask, x, poison)


def blank_outside(x: Tensor, mask: Tensor = MASK) -> bool:
    """Whether ``x`` is finite everywhere and exactly 0 (or False) where the mask is False."""
    return bool(x.isfinite().all()) and not bool(x[~mask].any())


def widened(x: Tensor, columns: int = 4) -> Tensor:
    """``x`` with more padding: False for a mask, a number that would be seen for a float."""
    return torch.cat([x, torch.full((x.size(0), columns), 0 if x.dtype == torch.bool else 37.0, dtype=x.dtype)], dim=1)


def real(mask: Tensor = MASK) -> list[tuple[int, int]]:
    """The (row, column) of every real token, in reading order."""
    return [(b, t) for b in range(mask.size(0)) for t in range(mask.size(1)) if mask[b, t]]
