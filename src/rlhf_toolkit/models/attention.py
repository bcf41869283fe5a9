"""The attention function of a run's base: packed micro-batches, short causal rows on a CPU, transformers' own.

PyTorch's CPU kernel is slow in bfloat16: forward and backward of 32 rows x 77 tokens of SmolLM2 take it some five times
as long as the three products here (bench/cpu_attention.py). What is neither packed nor short goes to transformers' own
sdpa function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_toolkit.data.layout import TokenLayout
from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.recurrent import keeps_state
from rlhf_toolkit.models.renamed import config_value
from rlhf_toolkit.models.segment_attention import SegmentAttention

ROLE_ATTENTION = "sdpa_roles"
LARGEST_ROW = 2**21
"""Scores of one row beyond which PyTorch's kernel, which keeps none, is worth its time. Of one row, so that the kernel
depends on neither the number of rows nor of roles: log-probs of one policy come from one kernel."""
PACKABLE = frozenset(
    {
        *("cohere", "cohere2", "deepseek_v3", "gemma3", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite"),
        *("granitemoe", "hyperclovax", "llama", "mistral", "mixtral", "olmo2", "olmoe", "opt", "phi", "phi3", "phimoe"),
        *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
    }
)
WINDOW_IN_MASK = frozenset({"qwen2_moe", "phimoe"})


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
    if kwargs.get("softcap") is not None:  # transformers before 5.24 would leave it out without a word
        raise ModelError(
            f"{type(module).__name__} caps attention's scores, which sdpa cannot; set model.attention: eager"
        )
    special = any(kwargs.get(name) is not None for name in ("position_bias", "cache"))
    if length == 1 and not special and isinstance(attention_mask, torch.Tensor) and _hides_columns(attention_mask):
        return step_attention(query, key, value, attention_mask, scaling), None
    plain = attention_mask is None and is_causal and not special and length == key.shape[2] > 1
    fits = heads * length * length <= LARGEST_ROW
    if not (plain and fits and query.dtype == torch.bfloat16 and query.device.type == "cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = heads // key.shape[1]
    # The heads that share a key sit under one another, so that keys and values need not be repeated.
    q = query.reshape(-1, groups * length, query.shape[-1])
    k, v = key.reshape(-1, length, key.shape[-1]), value.reshape(-1, length, value.shape[-1])
    future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1).repeat(groups, 1)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scaling or query.shape[-1] ** -0.5)
    output = torch.bmm(scores.softmax(-1), v).view(rows, heads, length, -1)
    return output.transpose(1, 2).contiguous(), None


def _hides_columns(mask: torch.Tensor) -> bool:
    """Whether all that a mask does is to hide columns from all heads alike. Models that choose what each head sees, and
    how well, make one of numbers, or one for each head."""
    return mask.dtype == torch.bool and mask.shape[1] == 1


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


def role_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: SegmentAttention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers' models call: attention within the segments of a packed micro-batch where the
    pass is one, else ``short_causal_attention``.

    ``segments`` comes from ``trunk_inputs`` as an argument that transformers hands down from layer to layer, so that
    recomputation under gradient checkpointing gets it too.
    """
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings have widened queries and keys, not values
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if segments is None and (attention_mask is None or attention_mask.numel() > 0):
        return short_causal_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    more = [name for name in ("softcap", "position_bias", "s_aux", "cache") if kwargs.get(name) is not None]
    if segments is None or dropout or more:
        raise ModelError(
            f"{type(module).__name__} cannot attend within the segments of a packed micro-batch "
            f"({'they did not reach it' if segments is None else f'{more or dropout}'}); set update.packing: off"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return segments(query, key, value, scale=scale, window=kwargs.get("sliding_window")), None


def trunk_inputs(layout: TokenLayout, roles: int = 1) -> dict[str, Any]:
    """What a trunk's forward pass takes, with the rows of ``layout`` once for each of ``roles``."""
    inputs: dict[str, Any] = {"input_ids": layout.tokens.repeat(roles, 1), "use_cache": False}
    if layout.positions is not None:
        inputs["position_ids"] = layout.positions.repeat(roles, 1)
        inputs["attention_mask"] = no_mask(layout.tokens.device)
        inputs["segments"] = SegmentAttention(layout)
    return inputs


def no_mask(device: torch.device) -> torch.Tensor:
    """A mask without elements: transformers hands a 4-D mask on as it is, where it would build one of (N, N) from
    packed position ids; and attention knows by it that the pass is packed."""
    return torch.empty(0, 0, 0, 0, device=device)


def packing_obstacle(base: PreTrainedModel) -> str | None:
    """Why ``base`` cannot run packed micro-batches, or None where it can.

    The tests run every architecture of ``PACKABLE`` packed, against its own forward pass of each sequence; one that is
    not among them runs padded.
    """
    config = base.config.get_text_config()
    if keeps_state(base):
        return f"{base.config.model_type} keeps recurrent state, which packing and shared prefixes would mix up"
    if base.config.model_type not in PACKABLE:
        return f"{base.config.model_type} is not among the architectures that were tested packed"
    if config._attn_implementation != ROLE_ATTENTION:
        return f"it runs with model.attention={config._attn_implementation}, packing needs sdpa"
    if base.config.model_type in WINDOW_IN_MASK and config_value(config, "sliding_window"):
        return f"{base.config.model_type} tells attention of its sliding window in a mask only"
    return None


AttentionInterface.register(ROLE_ATTENTION, role_attention)
AttentionMaskInterface.register(ROLE_ATTENTION, sdpa_mask)
