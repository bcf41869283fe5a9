"""Causal attention of short sequences on a CPU, as three products.

PyTorch's CPU kernel is slow in bfloat16: forward and backward of 32 rows x 77 tokens of SmolLM2 take it some five times
as long as the three products here (bench/cpu_attention.py). Everything else goes to transformers' own sdpa function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CPU_ATTENTION = "sdpa_short_cpu"
LARGEST_SCORES = 2**26  # elements of the (B, H, T, T) matrix; beyond it the fused kernel's memory matters more


def short_causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` (B, H, T, D), ``key`` and ``value`` (B, H / G, T, D) to (B, T, H, D), as transformers' attention
    functions return it."""
    rows, heads, length, _ = query.shape
    is_causal = getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if length == 1 and not special and isinstance(attention_mask, torch.Tensor):
        return step_attention(query, key, value, attention_mask, scaling), None
    plain = attention_mask is None and is_causal and not special and length == key.shape[2] > 1
    fits = rows * heads * length * length <= LARGEST_SCORES
    if not (plain and fits and query.dtype == torch.bfloat16):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = heads // key.shape[1]
    # The heads that share a key sit under one another, so that keys and values need not be repeated.
    q = query.reshape(-1, groups * length, query.shape[-1])
    k, v = key.reshape(-1, length, key.shape[-1]), value.reshape(-1, length, value.shape[-1])
    future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1).repeat(groups, 1)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scaling or query.shape[-1] ** -0.5)
    output = torch.bmm(scores.softmax(-1), v).view(rows, heads, length, -1)
    return output.transpose(1, 2).contiguous(), None


def step_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """One decoded token a row: ``query`` (B, H, 1, D), ``key`` and ``value`` (B, H / G, T, D), ``mask`` (B, 1, 1, T)
    bool to (B, 1, H, D). Two products over the key heads; PyTorch's kernel takes four times as long for so short a
    query."""
    rows, heads, _, width = query.shape
    grouped = query.view(rows, key.shape[1], -1, width)
    scores = (grouped @ key.transpose(2, 3)).mul_(scaling or width**-0.5).masked_fill_(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).view(rows, 1, heads, -1)


AttentionInterface.register(CPU_ATTENTION, short_causal_attention)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
