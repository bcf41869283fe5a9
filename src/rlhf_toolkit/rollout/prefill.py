"""How prompts begin: one forward pass over all that enter at once, into a cache of their own.

What all of them begin with, such as a chat template's system message, is computed once, for one row. The cache and the
mask that come out are left-padded and without holes, as ``SlotCache.admit`` takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from transformers import DynamicCache

from rlhf_toolkit.models.slot_cache import close_holes
from rlhf_toolkit.types import Prompt

SHARED_PREFIX = 8  # tokens that entering prompts must have in common to be computed once


class Forward(Protocol):
    """A pass of the policy."""

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache,
        *last: torch.Tensor,
    ) -> torch.Tensor:
        """Ids and positions (B, S), which extend ``cache``, and the mask (B, columns of the cache + S) to the logits
        (B, V) of the next token. ``last`` (B,) is where each row's last token stands, by default at the end."""


class Prefilled(NamedTuple):
    """What n prompts have become: keys and values, the mask (n, width) of their columns, and next-token logits (n,
    V)."""

    cache: DynamicCache
    mask: torch.Tensor
    logits: torch.Tensor


def prefill(
    forward: Forward, prompts: Sequence[Prompt], cache: DynamicCache, *, shared: int, pad_id: int, device: torch.device
) -> Prefilled:
    """Run ``prompts`` through the policy into the empty ``cache``.

    ``shared`` is how many tokens all of them begin with (``common_prefix``), 0 where that is not to be used. What
    follows a shared prefix is padded on the right: padding between two parts of a prompt would spoil a bias by the
    distance of columns (MPT).
    """
    if not shared:
        ids, mask = (each.to(device) for each in left_padded(prompts, pad_id=pad_id))
        return Prefilled(cache, mask, forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache))
    prefix = torch.tensor([prompts[0].token_ids[:shared]], device=device)
    forward(prefix, torch.ones_like(prefix), torch.arange(shared, device=device)[None], cache)
    cache.batch_repeat_interleave(len(prompts))
    ids, rest = (each.to(device) for each in right_padded(prompts, pad_id=pad_id, skip=shared))
    mask = torch.cat([rest.new_ones(len(prompts), shared), rest], dim=1)
    logits = forward(ids, mask, (mask.cumsum(1) - 1)[:, shared:], cache, rest.sum(1) - 1)
    return Prefilled(cache, close_holes(cache, mask), logits)


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """Tokens that all ``prompts`` begin with, each keeping one of its own; 0 where sharing them would not pay."""
    first, last = (extreme(prompt.token_ids for prompt in prompts) for extreme in (min, max))
    most = min(len(prompt.token_ids) for prompt in prompts) - 1
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    shared = min(shared, most)
    return shared if len(prompts) > 1 and shared >= SHARED_PREFIX else 0


def left_padded(prompts: Sequence[Prompt], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as (B, P) ids and mask (B, P) int64, padded on the left so that all end in the same column."""
    ids, mask = right_padded(prompts, pad_id=pad_id)
    width = ids.shape[1]
    places = (torch.arange(width) + mask.sum(1, keepdim=True)) % width
    return ids.gather(1, places), mask.gather(1, places)


def right_padded(prompts: Sequence[Prompt], *, pad_id: int, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts without their first ``skip`` tokens as (B, P) ids and mask (B, P) int64, padded on the right."""
    width = max(len(prompt.token_ids) for prompt in prompts) - skip
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        own = prompt.token_ids[skip:]
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    return ids, mask
