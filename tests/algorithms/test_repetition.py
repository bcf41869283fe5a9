"""Repetition against sets of tuples, row by row."""

from __future__ import annotations

import random

import torch

from rlhf_toolkit.algorithms.repetition import WINDOW, repeated_share


def by_sets(tokens: list[int], mask: list[bool]) -> float:
    places = [i for i in range(len(tokens) - WINDOW + 1) if all(mask[i : i + WINDOW])]
    runs = [tuple(tokens[i : i + WINDOW]) for i in places]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def test_it_is_what_sets_of_runs_say_whatever_is_masked_and_however_large_ids_are() -> None:
    draw = random.Random(0)
    for width in (1, 3, 4, 5, 17, 60):
        for words in ([0, 1], [7, 2**31 - 1, 2**20], list(range(9))):
            rows = [[draw.choice(words) for _ in range(width)] for _ in range(6)]
            mask = [[draw.random() < share for _ in range(width)] for share in (0.0, 0.5, 0.8, 0.95, 1.0, 1.0)]
            found = repeated_share(torch.tensor(rows), torch.tensor(mask))
            expected = [by_sets(*row) for row in zip(rows, mask, strict=True)]
            assert torch.allclose(found, torch.tensor(expected), atol=1e-6), (width, words)


def test_rows_do_not_see_one_another() -> None:
    rows = torch.tensor([[1, 2, 3, 4, 5, 6]] * 3)
    assert repeated_share(rows, torch.ones_like(rows, dtype=torch.bool)).tolist() == [0.0] * 3
