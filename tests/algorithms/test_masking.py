from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms import masking
from rlhf_toolkit.errors import DataError
from tests.support.batches import MASK, blank_outside, like_mask, poisoned, real
from tests.support.values import there


def test_response_mask_marks_the_first_tokens() -> None:
    mask = masking.length_mask(torch.tensor([0, 1, 3, 4]), 4)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_last_index_steps_over_holes_and_padding() -> None:
    assert masking.last_index(MASK).tolist() == [6, 5, 0, 2, 3]


def test_last_index_of_an_empty_row_is_minus_one() -> None:
    assert masking.last_index(torch.tensor([[False, False], [True, False]])).tolist() == [-1, 0]


def test_zero_outside_keeps_nan_out_of_result_and_gradient() -> None:
    x = poisoned(like_mask(0)).requires_grad_()
    masking.zero_outside(x, MASK).square().sum().backward()
    assert torch.equal(there(x.grad), torch.where(MASK, 2 * x, 0.0))


def test_sum_and_mean_are_those_of_the_listed_tokens() -> None:
    x = poisoned(like_mask(1))
    kept = [x[at].item() for at in real()]
    assert masking.masked_sum(x, MASK).item() == pytest.approx(math.fsum(kept), rel=1e-5)
    assert masking.masked_mean(x, MASK).item() == pytest.approx(statistics.fmean(kept), rel=1e-5)


def test_sum_along_a_dimension() -> None:
    x = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.inf, 16.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert masking.masked_sum(x, mask, dim=1).tolist() == [3.0, 20.0]
    assert masking.masked_sum(x, mask, dim=0).tolist() == [5.0, 2.0, 16.0]


def test_means_of_pieces_with_the_whole_count_add_up() -> None:
    x, count = like_mask(2), int(MASK.sum())
    pieces = sum(masking.masked_mean(x[rows], MASK[rows], count=count) for rows in (slice(0, 1), slice(1, 5)))
    torch.testing.assert_close(pieces, masking.masked_mean(x, MASK))


def test_mean_of_nothing_is_zero() -> None:
    assert masking.masked_mean(torch.tensor([torch.nan]), torch.tensor([False])).item() == 0.0


def test_variance_is_the_unbiased_one() -> None:
    x = poisoned(like_mask(3, scale=3.0) + 5)
    kept = [x[at].item() for at in real()]
    assert masking.masked_var(x, MASK).item() == pytest.approx(statistics.variance(kept), rel=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_variance_of_too_few_names_the_count(count: int) -> None:
    with pytest.raises(DataError, match=rf"variance of {count} real token\(s\) is undefined.*at least 2"):
        masking.masked_var(torch.ones(3), torch.arange(3) < count)


def test_centre_and_scale_by_hand() -> None:
    # Mean 3, unbiased variance 4: two standard deviations below, at, and above become -1, 0, 1.
    x, mask = torch.tensor([1.0, 99.0, 3.0, 5.0]), torch.tensor([True, False, True, True])
    torch.testing.assert_close(masking.centre_and_scale(x, mask), torch.tensor([-1.0, 0.0, 0.0, 1.0]))


def test_scale_only_by_hand_keeps_the_mean() -> None:
    x, mask = torch.tensor([1.0, 99.0, 3.0, 5.0]), torch.tensor([True, False, True, True])
    torch.testing.assert_close(masking.scale_only(x, mask), torch.tensor([2.0, 0.0, 3.0, 4.0]))


@pytest.mark.parametrize("whiten", [masking.centre_and_scale, masking.scale_only])
def test_whitening_gives_unit_variance_and_zeros_outside(whiten: Callable[..., Tensor]) -> None:
    x = poisoned(like_mask(4, scale=7.0) - 2)
    whitened = whiten(x, MASK)
    assert statistics.variance(whitened[at].item() for at in real()) == pytest.approx(1, rel=1e-5)
    assert blank_outside(whitened)


def test_a_constant_is_whitened_to_zero_not_to_nan() -> None:
    assert masking.centre_and_scale(torch.full((4,), 2.5), torch.ones(4, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("whiten", "expected"), [(masking.centre_and_scale, 0.0), (masking.scale_only, 2.5)])
def test_one_entry_has_a_mean_and_no_scale(whiten: Callable[..., Tensor], expected: float) -> None:
    x, mask = torch.tensor([torch.nan, 2.5, torch.inf]), torch.tensor([False, True, False])
    assert whiten(x, mask).tolist() == [0.0, expected, 0.0]
    assert whiten(x, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_the_whitening_epsilon_matters_for_tiny_spreads() -> None:
    # Variance 2e-8 + epsilon 1e-8: x = +-1e-4 becomes +-1e-4 / sqrt(3e-8) instead of +-1e-4 / sqrt(2e-8).
    whitened = masking.centre_and_scale(torch.tensor([1e-4, -1e-4]), torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(whitened, torch.tensor([1.0, -1.0]) / math.sqrt(3))
