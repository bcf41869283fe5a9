"""Attention within segments against its definition: one softmax over a token's own past, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.data.layout import TokenLayout, packed_layout
from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models import segment_attention
from rlhf_toolkit.models.attention import no_mask, role_attention
from rlhf_toolkit.models.segment_attention import SegmentAttention, copy_tokens, in_buckets
from tests.models.test_packed import BATCHES, BY_BATCH, tensors
from tests.support.offenders import for_each

ROLES, HEADS, KV_HEADS, SIZE = 2, 4, 2, 8
SCALE = 0.3


def layout_of(batch: list[tuple[list[int], int]]) -> TokenLayout:
    return packed_layout(*tensors(batch))


def qkv(layout: TokenLayout, dtype: torch.dtype) -> list[Tensor]:
    """As a layer makes them: (R, N, heads, D), transposed."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROLES, layout.tokens.shape[1], heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


def past(layout: TokenLayout, token: int, window: int | None) -> list[int]:
    """The tokens that ``token`` sees, by walking up from it in the sequences it belongs to."""
    assert layout.positions is not None
    position = int(layout.positions[0, token])
    keys = next(keys.tolist() for keys in layout.keys if token in keys.tolist())
    first = 0 if window is None else max(0, position - window + 1)
    return [int(key) for key in keys[first : position + 1]]


def by_definition(parts: list[Tensor], layout: TokenLayout, window: int | None) -> tuple[Tensor, list[Tensor]]:
    doubles = [part.detach().double().requires_grad_() for part in parts]
    q, k, v = doubles
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
    columns = []
    for token in range(q.shape[2]):
        seen = past(layout, token, window)
        weights = (torch.einsum("rhd,rhkd->rhk", q[:, :, token], k[:, :, seen]) * SCALE).softmax(-1)
        columns.append(torch.einsum("rhk,rhkd->rhd", weights, v[:, :, seen]))
    return torch.stack(columns, 1), doubles


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


@for_each("window", [None, 5])
@for_each("kind", ["products", "fused in bfloat16", "fused in float32"])
@BY_BATCH
def test_values_and_gradients_are_attentions(
    batch: list[tuple[list[int], int]], kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "fused in bfloat16":
        monkeypatch.setattr(segment_attention, "LARGEST_SCORES", 1)
    monkeypatch.setattr(segment_attention, "fused" if kind == "products" else "products", None)
    dtype, tolerance = (torch.float32, 1e-5) if "float32" in kind else (torch.bfloat16, 0.02)
    layout = layout_of(batch)
    parts = qkv(layout, dtype)
    expected, doubles = by_definition(parts, layout, window)
    output = SegmentAttention(layout)(*parts, scale=SCALE, window=window)
    assert output.dtype == dtype and output.shape == expected.shape and relative(output, expected) < tolerance
    seed = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((output.double() * seed).sum(), parts)
    for found, right in zip(gradients, torch.autograd.grad((expected * seed).sum(), doubles), strict=True):
        assert relative(found, right) < tolerance


@for_each("window", [None, 5])
@BY_BATCH
def test_the_pieces_for_flash_attention_are_the_same_attention(
    batch: list[tuple[list[int], int]], window: int | None
) -> None:
    """Piece by piece, the last query lined up with the last key: what varlen_attn does with them on a GPU."""
    layout = layout_of(batch)
    parts = qkv(layout, torch.float32)
    q, k, v = (part.transpose(1, 2) for part in parts)
    attention = SegmentAttention(layout)
    ragged = attention.ragged(ROLES)
    k, v = (copy_tokens(part, ragged.keys).flatten(0, 1).repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
    q, outputs = q.flatten(0, 1), []
    starts, key_starts = ragged.query_starts.tolist(), ragged.key_starts.tolist()
    assert ragged.query_starts.dtype == torch.int32 and starts[-1] == len(q) and key_starts[-1] == len(k)
    for i in range(len(starts) - 1):
        queries, keys = q[starts[i] : starts[i + 1]], slice(key_starts[i], key_starts[i + 1])
        assert len(queries) <= ragged.longest_query and keys.stop - keys.start <= ragged.longest_key
        behind = torch.arange(len(queries))[:, None] + len(k[keys]) - len(queries) - torch.arange(len(k[keys]))
        hidden = (behind < 0) | (behind >= (math.inf if window is None else window))
        scores = torch.einsum("qhd,khd->hqk", queries, k[keys]) * SCALE
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[keys]))
    output = torch.cat(outputs).unflatten(0, (ROLES, -1))
    torch.testing.assert_close(output, attention(*parts, scale=SCALE, window=window), rtol=1e-5, atol=1e-5)
    torch.autograd.grad(output.sum(), parts)


@pytest.mark.parametrize("shift", [1, -1])
def test_keys_of_another_segment_would_be_noticed(shift: int) -> None:
    """A mutation: one more segment above, or one less."""
    layout = layout_of(BATCHES["groups under one template"])
    parts = qkv(layout, torch.float32)
    expected, _ = by_definition(parts, layout, None)
    attention = SegmentAttention(layout)
    keys = attention.padded.keys
    attention.__dict__["padded"] = attention.padded._replace(keys=keys._replace(tokens=keys.tokens.roll(shift)))
    assert relative(attention(*parts, scale=SCALE), expected) > 0.1


def test_alike_segments_share_a_bucket_and_all_are_in_one() -> None:
    queries, keys = [60, 50, 10, 60, 3], [90, 85, 88, 40, 3]
    buckets = in_buckets(queries, keys)
    assert sorted(number for bucket in buckets for number in bucket.members) == [0, 1, 2, 3, 4]
    assert [0, 1] in [sorted(bucket.members) for bucket in buckets] or len(buckets) == 5
    for bucket in buckets:
        assert bucket.queries == max(queries[number] for number in bucket.members)
        assert bucket.keys == max(keys[number] for number in bucket.members)
        assert min(queries[number] for number in bucket.members) >= 0.7 * bucket.queries
        assert min(keys[number] for number in bucket.members) >= 0.7 * bucket.keys


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, "they did not reach it"), ({"softcap": 5.0}, "softcap"), ({"s_aux": torch.ones(4)}, "s_aux")],
    ids=["no segments", "softcap", "sinks"],
)
def test_a_layer_that_attends_otherwise_is_refused(options: dict[str, Any], reason: str) -> None:
    layout = layout_of(BATCHES["one template"])
    segments = SegmentAttention(layout) if options else None
    query, key, value = qkv(layout, torch.float32)
    with pytest.raises(ModelError, match=rf"Linear cannot attend within the segments.*{reason}.*update\.packing: off"):
        role_attention(
            torch.nn.Linear(1, 1),
            query,
            key,
            value,
            no_mask(torch.device("cpu")),
            segments=segments,
            **options,
        )
