"""Converts between sequences (n, T), the tokens of a forward pass, packed response positions (K,) and response rows
(n, R). Every index is made here.

Sequences are prompt and response, right-padded. Response rows are aligned so that column 0 is the first response token.
Packed means the response tokens of all rows end to end, row after row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_toolkit.data.segments import Trie, share_prefixes


def join(prompts: Sequence[Sequence[int]], responses: Tensor, lengths: Tensor, *, pad_id: int) -> Tensor:
    """Join prompts of any lengths and responses (n, R) with ``lengths`` (n,) into right-padded sequences (n, T)."""
    width = max(len(prompt) + int(length) for prompt, length in zip(prompts, lengths, strict=True))
    sequences = torch.full((len(prompts), width), pad_id)
    for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
        sequences[row, : len(prompt)] = torch.as_tensor(prompt)
        sequences[row, len(prompt) : len(prompt) + length] = responses[row, :length]
    return sequences


def response_positions(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """(n, T) bool, True at response tokens of right-padded sequences of ``width``."""
    column = torch.arange(width, device=prompt_lengths.device)
    start, stop = prompt_lengths[:, None], (prompt_lengths + response_lengths)[:, None]
    return (column >= start) & (column < stop)


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of a micro-batch lie in a forward pass, and where its results are read.

    ``tokens`` (n, N): the rows of each role. Two kinds: ``padded``, a row for each sequence, and ``packed``, one row in
    which sequences lie end to end and share prefixes. Indices run over the tokens of all n rows, flattened: ``before``
    (K,), the state in which each response token is chosen, in row-major order of the sequences; ``targets`` (K,), the
    response tokens; ``last`` (B,), the last token of each sequence. Packed, ``positions`` (1, N) and ``trie`` say what
    belongs together, and ``keys[s]`` are the indices of the tokens that segment s attends to: those above it, then its
    own.
    """

    tokens: Tensor
    before: Tensor
    targets: Tensor
    last: Tensor
    positions: Tensor | None = None
    trie: Trie | None = None
    keys: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "before", "targets", "last")}
        positions = None if self.positions is None else self.positions.to(device)
        return replace(self, **moved, positions=positions)


Layout = Callable[[Tensor, Tensor, Tensor], TokenLayout]
"""Sequences (n, T), prompt lengths (n,) and response lengths (n,) to the tokens of a forward pass."""


def padded_layout(sequences: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> TokenLayout:
    """Right-padded rows (n, T). They need no attention mask: attention is causal, and nothing is read at a padded
    position."""
    width = int((prompt_lengths + response_lengths).max())
    tokens = sequences[:, :width]
    mask = response_positions(prompt_lengths, response_lengths, width)
    places = mask.flatten().nonzero().squeeze(1)
    rows = torch.arange(len(tokens), device=tokens.device)
    return TokenLayout(tokens, places - 1, tokens[mask], rows * width + prompt_lengths + response_lengths - 1)


def packed_layout(sequences: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> TokenLayout:
    """The tokens of sequences (n, T) as one row (1, N) without padding, every shared prefix once."""
    sequences, starts = sequences.cpu(), prompt_lengths.tolist()
    lengths = (prompt_lengths + response_lengths).tolist()
    trie = share_prefixes([tuple(row[:p]) for row, p in zip(sequences.tolist(), starts, strict=True)], lengths)
    keys: list[Tensor] = []  # of each segment: every token from the sequence's beginning to the segment's end
    start = 0
    for segment in trie.segments:
        own = torch.arange(start, start + segment.size)
        keys.append(own if segment.parent is None else torch.cat([keys[segment.parent], own]))
        start += segment.size
    tokens = torch.cat([sequences[s.row, s.start : s.stop] for s in trie.segments])
    positions = torch.cat([torch.arange(s.start, s.stop) for s in trie.segments])
    before = [keys[leaf][p - 1 : n - 1] for leaf, p, n in zip(trie.leaves, starts, lengths, strict=True)]
    targets = [row[p:n] for row, p, n in zip(sequences, starts, lengths, strict=True)]
    last = torch.stack([keys[leaf][-1] for leaf in trie.leaves])
    return TokenLayout(
        tokens[None], torch.cat(before), torch.cat(targets), last, positions[None], trie, tuple(keys)
    ).to(prompt_lengths.device)


def unpack(positions: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Spread packed (K,) over response rows (n, ``width``), zero past each row's end. Gradients flow back."""
    mask = torch.arange(width, device=positions.device) < lengths[:, None]
    return positions.new_zeros(mask.shape).masked_scatter(mask, positions)


def stack_rows(blocks: Sequence[Tensor], *, fill: float | int | bool) -> Tensor:
    """Put blocks (n_i, w_i) under one another, widened to the widest with ``fill``; (n_i,) blocks are simply joined."""
    if blocks[0].dim() == 1:
        return torch.cat(list(blocks))
    width = max(block.shape[1] for block in blocks)
    padded = [torch.nn.functional.pad(block, (0, width - block.shape[1]), value=fill) for block in blocks]
    return torch.cat(padded)
