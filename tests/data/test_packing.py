"""Cutting a rollout: every row once, ranks balanced, budgets kept, the same plan for everybody."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from rlhf_toolkit.data import packing
from rlhf_toolkit.data.packing import mini_batches, packed_micro_batches, padded_micro_batches
from rlhf_toolkit.data.segments import GrowingRow, Tokens, share_prefixes
from tests.support.offenders import for_each

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


@for_each("ranks", [1, 2, 4])
@for_each("budget", [40, 100, 1000])
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


# ---- packed ----------------------------------------------------------------------------------------------------------

TEMPLATE = tuple(range(50, 70))
PROMPTS = [(*TEMPLATE, row // 4, *range(row // 4 % 5)) for row in range(48)]  # twelve groups of four rows
PACKED_LENGTHS = [len(prompt) + length for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]


def tokens_of(rows: list[int]) -> int:
    return share_prefixes([PROMPTS[row] for row in rows], [PACKED_LENGTHS[row] for row in rows]).tokens


@for_each("ranks", [1, 2, 4])
@for_each("budget", [80, 200, 10**6])
def test_packed_each_row_once_equal_counts_and_the_budget_kept(ranks: int, budget: int) -> None:
    rows = list(range(4, 44))
    cut = packed_micro_batches(rows, PACKED_LENGTHS, PROMPTS, ranks=ranks, budget=budget)
    assert sorted(row for share in cut for batch in share for row in batch) == rows
    assert len({len(share) for share in cut}) == 1 and len({sum(map(len, share)) for share in cut}) == 1
    assert all(batch and tokens_of(batch) <= budget for share in cut for batch in share)


def test_sharing_lets_more_rows_into_a_micro_batch() -> None:
    (share,) = packed_micro_batches(range(48), PACKED_LENGTHS, PROMPTS, ranks=1, budget=400)
    (padded,) = padded_micro_batches(range(48), PACKED_LENGTHS, ranks=1, budget=400)
    assert len(share) == 3 and len(padded) == 5
    assert all(tokens_of([*batch, following[0]]) > 400 for batch, following in pairwise(share)), "filled to the brim"


@pytest.mark.parametrize("ranks", [2, 4])
def test_packed_tokens_balance_and_groups_stay_whole(ranks: int) -> None:
    cut = packed_micro_batches(range(48), PACKED_LENGTHS, PROMPTS, ranks=ranks, budget=10**6)
    tokens = [sum(map(tokens_of, share)) for share in cut]
    assert max(tokens) - min(tokens) <= max(tokens_of([*range(g, g + 4)]) for g in range(0, 48, 4))
    homes = [
        {(number, i) for number, share in enumerate(cut) for i, b in enumerate(share) if g in b} for g in range(48)
    ]
    assert all(homes[row] == homes[row // 4 * 4] for row in range(48))


def plainly_filled(share: list[int], lengths: list[int], prompts: list[Tokens], budget: int) -> list[list[int]]:
    """Row after row, each time with the whole trie of the batch it would make."""
    batches: list[list[int]] = []
    for row in sorted(share, key=lambda row: (prompts[row], -lengths[row], row)):
        more = [*batches[-1], row] if batches else []
        if more and share_prefixes([prompts[each] for each in more], [lengths[each] for each in more]).tokens <= budget:
            batches[-1] = more
        else:
            batches.append([row])
    return batches


def random_prompts(seed: int) -> tuple[list[Tokens], list[int]]:
    """Prompts of few different tokens, so that they branch everywhere, some a template long, some several times, some
    the beginning of others, some empty; and whole lengths."""
    draw = random.Random(seed)
    symbols, longest = draw.choice([(2, 6), (2, 30), (4, 12), (30, 40)])
    template = tuple(range(100, 100 + draw.choice([0, 0, 1, 7, 8, 9, 40])))
    different = [
        template + tuple(draw.choices(range(symbols), k=draw.randint(0, longest))) for _ in range(draw.randint(1, 40))
    ]
    prompts = [prompt for prompt in different for _ in range(draw.choice([1, 1, 2, 8, 12]))]
    return prompts, [len(prompt) + draw.randint(1, 20) for prompt in prompts]


def test_a_growing_row_counts_what_its_trie_holds_after_every_sequence() -> None:
    for seed in range(60):
        prompts, lengths = random_prompts(seed)
        order, row = sorted(range(len(prompts)), key=lambda each: prompts[each]), GrowingRow()
        for number, each in enumerate(order, start=1):
            row.add(prompts[each], lengths[each])
            joined = order[:number]
            assert row.tokens == share_prefixes([prompts[i] for i in joined], [lengths[i] for i in joined]).tokens, (
                seed,
                number,
            )


def test_the_plan_is_that_of_building_every_trie_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """``packed_micro_batches`` fills micro-batches with a count that grows; the cut must be the plain one's."""
    cases = []
    for seed in range(150):
        prompts, lengths = random_prompts(seed)
        budget = random.Random(seed).choice([1, 30, 100, 300, 2000])
        ranks = random.Random(seed + 1).choice([rank for rank in (1, 2, 3) if rank <= len(prompts)])
        cases.append((range(len(prompts)), lengths, prompts, ranks, budget))
    found = [packed_micro_batches(*case[:3], ranks=case[3], budget=case[4]) for case in cases]
    monkeypatch.setattr(packing, "_fill_packed", plainly_filled)
    plain = [packed_micro_batches(*case[:3], ranks=case[3], budget=case[4]) for case in cases]
    assert found == plain


def test_a_group_that_no_rank_can_hold_is_divided() -> None:
    prompts = [(1, 2)] * 6 + [(3,)] * 2
    cut = packed_micro_batches(range(8), [5] * 8, prompts, ranks=2, budget=100)
    assert [sum(map(len, share)) for share in cut] == [4, 4]
    assert sorted(row for share in cut for batch in share for row in batch) == list(range(8))


def test_uneven_rows_leave_no_rank_with_more_than_one_less() -> None:
    """An evaluation's rows need not divide."""
    cut = packed_micro_batches(range(7), PACKED_LENGTHS, PROMPTS, ranks=4, budget=10**6)
    assert sorted(sum(map(len, share)) for share in cut) == [1, 2, 2, 2]


def test_packed_plans_do_not_depend_on_the_order_of_rows() -> None:
    rows = [*range(20)]
    plans = [
        packed_micro_batches(each, PACKED_LENGTHS, PROMPTS, ranks=2, budget=200)
        for each in (rows, rows[::-1], random.Random(0).sample(rows, 20))
    ]
    assert plans[0] == plans[1] == plans[2]
