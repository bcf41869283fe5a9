"""Attention of a packed micro-batch: each segment's queries see the keys of the segments above them and their own.

The keys of a segment are all tokens of its sequence up to its end, so key j stands at position j, and a query at
position p sees the keys j <= p, with a sliding window of w those above p - w. Index tensors are made once for a
micro-batch; every layer uses them. Roles are rows of a batch and never meet here.
"""

from __future__ import annotations

import warnings
from functools import cache, cached_property
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from rlhf_toolkit.data.layout import TokenLayout
from rlhf_toolkit.errors import RunWarning

LARGEST_SCORES = 2**25
"""Elements of one role's scores in one layer; beyond it the fused kernel's memory matters more. Of one role, so that
the kernel does not depend on how many roles a pass has: log-probs of one policy come from one kernel."""
SHARES_HEADS = "enable_gqa" in signature(varlen_attn).parameters  # since torch 2.12; before, heads are repeated
ALIKE = 0.7  # segments share a bucket where none has less than this share of the largest one's queries, and of its keys


class Bucket(NamedTuple):
    """Segments of similar size, padded to ``queries`` x ``keys`` tokens."""

    members: list[int]
    queries: int
    keys: int


class Copies(NamedTuple):
    """Tokens copied to where a product needs them, and the way back.

    ``tokens`` (M,): the token of each place, any where a place is padding. ``first`` (N,): one place of each token. The
    tokens ``start`` to ``stop`` of a shared segment have more of them: ``places`` (uses, size).
    """

    tokens: Tensor
    first: Tensor
    shared: tuple[tuple[int, int, Tensor], ...]


class Padded(NamedTuple):
    """Segments in buckets: the copies of their queries and of their keys, and which places of the former are real."""

    buckets: list[Bucket]
    queries: Copies
    keys: Copies
    real: Tensor


class Ragged(NamedTuple):
    """Segments end to end, for R roles: where queries and keys of each begin, the longest of both, and the keys."""

    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    keys: Copies


class SegmentAttention:
    """The attention of the micro-batch that is packed as ``layout``."""

    def __init__(self, layout: TokenLayout) -> None:
        assert layout.trie is not None, "a padded layout has no segments"
        self.device = layout.tokens.device
        self.trie, self.key_tokens = layout.trie, layout.keys
        self._visible: dict[tuple[int, int | None], Tensor] = {}
        self._ragged: dict[int, Ragged] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None = None) -> Tensor:
        """``query`` (R, H, N, D) of R roles, ``key`` and ``value`` (R, H / G, N, D) to (R, N, H, D)."""
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))  # (R, N, heads, D), as the layers made them
        if flash_fits(q, v):
            return self._variable_length(q, k, v, scale, window)
        return self._in_buckets(q, k, v, scale, window)

    def _in_buckets(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Dense attention of each bucket."""
        buckets, queries, keys, real = self.padded
        scores = q.shape[2] * sum(len(b.members) * b.queries * b.keys for b in buckets)
        attention = products if q.dtype == torch.bfloat16 and scores <= LARGEST_SCORES else fused
        q_sizes = [len(bucket.members) * bucket.queries for bucket in buckets]
        k_sizes = [len(bucket.members) * bucket.keys for bucket in buckets]
        parts = (
            copy_tokens(q, queries).split(q_sizes, 1),
            copy_tokens(k, keys).split(k_sizes, 1),
            copy_tokens(v, keys).split(k_sizes, 1),
        )
        outputs = []
        for number, (bucket, *qkv) in enumerate(zip(buckets, *parts, strict=True)):
            q, k, v = (part.unflatten(1, (len(bucket.members), -1)) for part in qkv)
            outputs.append(attention(q, k, v, self.visible(number, window), scale).flatten(1, 2))
        return take_back(torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], queries, real)

    def _variable_length(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Flash attention, which lines up the last query with the last key where there are more keys."""
        roles = q.shape[0]
        ragged = self.ragged(roles)
        k, v = (copy_tokens(part, ragged.keys).flatten(0, 1) for part in (k, v))
        groups = q.shape[2] // k.shape[1]
        shares_heads: dict[str, Any] = {"enable_gqa": groups > 1} if SHARES_HEADS else {}
        if not SHARES_HEADS:
            k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
        output = varlen_attn(
            q.flatten(0, 1),
            k,
            v,
            ragged.query_starts,
            ragged.key_starts,
            ragged.longest_query,
            ragged.longest_key,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **shares_heads,
        )
        return cast(Tensor, output).unflatten(0, (roles, -1))

    @cached_property
    def padded(self) -> Padded:
        """For dense attention."""
        sizes = [segment.size for segment in self.trie.segments]
        buckets = in_buckets(sizes, [len(keys) for keys in self.key_tokens])
        own = [keys[len(keys) - size :] for keys, size in zip(self.key_tokens, sizes, strict=True)]
        members = [(bucket, number) for bucket in buckets for number in bucket.members]
        real = torch.cat([torch.arange(bucket.queries) < sizes[number] for bucket, number in members])
        queries = torch.cat([_widened(own[number], bucket.queries) for bucket, number in members])
        keys = torch.cat([_widened(self.key_tokens[number], bucket.keys) for bucket, number in members])
        begins = _begins(torch.tensor([bucket.keys for bucket, _ in members])).tolist()
        places = {number: begin for (_, number), begin in zip(members, begins, strict=False)}
        of_queries = real.nonzero().squeeze(1)
        way_back = torch.empty_like(of_queries).index_copy_(0, queries[real], of_queries)
        return Padded(
            buckets,
            Copies(queries.to(self.device), way_back.to(self.device), ()),
            self._copies(keys, places),
            real.to(self.device)[None, :, None],
        )

    def ragged(self, roles: int) -> Ragged:
        """For attention that takes pieces of any length; made once for each number of roles."""
        if roles not in self._ragged:
            sizes = torch.tensor([segment.size for segment in self.trie.segments])
            lengths = torch.tensor([len(keys) for keys in self.key_tokens])
            self._ragged[roles] = Ragged(
                _begins(sizes.repeat(roles)).to(self.device, torch.int32),
                _begins(lengths.repeat(roles)).to(self.device, torch.int32),
                int(sizes.max()),
                int(lengths.max()),
                self._copies(torch.cat(self.key_tokens), dict(enumerate(_begins(lengths).tolist()))),
            )
        return self._ragged[roles]

    def _copies(self, tokens: Tensor, places: dict[int, int]) -> Copies:
        """``places[s]`` is where the keys of segment s begin in ``tokens``."""
        below: dict[int, list[int]] = {number: [] for number in range(len(self.trie.segments))}
        for number in below:
            for above in self.trie.path(number):
                below[above].append(number)
        first, shared, begin = [], [], 0
        for number, segment in enumerate(self.trie.segments):
            begins = torch.tensor([places[each] + segment.start for each in below[number]])
            all_places = begins[:, None] + torch.arange(segment.size)
            first.append(all_places[0])
            if len(begins) > 1:
                shared.append((begin, begin + segment.size, all_places.to(self.device)))
            begin += segment.size
        return Copies(tokens.to(self.device), torch.cat(first).to(self.device), tuple(shared))

    def visible(self, bucket: int, window: int | None) -> Tensor:
        """(S, queries, keys) bool, True where a query may look; made once for each window. Padding looks where the last
        query does."""
        if (bucket, window) not in self._visible:
            members, queries, keys = self.padded.buckets[bucket]
            segments = [self.trie.segments[number] for number in members]
            start = torch.tensor([segment.start for segment in segments])[:, None]
            stop = torch.tensor([segment.stop for segment in segments])[:, None]
            position = torch.minimum(start + torch.arange(queries), stop - 1)[:, :, None]
            key = torch.arange(keys)
            seen = key <= position if window is None else (key <= position) & (key > position - window)
            self._visible[bucket, window] = seen.to(self.device)
        return self._visible[bucket, window]


def flash_fits(q: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's flash attention takes these heads here: on a GPU, half precision, one size for all, and a
    kernel that has been tried (``flash_works``)."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] != v.shape[-1]:
        return False
    return flash_works(q.device, q.dtype, q.shape[-1])


@cache
def flash_works(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Try flash attention, forward and backward, on a few tokens with heads of ``size``; warn where it refuses.

    No table of what it takes would stay true: it depends on the card (none before Ampere; no backward for some sizes on
    consumer cards), on the size (a multiple of 8, at most 256), on how PyTorch was built, and on its version.
    """
    try:
        # The layer that asks first may be one that gradient checkpointing counts the saved tensors of.
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
            q, k, v = (torch.ones(5, 1, size, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
            output = cast(Tensor, varlen_attn(q, k, v, starts, starts, 3, 3, scale=1.0, window_size=(-1, 0)))
            (gradient,) = torch.autograd.grad(output.sum(), v)
        right = bool(((output.detach() - 1).abs().max() < 0.1) & ((gradient.sum() - 5 * size).abs() < 0.1 * size))
        reason = "" if right else "it gives wrong numbers"
    except torch.OutOfMemoryError:  # a full card says nothing about what it can
        raise
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
    if reason:
        warnings.warn(
            f"flash attention does not run on {device} for heads of {size} in {dtype} ({reason}); packed micro-batches "
            "take the slower attention in buckets",
            RunWarning,
            stacklevel=2,
        )
    return not reason


def in_buckets(queries: list[int], keys: list[int]) -> list[Bucket]:
    """Segments with these sizes, the largest first, in buckets whose members are alike."""
    found: list[Bucket] = []
    fewest = 0
    for number in sorted(range(len(keys)), key=lambda i: (-keys[i], -queries[i], i)):
        if found and keys[number] >= ALIKE * found[-1].keys:
            members, most, longest = found[-1]
            most, fewest = max(most, queries[number]), min(fewest, queries[number])
            if fewest >= ALIKE * most:
                found[-1] = Bucket([*members, number], most, longest)
                continue
        found.append(Bucket([number], queries[number], keys[number]))
        fewest = queries[number]
    return found


def products(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """``q`` (R, S, Q, H, D), ``k`` and ``v`` (R, S, K, H / G, D), ``visible`` (S, Q, K) to (R, S, Q, H, D), as three
    matrix products. The heads that share a key lie under one another, so that keys need not be repeated."""
    roles, segments, queries, heads, size = q.shape
    kv_heads = k.shape[3]
    rows = q.unflatten(3, (kv_heads, -1)).permute(0, 1, 3, 4, 2, 5).reshape(roles * segments * kv_heads, -1, size)
    k, v = (part.transpose(2, 3).reshape(len(rows), part.shape[2], -1) for part in (k, v))
    scores = torch.baddbmm(rows.new_empty(1, 1, 1), rows, k.transpose(1, 2), beta=0, alpha=scale)
    hidden = torch.where(visible, 0.0, -torch.inf).to(scores.dtype)[None, :, None]
    scores.view(roles, segments, heads, queries, -1).add_(hidden)
    output = torch.bmm(scores.softmax(-1), v)
    return output.view(roles, segments, heads, queries, -1).transpose(2, 3)


def fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The same by PyTorch's kernel, which keeps no scores."""
    roles, segments, _, heads, _ = q.shape
    k, v = (part.repeat_interleave(heads // part.shape[3], 3) for part in (k, v))
    q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in (q, k, v))
    output = scaled_dot_product_attention(q, k, v, attn_mask=visible.repeat(roles, 1, 1)[:, None], scale=scale)
    return output.transpose(1, 2).unflatten(0, (roles, segments))


class CopyTokens(torch.autograd.Function):
    """(R, N, C) to (R, M, C). The way back is copies and a few sums too: PyTorch's own adds token by token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        """The token of each place."""
        ctx.copies = copies
        return x.index_select(1, copies.tokens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Each token's gradient is the sum over its places."""
        dx = dy.index_select(1, ctx.copies.first)
        for start, stop, places in ctx.copies.shared:
            dx[:, start:stop] = dy.index_select(1, places.flatten()).unflatten(1, places.shape).sum(1)
        return dx, None


class TakeBack(torch.autograd.Function):
    """(R, M, C) to (R, N, C), where every token has one place and the rest is padding, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, copies: Copies, real: Tensor) -> Tensor:
        """The place of each token."""
        ctx.copies, ctx.real = copies, real
        return y.index_select(1, copies.first)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Copies, and zeros in the padding."""
        return dx.index_select(1, ctx.copies.tokens).mul_(ctx.real), None, None


def copy_tokens(x: Tensor, copies: Copies) -> Tensor:
    """(R, N, heads, D) to (R, M, heads, D)."""
    return CopyTokens.apply(x.flatten(2), copies).unflatten(2, x.shape[2:])  # type: ignore[no-untyped-call]


def take_back(y: Tensor, copies: Copies, real: Tensor) -> Tensor:
    """(R, M, heads, D) to (R, N, heads, D)."""
    return TakeBack.apply(y.flatten(2), copies, real).unflatten(2, y.shape[2:])  # type: ignore[no-untyped-call]


def _widened(index: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(index, (0, width - len(index)))


def _begins(sizes: Tensor) -> Tensor:
    """Where each of several pieces begins that lie end to end, and where the last one ends."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
