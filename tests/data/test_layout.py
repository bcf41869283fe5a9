"""Indices between prompts, responses, sequences and packed tokens, against plain loops."""

from __future__ import annotations

import torch

from rlhf_toolkit.data.layout import join, response_positions, stack_rows, unpack

PROMPTS = [(5, 6, 7), (8,), (9, 10)]
RESPONSES = torch.tensor([[11, 12, 0], [13, 14, 15], [16, 0, 0]])
LENGTHS = torch.tensor([2, 3, 1])


def test_join_puts_the_response_right_behind_the_prompt() -> None:
    joined = join(PROMPTS, RESPONSES, LENGTHS, pad_id=99)
    assert joined.tolist() == [[5, 6, 7, 11, 12], [8, 13, 14, 15, 99], [9, 10, 16, 99, 99]]


def test_response_positions_mark_exactly_the_response_tokens() -> None:
    joined = join(PROMPTS, RESPONSES, LENGTHS, pad_id=99)
    mask = response_positions(torch.tensor([3, 1, 2]), LENGTHS, joined.shape[1])
    assert joined[mask].tolist() == [11, 12, 13, 14, 15, 16]


def test_unpack_brings_packed_tokens_back_to_rows_and_gradients_back_to_tokens() -> None:
    packed = torch.arange(1.0, 7.0, requires_grad=True)
    rows = unpack(packed, LENGTHS, 4)
    assert rows.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0], [6, 0, 0, 0]]
    weights = torch.arange(12.0).view(3, 4)
    (rows * weights).sum().backward()
    assert packed.grad is not None and packed.grad.tolist() == [0, 1, 4, 5, 6, 8]


def test_stack_rows_widens_to_the_widest() -> None:
    assert stack_rows([torch.ones(1, 2), torch.zeros(2, 3)], fill=7).tolist() == [[1, 1, 7], [0, 0, 0], [0, 0, 0]]
    assert stack_rows([torch.tensor([1]), torch.tensor([2, 3])], fill=0).tolist() == [1, 2, 3]
    assert stack_rows([torch.tensor([[True]]), torch.tensor([[True, True]])], fill=0).dtype == torch.bool
