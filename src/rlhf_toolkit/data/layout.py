"""Between sequences (n, T), packed response positions (K,) and response rows (n, R). One place for every index.

Sequences are prompt and response, right-padded. Response rows are aligned so that column 0 is the first response token.
Packed means the response tokens of all rows end to end, row after row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def join(prompts: Sequence[Sequence[int]], responses: Tensor, lengths: Tensor, *, pad_id: int) -> Tensor:
    """Prompts of any lengths and responses (n, R) with ``lengths`` (n,) to right-padded sequences (n, T)."""
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


def unpack(packed: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Packed (K,) to response rows (n, ``width``), zero past each row's end. Gradients flow back."""
    mask = torch.arange(width, device=packed.device) < lengths[:, None]
    return packed.new_zeros(mask.shape).masked_scatter(mask, packed)


def stack_rows(blocks: Sequence[Tensor], *, fill: float | int | bool) -> Tensor:
    """Blocks (n_i, w_i) under one another, widened to the widest with ``fill``; (n_i,) blocks are simply joined."""
    if blocks[0].dim() == 1:
        return torch.cat(list(blocks))
    width = max(block.shape[1] for block in blocks)
    padded = [torch.nn.functional.pad(block, (0, width - block.shape[1]), value=fill) for block in blocks]
    return torch.cat(padded)
