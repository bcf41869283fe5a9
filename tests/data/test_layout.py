"""Indices between prompts, responses, sequences and packed tokens, against plain loops."""

from __future__ import annotations

import torch

from rlhf_toolkit.data.layout import join, packed_layout, padded_layout, response_positions, stack_rows, unpack

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


# ---- layouts of a forward pass ---------------------------------------------------------------------------------------

ALIKE = tuple(range(20, 30))
LONG = [(*ALIKE, 5, 6), (*ALIKE,), (*ALIKE, 5), (8,), (*ALIKE,)]
TAILS = torch.tensor([[11, 12, 0], [13, 14, 15], [16, 0, 0], [17, 18, 0], [19, 0, 0]])
SIZES = torch.tensor([2, 3, 1, 2, 1])


def test_layouts_read_the_right_tokens() -> None:
    """``before`` is the token in front of each target, ``last`` ends its row, and positions count from each start."""
    joined, starts = join(LONG, TAILS, SIZES, pad_id=99), torch.tensor([len(prompt) for prompt in LONG])
    rows = [row[: len(p) + n] for row, p, n in zip(joined.tolist(), LONG, SIZES.tolist(), strict=True)]
    for layout in (padded_layout(joined, starts, SIZES), packed_layout(joined, starts, SIZES)):
        flat = layout.tokens.flatten()
        assert layout.targets.tolist() == [t for row, p in zip(rows, LONG, strict=True) for t in row[len(p) :]]
        in_front = [t for row, p in zip(rows, LONG, strict=True) for t in row[len(p) - 1 : -1]]
        assert flat[layout.before].tolist() == in_front
        assert flat[layout.last].tolist() == [row[-1] for row in rows]


def test_a_packed_segment_attends_to_its_sequence_from_the_first_token_on() -> None:
    joined, starts = join(LONG, TAILS, SIZES, pad_id=99), torch.tensor([len(prompt) for prompt in LONG])
    layout = packed_layout(joined, starts, SIZES)
    assert layout.positions is not None and layout.trie is not None
    assert layout.tokens.shape == layout.positions.shape == (1, sum(map(len, LONG)) + int(SIZES.sum()) - 3 * 10)
    flat, positions = layout.tokens[0], layout.positions[0]
    for row, leaf in enumerate(layout.trie.leaves):
        keys = layout.keys[leaf]
        assert flat[keys].tolist() == joined[row, : len(LONG[row]) + int(SIZES[row])].tolist()
        assert positions[keys].tolist() == list(range(len(keys)))


def test_padding_beyond_the_longest_row_is_cut_off() -> None:
    joined = torch.nn.functional.pad(join(PROMPTS, RESPONSES, LENGTHS, pad_id=99), (0, 4), value=99)
    assert padded_layout(joined, torch.tensor([3, 1, 2]), LENGTHS).tokens.shape == (3, 5)
