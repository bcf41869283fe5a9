"""Rows of a rollout, their deal among ranks, and the lengths that decide it."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.errors import DataError
from rlhf_toolkit.rollout.dealing import LastMeans, deal, rollout_rows
from rlhf_toolkit.types import Prompt


def prompts_at(*indices: int) -> list[Prompt]:
    return [Prompt(index, str(index), (index,), {}) for index in indices]


def named(prompts: list[Prompt], responses: int) -> list[tuple[int, int]]:
    rows = rollout_rows(prompts, responses)
    return [(prompt.index, sample) for prompt, sample in zip(rows.prompts, rows.samples, strict=True)]


def test_each_prompt_is_repeated_in_a_row() -> None:
    assert named(prompts_at(7, 3), 3) == [(7, 0), (7, 1), (7, 2), (3, 0), (3, 1), (3, 2)]


def test_a_prompt_that_comes_twice_gets_other_samples() -> None:
    expected = [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (1, 2), (1, 3)]
    assert named(prompts_at(1, 2, 3, 1), 2) == expected


def test_names_are_unique_in_every_rollout_of_a_schedule() -> None:
    schedule, prompts = PromptSchedule(6, 4, seed=0), prompts_at(*range(6))
    rollouts = [schedule.indices(rollout) for rollout in range(30)]
    assert any(len(set(rollout)) < 4 for rollout in rollouts), "no rollout of this test has a prompt twice"
    for rollout in rollouts:
        names = Counter(named([prompts[index] for index in rollout], 3))
        assert set(names.values()) == {1}


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_every_row_is_dealt_once_and_groups_stay_together(ranks: int) -> None:
    rows = rollout_rows(prompts_at(5, 4, 3, 2, 1, 0), 2)
    shares = deal(rows, 2, ranks, lambda prompt: float(prompt.index))
    assert {len(share) for share in shares} == {12 // ranks}
    assert sorted(chain.from_iterable(shares)) == list(range(12))
    for share in shares:
        assert all(even + 1 in share for even in share if even % 2 == 0)


def test_expected_lengths_are_balanced() -> None:
    lengths = [100, 1, 90, 2, 80, 3, 70, 4]
    rows = rollout_rows(prompts_at(*range(8)), 1)
    totals = [sum(lengths[row] for row in share) for share in deal(rows, 1, 2, lambda prompt: lengths[prompt.index])]
    assert abs(totals[0] - totals[1]) <= 4
    halves = [sum(lengths[:4]), sum(lengths[4:])]
    assert abs(halves[0] - halves[1]) > 30, "the plain halves must be unbalanced for this to say something"


def test_shares_that_would_differ() -> None:
    with pytest.raises(DataError, match=r"3 prompts do not divide among 2 processes.*prompts_per_rollout"):
        deal(rollout_rows(prompts_at(1, 2, 3), 2), 2, 2, lambda prompt: 0.0)


def test_a_prompt_is_expected_to_be_as_long_as_last_time_and_a_new_one_as_the_others() -> None:
    expected, prompts = LastMeans(), prompts_at(1, 2, 2, 3)
    assert expected(prompts[0]) == 0.0
    expected.update([p.index for p in prompts[:3]], [10, 20, 40])
    assert [expected(prompt) for prompt in prompts] == [10.0, 30.0, 30.0, 20.0]
    expected.update([prompts[0].index], [50])
    assert expected(prompts[0]) == 50.0
    assert LastMeans(expected.state)(prompts[3]) == expected(prompts[3]) == 40.0
