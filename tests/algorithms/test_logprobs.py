from __future__ import annotations

import math

import torch

from rlhf_toolkit.algorithms.logprobs import bounded_exp, log_ratio
from tests.support.batches import MASK, like_mask, poisoned


def test_log_ratio_is_now_minus_then_and_zero_outside() -> None:
    now, then = poisoned(like_mask(2)), poisoned(like_mask(3))
    assert torch.equal(log_ratio(now, then, MASK), torch.where(MASK, like_mask(2) - like_mask(3), 0.0))


def test_bounded_exp_stays_finite_and_has_no_gradient_beyond_the_bound() -> None:
    x = torch.tensor([-1000.0, -19.0, 0.0, 2.0, 1000.0], requires_grad=True)
    y = bounded_exp(x)
    y.sum().backward()
    expected = torch.tensor([math.exp(v) for v in (-20, -19, 0, 2, 20)])
    torch.testing.assert_close(y.detach(), expected)
    torch.testing.assert_close(x.grad, expected * torch.tensor([0.0, 1, 1, 1, 0]))
