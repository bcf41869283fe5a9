"""How much of a response says again what it has said."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 4
"""Tokens of what is looked for again: shorter ones repeat in any text."""


def repeated_share(tokens: Tensor, mask: Tensor) -> Tensor:
    """(B,) the share of a row's runs of ``WINDOW`` tokens that stand in it before: 1 - different ones / all of them.

    ``tokens`` (B, R) whole numbers from 0 to below 2^31; a run counts where all of its tokens are in ``mask``. A row
    without a run has 0. It is rep-4 of Welleck et al., arXiv 1908.04319, section 4. No two different runs are taken for
    one: they are numbered, pairs first and then pairs of pairs, and not hashed.
    """
    rows, width = tokens.shape
    if width < WINDOW:
        return torch.zeros(rows)
    pairs = _numbered(tokens[:, :-1], tokens[:, 1:])
    runs = _numbered(pairs[:, :-2], pairs[:, 2:])
    counts = mask.unfold(1, WINDOW, 1).all(2)
    row = torch.arange(rows, device=tokens.device)[:, None].expand_as(runs)
    total = counts.sum(1)
    different = (row * 2**31 + runs)[counts].unique().div(2**31, rounding_mode="floor").bincount(minlength=rows)
    return torch.where(total > 0, 1 - different / total.clamp(min=1), 0.0)


def _numbered(left: Tensor, right: Tensor) -> Tensor:
    """A number for each pair of whole numbers below 2^31, the same for the same pair, from 0 on."""
    return torch.unique(left.long() * 2**31 + right.long(), return_inverse=True)[1]
