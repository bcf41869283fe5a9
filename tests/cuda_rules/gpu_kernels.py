"""The kernels of a GPU that a CPU lacks, in their place: they check what the real ones refuse and give the same values.

They get plain tensors: that all of them lie on one device is the rules' to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def mm_with_dtype(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``torch.mm(a, b, out_dtype=...)``: factors of one half precision to float32."""
    assert a.dtype == b.dtype and a.dtype in HALF and out_dtype == torch.float32, (a.dtype, b.dtype, out_dtype)
    return a.to(out_dtype) @ b.to(out_dtype)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    is_causal: bool = False,
    scale: float | None = None,
    window: list[int] | None = None,
    enable_gqa: bool = False,
    *unused: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """``varlen_attn``: output, logsumexp (which only the real backward needs) and state of random numbers."""
    assert enable_gqa or query.shape[1] == key.shape[1], "several query heads for a key head must be announced"
    pieces = _pieces(query, key, value, query_starts, key_starts, longest_query, longest_key, scale, window)
    output = torch.cat([torch.einsum("hqk,khd->qhd", piece.p, piece.v) for piece in pieces]).to(query.dtype)
    return output, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    is_causal: bool,
    state: Tensor,
    scale: float | None = None,
    window: list[int] | None = None,
) -> tuple[Tensor, ...]:
    """Its gradients, written out: autograd does not reach beneath an operator."""
    d_query, d_key, d_value = (torch.zeros_like(each, dtype=torch.float32) for each in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    for piece in _pieces(query, key, value, query_starts, key_starts, longest_query, longest_key, scale, window):
        d_out = grad[piece.queries].float()
        d_p = torch.einsum("qhd,khd->hqk", d_out, piece.v)
        d_scores = piece.p * (d_p - (d_p * piece.p).sum(-1, keepdim=True)) * piece.scale
        d_query[piece.queries] = torch.einsum("hqk,khd->qhd", d_scores, piece.k)
        d_key[piece.keys] = torch.einsum("hqk,qhd->khd", d_scores, piece.q).unflatten(1, (-1, groups)).sum(2)
        d_value[piece.keys] = torch.einsum("hqk,qhd->khd", piece.p, d_out).unflatten(1, (-1, groups)).sum(2)
    return tuple(each.to(query.dtype) for each in (d_query, d_key, d_value))


KERNELS: dict[str, Callable[..., Any]] = {
    "aten.mm.dtype": mm_with_dtype,
    "aten._fused_rms_norm.default": torch.ops.aten._fused_rms_norm,
    "torch_attn._varlen_attn.default": flash,
    "torch_attn._varlen_attn_backward.default": flash_backward,
}


class Piece(NamedTuple):
    """Where the queries and keys of a piece lie; in float32 q, k, v with as many heads as q, and probabilities
    (H, Q, K)."""

    queries: slice
    keys: slice
    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    scale: float


def _pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    scale: float | None,
    window: list[int] | None,
) -> Iterator[Piece]:
    """The last query of a piece stands where its last key does. Raises AssertionError for what the kernel refuses."""
    _check_heads(query, key, value)
    _check_starts(query_starts, query, longest_query)
    _check_starts(key_starts, key, longest_key)
    assert len(query_starts) == len(key_starts), "each piece has queries and keys"
    assert window is not None and window[1] == 0, "the toolkit's attention is causal"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for (q_start, q_stop), (k_start, k_stop) in zip(
        pairwise(query_starts.tolist()), pairwise(key_starts.tolist()), strict=True
    ):
        queries, keys = slice(q_start, q_stop), slice(k_start, k_stop)
        q = query[queries].float()
        k, v = (each[keys].float().repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
        behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        visible = (behind >= 0) if window[0] < 0 else (behind >= 0) & (behind <= window[0])
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~visible, -torch.inf)
        yield Piece(queries, keys, q, k, v, scores.softmax(-1), scale)


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    for each in (query, key, value):
        assert each.dtype == query.dtype and each.dtype in HALF, f"flash attention of {each.dtype}"
        assert each.dim() == 3 and each.stride(-1) == 1 and each.shape[-1] == query.shape[-1], tuple(each.shape)
    assert query.shape[-1] % 8 == 0 and query.shape[-1] <= 256, f"flash attention of heads of {query.shape[-1]}"
    assert query.shape[1] % key.shape[1] == 0 and key.shape[1] == value.shape[1], "heads"


def _check_starts(starts: Tensor, rows: Tensor, longest: int) -> None:
    assert starts.dtype == torch.int32 and starts.is_contiguous(), "where pieces begin is int32"
    sizes = starts.diff()
    assert int(starts[0]) == 0 and int(starts[-1]) == len(rows), "the pieces are not all there is"
    assert int(sizes.max()) <= longest and int(sizes.min()) > 0, "the longest piece is longer than announced"
