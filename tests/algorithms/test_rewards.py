from __future__ import annotations

import math
import statistics

import pytest
import torch

from rlhf_toolkit.algorithms.rewards import (
    missing_eos_penalty,
    shape_rewards,
    soft_overlong_penalty,
    whiten_scores,
)
from rlhf_toolkit.errors import ConfigError, DataError
from tests.support.batches import MASK, like_mask, noise, poisoned, real, widened


def test_three_rows_by_hand() -> None:
    scores, kl = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([[1.0, 2.0, 3.0]]).repeat(3, 1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    expected = torch.tensor([[-0.5, -1.0, 8.5], [19.5, 0.0, 0.0], [-0.5, 29.0, 0.0]])
    assert torch.equal(shape_rewards(scores, kl, mask, kl_coef=0.5), expected)


def test_a_row_sums_to_its_score_less_its_kl() -> None:
    scores, kl = noise(5, seed=0), like_mask(1)
    rewards = shape_rewards(scores, poisoned(kl), MASK, kl_coef=0.3)
    for b in range(5):
        spent = math.fsum(kl[at].item() for at in real() if at[0] == b)
        assert rewards[b].sum().item() == pytest.approx(scores[b].item() - 0.3 * spent, abs=1e-5)


def test_the_score_is_paid_on_the_last_real_token_even_after_a_hole() -> None:
    paid = shape_rewards(torch.arange(1.0, 6), torch.zeros(MASK.shape), MASK, kl_coef=1.0)
    assert {(b, t): paid[b, t].item() for b, t in paid.nonzero().tolist()} == {
        (0, 6): 1, (1, 5): 2, (2, 0): 3, (3, 2): 4, (4, 3): 5,
    }  # fmt: skip


def test_more_padding_changes_no_bit() -> None:
    scores, kl = noise(5, seed=2), like_mask(3)
    narrow = shape_rewards(scores, kl, MASK, kl_coef=0.1)
    wide = shape_rewards(scores, widened(kl), widened(MASK), kl_coef=0.1)
    assert torch.equal(wide[:, :7], narrow) and torch.equal(wide[:, 7:], torch.zeros(5, 4))


def test_the_inputs_are_left_as_they_were() -> None:
    scores, kl = noise(5, seed=4), like_mask(5)
    shape_rewards(scores, kl, torch.ones_like(MASK), kl_coef=-1.0)
    assert torch.equal(scores, noise(5, seed=4)) and torch.equal(kl, like_mask(5))


def test_empty_rows_are_named() -> None:
    mask = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]], dtype=torch.bool)
    with pytest.raises(DataError, match=r"row\(s\) \[1, 3\] have no real response token"):
        shape_rewards(torch.ones(4), torch.zeros(4, 2), mask, kl_coef=0.1)


def test_a_rollout_of_width_zero_is_named_too() -> None:
    with pytest.raises(DataError, match=r"row\(s\) \[0, 1\]"):
        shape_rewards(torch.ones(2), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), kl_coef=0.1)


def test_the_penalty_is_subtracted_where_not_finished() -> None:
    scores, finished = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([True, False, False])
    assert missing_eos_penalty(scores, finished, penalty=0.5).tolist() == [1.0, 1.5, -3.5]


def test_the_soft_overlong_penalty_by_hand() -> None:
    # 20 tokens at most, a buffer of 5: free up to 15, then 2/5 a token.
    lengths = torch.tensor([0, 15, 16, 18, 20])
    penalties = soft_overlong_penalty(lengths, max_length=20, buffer=5, factor=2.0)
    torch.testing.assert_close(penalties, torch.tensor([0.0, 0.0, -0.4, -1.2, -2.0]))


@pytest.mark.parametrize("buffer", [0, -1, 21])
def test_a_buffer_that_does_not_fit_is_refused(buffer: int) -> None:
    with pytest.raises(ConfigError, match=rf"buffer={buffer} must be above 0 and at most max_length=20; try 5"):
        soft_overlong_penalty(torch.tensor([3]), max_length=20, buffer=buffer)


def test_whitened_scores_agree_with_pythons_own_statistics() -> None:
    scores = [1.5, -0.25, 4.0, 0.5]
    expected = [(score - statistics.fmean(scores)) / statistics.stdev(scores) for score in scores]
    whitened = whiten_scores(torch.tensor(scores))
    assert whitened.dtype == torch.float32 and whitened.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("score", [1.7, 0.1])
def test_equal_scores_whiten_to_exactly_zero(score: float) -> None:
    scores = torch.full((3,), score)
    assert not whiten_scores(scores).any()


def test_one_score_has_no_deviation() -> None:
    with pytest.raises(DataError, match=r"the deviation of 1 score\(s\) is undefined"):
        whiten_scores(torch.ones(1))
