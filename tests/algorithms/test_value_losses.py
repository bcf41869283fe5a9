from __future__ import annotations

import pytest
import torch

from rlhf_toolkit.algorithms.value_losses import clipped_value_loss
from tests.support.batches import MASK, blank_outside, like_mask, poisoned, real, widened
from tests.support.values import there


def test_four_tokens_by_hand() -> None:
    # Old value 0, range 1. V = 3 is clipped to 1. Return 5: the clipped value is worse, (1 - 5)^2 / 2, no gradient.
    # Return 0: the value itself is worse, 9 / 2, gradient 3. V = -3 mirrors it; inside the range nothing is clipped.
    values = torch.tensor([[3.0, 3.0, -3.0, 0.5]], requires_grad=True)
    returns, old = torch.tensor([[5.0, 0.0, -5.0, 2.5]]), torch.zeros(1, 4)
    terms = clipped_value_loss(values, old, returns, torch.ones(1, 4, dtype=torch.bool), value_clip_range=1.0)
    terms.per_token.sum().backward()
    assert terms.per_token.tolist() == [[8.0, 4.5, 8.0, 2.0]]
    assert terms.clipped.tolist() == [[True, False, True, False]]
    assert there(values.grad).tolist() == [[0.0, 3.0, 0.0, -2.0]]


@pytest.mark.parametrize("clip", [0.2, 0.7, None])
def test_agrees_with_a_plain_loop(clip: float | None) -> None:
    values, old, returns = like_mask(0), like_mask(1), like_mask(2)
    terms = clipped_value_loss(poisoned(values), poisoned(old), poisoned(returns), MASK, value_clip_range=clip)
    for at in real():
        v, o, g = values[at].item(), old[at].item(), returns[at].item()
        limited = v if clip is None else min(max(v, o - clip), o + clip)
        worst = max(abs(v - g), abs(limited - g))
        assert terms.per_token[at].item() == pytest.approx(worst**2 / 2, rel=1e-5)
        assert terms.clipped[at].item() == (abs(limited - g) > abs(v - g))
    assert terms.clipped.any().item() == (clip is not None)


def test_no_clipping_is_the_limit_of_a_wide_range() -> None:
    tensors = (like_mask(3), like_mask(4), like_mask(5))
    plain = clipped_value_loss(*tensors, MASK, value_clip_range=None)
    wide = clipped_value_loss(*tensors, MASK, value_clip_range=1e6)
    assert all(torch.equal(a, b) for a, b in zip(plain, wide, strict=True))


def test_unclipped_gradient_is_the_error() -> None:
    values, returns = like_mask(6).requires_grad_(), like_mask(7)
    clipped_value_loss(values, like_mask(8), returns, MASK, value_clip_range=None).per_token.sum().backward()
    torch.testing.assert_close(values.grad, torch.where(MASK, values.detach() - returns, 0.0))


@pytest.mark.parametrize("clip", [0.2, None])
def test_what_is_masked_reaches_neither_loss_nor_gradient(clip: float | None) -> None:
    values, old, returns = (poisoned(like_mask(seed)).requires_grad_() for seed in (9, 10, 11))
    terms = clipped_value_loss(values, old, returns, MASK, value_clip_range=clip)
    terms.per_token.sum().backward()
    assert all(blank_outside(each) for each in (terms.per_token, terms.clipped, there(values.grad)))
    assert old.grad is None and returns.grad is None


def test_more_padding_changes_no_bit() -> None:
    tensors = (like_mask(12), like_mask(13), like_mask(14))
    narrow = clipped_value_loss(*tensors, MASK, value_clip_range=0.2)
    values, old, returns = map(widened, tensors)
    wide = clipped_value_loss(values, old, returns, widened(MASK), value_clip_range=0.2)
    assert all(torch.equal(a, b[:, :7]) for a, b in zip(narrow, wide, strict=True))
