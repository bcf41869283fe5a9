from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.token_selection import covariance_within, highest_covariance
from rlhf_toolkit.errors import ConfigError
from tests.support.batches import MASK, like_mask, poisoned, real


def stream(seed: int) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(seed)


def covariances(logprobs: Tensor, advantages: Tensor) -> dict[tuple[int, int], float]:
    """Each real token's, in Python's own floats."""
    mean = [sum(x[at].item() for at in real()) / len(real()) for x in (logprobs, advantages)]
    return {at: (logprobs[at].item() - mean[0]) * (advantages[at].item() - mean[1]) for at in real()}


def chosen(selected: Tensor) -> set[tuple[int, int]]:
    """Where it is True."""
    return {(b, t) for b, t in selected.nonzero().tolist()}


@pytest.mark.parametrize(("share", "count"), [(2e-4, 1), (0.1, 1), (0.12, 2), (0.5, 8), (1.0, 17)])
def test_the_highest_of_seventeen(share: float, count: int) -> None:
    logprobs, advantages = like_mask(0) - 4, like_mask(1) + 1  # neither has the mean 0
    by_size = sorted(covariances(logprobs, advantages).items(), key=lambda pair: -pair[1])
    found = highest_covariance(poisoned(logprobs), poisoned(advantages), MASK, share=share)
    assert found.dtype == torch.bool and found.shape == MASK.shape
    assert chosen(found) == {at for at, _ in by_size[:count]}


def test_the_highest_are_the_same_tokens_in_any_order_of_rows() -> None:
    order = torch.tensor([2, 4, 1, 0, 3])
    straight = highest_covariance(like_mask(2), like_mask(3), MASK, share=0.3)
    moved = highest_covariance(like_mask(2)[order], like_mask(3)[order], MASK[order], share=0.3)
    assert torch.equal(moved, straight[order])


def test_where_all_are_equal_the_count_still_holds() -> None:
    found = highest_covariance(torch.full(MASK.shape, -1.5), torch.ones(MASK.shape), MASK, share=0.3)
    assert found.sum() == 5 and not found[~MASK].any()


@pytest.mark.parametrize("share", [0.06, 0.12, 1.0])
def test_drawn_tokens_lie_between_the_bounds(share: float) -> None:
    logprobs, advantages = like_mask(4), like_mask(5)
    between = {at for at, value in covariances(logprobs, advantages).items() if 0.05 < value < 0.9}
    assert 3 <= len(between) < 17
    bounds = {"share": share, "lowest": 0.05, "highest": 0.9}
    draws = [
        chosen(covariance_within(poisoned(logprobs), poisoned(advantages), MASK, **bounds, generator=stream(seed)))
        for seed in range(40)
    ]
    assert all(draw <= between and len(draw) == min(int(17 * share), len(between)) for draw in draws)
    assert set.union(*draws) == between


def test_a_draw_is_the_generators_alone() -> None:
    torch.manual_seed(0)
    first = covariance_within(like_mask(4), like_mask(5), MASK, lowest=0.05, highest=0.9, generator=stream(7))
    torch.manual_seed(1)
    second = covariance_within(like_mask(4), like_mask(5), MASK, lowest=0.05, highest=0.9, generator=stream(7))
    assert torch.equal(first, second)


def test_none_between_the_bounds_is_none_chosen() -> None:
    found = covariance_within(like_mask(6), like_mask(7), MASK, lowest=1e6, highest=1e7, generator=stream(0))
    assert not found.any()


def test_no_real_token_is_none_chosen() -> None:
    nothing = torch.zeros_like(MASK)
    assert not highest_covariance(like_mask(8), like_mask(9), nothing).any()
    assert not covariance_within(like_mask(8), like_mask(9), nothing, generator=stream(0)).any()


def test_a_mask_that_is_not_contiguous_is_marked_too() -> None:
    wide = highest_covariance(like_mask(10).t(), like_mask(11).t(), MASK.t(), share=0.3)
    assert torch.equal(wide.t(), highest_covariance(like_mask(10), like_mask(11), MASK, share=0.3))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=rf"share={share} must be above 0 and at most 1"):
        highest_covariance(like_mask(12), like_mask(13), MASK, share=share)


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lowest=5\.0 must be below highest=5\.0"):
        covariance_within(like_mask(14), like_mask(15), MASK, lowest=5.0, generator=stream(0))
