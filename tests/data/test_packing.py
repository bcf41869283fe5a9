"""Cutting a rollout: every row once, ranks balanced, budgets kept, the same plan for everybody."""

from __future__ import annotations

import random

import pytest

from rlhf_toolkit.data.packing import mini_batches, padded_micro_batches

LENGTHS = [random.Random(3).randint(2, 40) for _ in range(48)]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_mini_batches_are_equal_shares_of_a_permutation(count: int) -> None:
    parts = mini_batches(48, count, seed=1, rollout=2, epoch=3)
    assert [len(part) for part in parts] == [48 // count] * count
    assert sorted(row for part in parts for row in part) == list(range(48))


def test_every_name_of_the_permutation_matters() -> None:
    names = [{"seed": 1, "rollout": 2, "epoch": 3}, {"seed": 0, "rollout": 2, "epoch": 3}]
    names += [{"seed": 1, "rollout": 0, "epoch": 3}, {"seed": 1, "rollout": 2, "epoch": 0}]
    orders = [tuple(mini_batches(48, 1, **each)[0]) for each in names]
    assert len(set(orders)) == 4
    assert mini_batches(48, 1, **names[0])[0] == list(orders[0])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("budget", [40, 100, 1000])
def test_each_row_once_equal_counts_and_the_budget_kept(ranks: int, budget: int) -> None:
    rows = list(range(4, 44))
    cut = padded_micro_batches(rows, LENGTHS, ranks=ranks, budget=budget)
    assert sorted(row for share in cut for batch in share for row in batch) == rows
    assert len({len(share) for share in cut}) == 1, "ranks must run the same number of micro-batches"
    assert len({sum(map(len, share)) for share in cut}) == 1, "ranks must hold the same number of rows"
    for batch in (batch for share in cut for batch in share):
        assert batch and len(batch) * max(LENGTHS[row] for row in batch) <= budget


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_balance_over_ranks(ranks: int) -> None:
    cut = padded_micro_batches(range(48), LENGTHS, ranks=ranks, budget=10**6)
    tokens = [sum(LENGTHS[row] for batch in share for row in batch) for share in cut]
    assert max(tokens) - min(tokens) <= max(LENGTHS)


def test_a_rank_with_short_rows_is_split_further_to_keep_step() -> None:
    """Rank 0 needs two micro-batches for its long rows, so rank 1 runs two as well."""
    cut = padded_micro_batches([0, 1, 2, 3], [10, 1, 10, 1], ranks=2, budget=10)
    assert [len(share) for share in cut] == [2, 2]


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    cut = padded_micro_batches([0, 1, 2, 3], [90, 3, 3, 3], ranks=1, budget=10)
    assert cut == [[[0], [1, 2, 3]]]


def test_rows_of_similar_length_sit_together() -> None:
    cut = padded_micro_batches(range(48), LENGTHS, ranks=2, budget=200)
    for share in cut:
        order = [LENGTHS[row] for batch in share for row in batch]
        assert order == sorted(order, reverse=True)


def test_the_order_of_equal_rows_does_not_depend_on_how_they_come() -> None:
    rows = [*range(20)]
    assert padded_micro_batches(rows, [5] * 20, ranks=4, budget=20) == padded_micro_batches(
        rows[::-1], [5] * 20, ranks=4, budget=20
    )


def test_ranks_with_one_row_each() -> None:
    assert padded_micro_batches([5, 7], {5: 3, 7: 9}, ranks=2, budget=9) == [[[7]], [[5]]]  # type: ignore[arg-type]
