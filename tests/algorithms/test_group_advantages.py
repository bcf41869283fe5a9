from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.group_advantages import dr_grpo, grpo, opo, reinforce_plus_plus_baseline, rloo
from tests.support.batches import MASK, blank_outside, like_mask, poisoned, real, widened
from tests.support.offenders import for_each

GROUPS = torch.tensor([7, -2, 7, 7, 5])
"""Rows 0, 2 and 3 answer one prompt; 1 and 4 are alone. Numbers are names, neither sorted nor small."""

Estimator = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ESTIMATORS = [grpo, dr_grpo, rloo, reinforce_plus_plus_baseline, opo]
ALL = pytest.mark.parametrize("estimate", ESTIMATORS)  # a test for each: tests.mutations names them
EACH = for_each("estimate", ESTIMATORS)


def one_row(scores: list[float], lengths: list[int], me: int, name: str) -> float:
    """The advantage of response ``me`` of a group, in Python's own floats."""
    if len(scores) == 1:
        return scores[0] / (1 + 1e-6) if name == "grpo" else scores[0]
    mean = statistics.fmean(scores)
    if name == "grpo":
        return (scores[me] - mean) / (statistics.stdev(scores) + 1e-6)
    if name == "rloo":
        return scores[me] - statistics.fmean(scores[:me] + scores[me + 1 :])
    if name == "opo":
        return scores[me] - statistics.fmean(scores, weights=lengths)
    return scores[me] - mean


def by_loop(rewards: Tensor, mask: Tensor, groups: Tensor, name: str) -> Tensor:
    """The advantages of a batch, row by row."""
    rows = range(mask.size(0))
    scores = [sum(rewards[at].item() for at in real(mask) if at[0] == b) for b in rows]
    lengths = [sum(at[0] == b for at in real(mask)) for b in rows]
    advantages = torch.zeros(mask.shape)
    for b, t in real(mask):
        group = [row for row in rows if groups[row] == groups[b]]
        of_group = [scores[row] for row in group], [lengths[row] for row in group]
        advantages[b, t] = one_row(*of_group, me=group.index(b), name=name)
    return advantages


def rewards_of(scores: list[float]) -> tuple[Tensor, Tensor]:
    """One token each, of that reward."""
    return torch.tensor(scores).unsqueeze(1), torch.ones(len(scores), 1, dtype=torch.bool)


@ALL
def test_agrees_with_a_plain_loop_with_poison_outside(estimate: Estimator) -> None:
    rewards = like_mask(0)
    advantages, returns = estimate(poisoned(rewards), MASK, GROUPS)
    torch.testing.assert_close(advantages, by_loop(rewards, MASK, GROUPS, estimate.__name__))
    assert blank_outside(advantages) and blank_outside(returns)
    assert advantages.dtype == returns.dtype == torch.float32


@for_each(
    "estimate, expected",
    [
        (grpo, [-1.0, 0.0, 1.0]),
        (dr_grpo, [-2.0, 0.0, 2.0]),
        (reinforce_plus_plus_baseline, [-2.0, 0.0, 2.0]),
        (rloo, [-3.0, 0.0, 3.0]),
        (opo, [-2.0, 0.0, 2.0]),
    ],
)
def test_three_scores_by_hand(estimate: Estimator, expected: list[float]) -> None:
    # Scores 1, 3, 5: mean 3, std 2; the others' means are 4, 3, 2; equal lengths.
    advantages, returns = estimate(*rewards_of([1.0, 3.0, 5.0]), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(advantages.flatten(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert returns.flatten().tolist() == [1.0, 3.0, 5.0]


def test_opo_weighs_by_length() -> None:
    # Lengths 1 and 3, scores 1 and 5: the baseline is (1 + 15) / 4.
    rewards, mask = torch.tensor([[1.0, 9.0, 9.0], [0.0, 0.0, 5.0]]), torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    advantages, _ = opo(rewards, mask, torch.tensor([0, 0]))
    assert advantages.tolist() == [[-3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


@EACH
@for_each("score", [1.7, 0.1, -3.3])
def test_equal_scores_have_an_advantage_of_exactly_zero(estimate: Estimator, score: float) -> None:
    # In float32 the mean of three times 1.7 is not 1.7, and grpo would divide the difference by 1e-6.
    advantages, _ = estimate(*rewards_of([score] * 7), torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    assert not advantages.any()


@ALL
def test_a_response_alone_keeps_its_score(estimate: Estimator) -> None:
    advantages, _ = estimate(*rewards_of([3.0, -2.0]), torch.tensor([0, 1]))
    torch.testing.assert_close(advantages.flatten(), torch.tensor([3.0, -2.0]), rtol=2e-6, atol=0)


@EACH
def test_an_empty_row_counts_with_score_zero(estimate: Estimator) -> None:
    mask = MASK.clone()
    mask[2] = False
    rewards = like_mask(1)
    advantages, _ = estimate(poisoned(rewards, mask), mask, GROUPS)
    torch.testing.assert_close(advantages, by_loop(rewards, mask, GROUPS, estimate.__name__))


@EACH
def test_a_group_without_a_real_token_is_no_trouble(estimate: Estimator) -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    advantages, returns = estimate(torch.full((2, 3), torch.nan), nothing, torch.tensor([0, 0]))
    assert blank_outside(advantages, nothing) and blank_outside(returns, nothing)


@EACH
def test_the_order_of_rows_and_the_numbers_of_groups_do_not_matter(estimate: Estimator) -> None:
    rewards, order = like_mask(2), torch.tensor([3, 1, 4, 0, 2])
    straight, _ = estimate(rewards, MASK, GROUPS)
    shuffled, _ = estimate(rewards[order], MASK[order], GROUPS[order] * 10 + 3)
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-6, atol=1e-7)


@EACH
def test_more_padding_changes_no_number(estimate: Estimator) -> None:
    rewards = like_mask(3)
    for narrow, wide in zip(
        estimate(rewards, MASK, GROUPS), estimate(widened(rewards), widened(MASK), GROUPS), strict=True
    ):
        torch.testing.assert_close(wide[:, :7], narrow)
        assert not wide[:, 7:].any()


@pytest.mark.parametrize("estimate", [grpo, dr_grpo, rloo])
def test_a_constant_for_a_prompt_changes_nothing(estimate: Estimator) -> None:
    # A prompt whose every response is worth 3 more: 3 more on one token of each row of its group of three.
    rewards, more = like_mask(4), like_mask(4)
    more[[0, 2, 3], 0] += 3
    before, after = (estimate(each, MASK, GROUPS)[0] for each in (rewards, more))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_the_advantages_of_a_group_sum_to_zero_over_responses_and_for_opo_over_tokens() -> None:
    rewards, rows = like_mask(5), [0, 2, 3]
    for estimate in (grpo, dr_grpo, rloo, reinforce_plus_plus_baseline):
        advantages, _ = estimate(rewards, MASK, GROUPS)
        assert advantages[rows, 0].sum().item() == pytest.approx(0, abs=1e-6)
    assert opo(rewards, MASK, GROUPS)[0][rows].sum().item() == pytest.approx(0, abs=1e-5)
