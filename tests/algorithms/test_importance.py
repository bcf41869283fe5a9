from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.importance import (
    Correction,
    capped_share,
    effective_sample_share,
    masked_sequence_weights,
    masked_share,
    masked_token_weights,
    mean_weight,
    truncated_sequence_weights,
    truncated_token_weights,
)
from rlhf_toolkit.errors import ConfigError
from tests.support.batches import MASK, blank_outside, like_mask, poisoned, real
from tests.support.offenders import for_each

BOTH = pytest.mark.parametrize("weigh", [truncated_token_weights, truncated_sequence_weights])


def test_tokens_by_hand() -> None:
    old, rollout = torch.tensor([[0.5, 0.1, 0.9]]).log(), torch.tensor([[0.25, 0.2, 0.1]]).log()
    weights = truncated_token_weights(old, rollout, torch.ones(1, 3, dtype=torch.bool), threshold=3.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 3.0]]))


def test_sequences_by_hand() -> None:
    # Ratios 2, 1/2, 4 and, masked, 100: the product is 4; above the threshold of 3, below one of 5.
    old, rollout = torch.tensor([[0.5, 0.1, 0.4, 1.0]]).log(), torch.tensor([[0.25, 0.2, 0.1, 0.01]]).log()
    mask = torch.tensor([[True, True, True, False]])
    for threshold, expected in ((3.0, 3.0), (5.0, 4.0)):
        weights = truncated_sequence_weights(old, rollout, mask, threshold=threshold)
        torch.testing.assert_close(weights, torch.tensor([[expected, expected, expected, 0.0]]))


def test_agree_with_a_plain_loop_with_poison_outside() -> None:
    old, rollout = like_mask(9), like_mask(10)
    tokens = truncated_token_weights(poisoned(old), poisoned(rollout), MASK, threshold=2.0)
    rows = truncated_sequence_weights(poisoned(old), poisoned(rollout), MASK, threshold=2.0)
    truncated = []
    for b, t in real():
        x = old[b, t].item() - rollout[b, t].item()
        whole = math.fsum((old[at] - rollout[at]).item() for at in real() if at[0] == b)
        assert tokens[b, t].item() == pytest.approx(min(math.exp(x), 2.0), rel=1e-5)
        assert rows[b, t].item() == pytest.approx(min(math.exp(whole), 2.0), rel=1e-5)
        truncated.append((math.exp(x) > 2.0, math.exp(whole) > 2.0))
    assert {flags[0] for flags in truncated} == {flags[1] for flags in truncated} == {True, False}
    assert blank_outside(tokens) and blank_outside(rows)


@BOTH
def test_equal_samplers_weigh_one(weigh: Callable[..., Tensor]) -> None:
    assert torch.equal(weigh(like_mask(2), like_mask(2), MASK, threshold=2.0), MASK.float())


@BOTH
def test_no_gradient_flows(weigh: Callable[..., Tensor]) -> None:
    old = like_mask(3).requires_grad_()
    assert not weigh(old, like_mask(4), MASK, threshold=2.0).requires_grad


def test_the_sum_is_bounded_not_its_terms() -> None:
    # +30 and -25 sum to 5: clamping each to 20 first would give 0, a weight of 1.
    old, zeros = torch.tensor([[30.0, -25.0]]), torch.zeros(1, 2)
    weights = truncated_sequence_weights(old, zeros, torch.ones(1, 2, dtype=torch.bool), threshold=1e9)
    torch.testing.assert_close(weights, torch.full((1, 2), math.exp(5)))


@BOTH
def test_log_ratios_are_bounded_by_twenty(weigh: Callable[..., Tensor]) -> None:
    old, mask = torch.tensor([[200.0], [-200.0]]), torch.ones(2, 1, dtype=torch.bool)
    weights = weigh(old, torch.zeros(2, 1), mask, threshold=1e30)
    torch.testing.assert_close(weights, torch.tensor([[math.exp(20)], [math.exp(-20)]]))


@pytest.mark.parametrize(
    ("kind", "weigh"), [("token", truncated_token_weights), ("sequence", truncated_sequence_weights)]
)
def test_a_correction_by_name_has_its_cap(kind: str, weigh: Callable[..., Tensor]) -> None:
    old, rollout = like_mask(5), like_mask(6)
    found = Correction(kind, 1.5).weights(old, rollout, MASK)
    assert found is not None and torch.equal(found, weigh(old, rollout, MASK, threshold=1.5))


def test_no_correction_has_no_weights() -> None:
    assert Correction().weights(like_mask(5), like_mask(6), MASK) is None


@pytest.mark.parametrize("settings", [{"kind": "tokens"}, {"kind": "token", "cap": 0.9}])
def test_a_correction_that_cannot_work(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"choose one of none, token, sequence|cap=0\.9 must be at least 1"):
        Correction(**settings)


def test_statistics_of_weights_by_hand_with_poison_outside() -> None:
    # Weights 2.1 (the cap, not exact in binary), 1, 0.5 and, masked, poison.
    old, rollout = torch.tensor([[3.0, 1.0, 0.5, 1.0]]).log(), torch.zeros(1, 4)
    mask = torch.tensor([[True, True, True, False]])
    weights = truncated_token_weights(old, rollout, mask, threshold=2.1)
    seen = poisoned(weights, mask)
    assert mean_weight(seen, mask).item() == pytest.approx(3.6 / 3)
    assert capped_share(seen, mask, threshold=2.1).item() == pytest.approx(1 / 3)
    assert effective_sample_share(seen, mask).item() == pytest.approx(3.6**2 / (3 * (2.1**2 + 1 + 0.25)))


def test_the_effective_sample_share_of_equal_weights_is_one_and_of_a_single_one_its_share() -> None:
    assert effective_sample_share(3 * MASK.float(), MASK).item() == pytest.approx(1)
    alone = torch.zeros(MASK.shape)
    alone[0, 0] = 5.0
    assert effective_sample_share(alone, MASK).item() == pytest.approx(1 / len(real()))
    assert effective_sample_share(torch.zeros(MASK.shape), MASK).item() == 0


def test_masked_weights_by_hand() -> None:
    # Log-ratios in [-1.5, 1.5] keep their weight; the rows' are 0 and 2.
    log_ratios = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.0], [2.0, -1.0, 1.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    tokens, rows = (
        weigh(log_ratios, torch.zeros(2, 5), mask, floor=math.exp(-1.5), cap=math.exp(1.5))
        for weigh in (masked_token_weights, masked_sequence_weights)
    )
    e = math.e
    torch.testing.assert_close(tokens, torch.tensor([[e, 1 / e, 0.0, 0.0, 0.0], [0.0, 1 / e, e, 0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]))


def test_masked_weights_agree_with_a_plain_loop_with_poison_outside() -> None:
    old, rollout = like_mask(11), like_mask(12)
    bounds = {"floor": 0.4, "cap": 3.0}
    tokens = masked_token_weights(poisoned(old), poisoned(rollout), MASK, **bounds)
    rows = masked_sequence_weights(poisoned(old), poisoned(rollout), MASK, **bounds)
    seen = set()
    for b, t in real():
        rho = math.exp(old[b, t].item() - rollout[b, t].item())
        product = math.exp(math.fsum((old[at] - rollout[at]).item() for at in real() if at[0] == b))
        assert tokens[b, t].item() == pytest.approx(rho if 0.4 <= rho <= 3 else 0, rel=1e-5)
        assert rows[b, t].item() == pytest.approx(product if 0.4 <= product <= 3 else 0, rel=1e-5)
        seen |= {(rho < 0.4, rho > 3), (product < 0.4, product > 3)}
    assert seen == {(False, False), (True, False), (False, True)}
    assert blank_outside(tokens) and blank_outside(rows)
    assert Correction("token_mask", cap=2.1).cut_share(poisoned(tokens), MASK) == masked_share(poisoned(tokens), MASK)
    assert masked_share(poisoned(tokens), MASK).item() == pytest.approx(
        sum(tokens[at].item() == 0 for at in real()) / 17
    )


@pytest.mark.parametrize(
    ("kind", "weigh"), [("token_mask", masked_token_weights), ("sequence_mask", masked_sequence_weights)]
)
def test_a_masking_correction_by_name_has_its_range(kind: str, weigh: Callable[..., Tensor]) -> None:
    old, rollout = like_mask(5).requires_grad_(), like_mask(6)
    found = Correction(kind, 1.5, 0.8).weights(old, rollout, MASK)
    assert found is not None and torch.equal(found, weigh(old, rollout, MASK, floor=0.8, cap=1.5))
    assert not found.requires_grad and torch.equal(weigh(old, old, MASK, floor=1.0, cap=1.0), MASK.float())


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_a_floor_says_nothing_to_truncation(kind: str) -> None:
    found = [Correction(kind, 1.5, floor).weights(like_mask(5), like_mask(6), MASK) for floor in (0.0, 1.0)]
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


@for_each(
    "settings, message",
    [
        ({"floor": -0.1}, r"floor=-0\.1 must be from 0 to 1"),
        ({"floor": 1.1}, r"floor=1\.1 must be from 0 to 1"),
        ({"floor": math.nan}, r"floor=nan must be from 0 to 1"),
        ({"cap": math.nan}, r"cap=nan must be at least 1"),
        ({"kind": "mask"}, "choose one of none, token, sequence, token_mask, sequence_mask"),
    ],
)
def test_a_range_without_one_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Correction(**settings)
