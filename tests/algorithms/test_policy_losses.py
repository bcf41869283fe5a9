from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.policy_losses import POLICY_LOSSES, vanilla
from rlhf_toolkit.errors import ConfigError
from tests.support.batches import MASK, blank_outside, like_mask, poisoned, real, widened
from tests.support.values import there

KNOBS: dict[str, Any] = {"clip_range_low": 0.2, "clip_range_high": 0.28, "dual_clip": 3.0}


def ppo_token(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> tuple[float, bool, bool]:
    """PPO's objective as the papers state it, negated at the end: (loss, clipped, dual_clipped)."""
    surrogate, limited = ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage
    objective = min(surrogate, limited)
    if dual is not None and advantage < 0 and objective < dual * advantage:
        return -dual * advantage, limited < surrogate, True
    return -objective, limited < surrogate, False


def by_token(ratios: list[float], advantages: list[float], **knobs: Any) -> tuple[Tensor, ...]:
    """``vanilla`` on one row of given ratios, with the gradient of the summed loss to the log-probs."""
    logprobs = (torch.tensor([ratios]).log() - 1.5).requires_grad_()
    old = torch.full_like(logprobs, -1.5).detach()
    terms = vanilla(logprobs, old, torch.tensor([advantages]), torch.ones(1, len(ratios), dtype=torch.bool), **knobs)
    terms.per_token.sum().backward()
    return terms.per_token.detach()[0], terms.clipped[0], terms.dual_clipped[0], there(logprobs.grad)[0]


def test_the_six_cases_by_hand() -> None:
    # Ratio below, inside and above the range; advantage +2, then -2. Gradient: loss where r decides, 0 where clipped.
    ratios, advantages = [0.5, 1.1, 1.5] * 2, [2.0] * 3 + [-2.0] * 3
    loss, clipped, dual, grad = by_token(ratios, advantages, clip_range_low=0.2, clip_range_high=0.3)
    torch.testing.assert_close(loss, torch.tensor([-1.0, -2.2, -2.6, 1.6, 2.2, 3.0]))
    torch.testing.assert_close(grad, torch.tensor([-1.0, -2.2, 0.0, 0.0, 2.2, 3.0]))
    assert clipped.tolist() == [False, False, True, True, False, False]
    assert not dual.any()


def test_the_dual_clip_by_hand() -> None:
    # c = 3: only a bad token (A < 0) that became more than three times likelier is cut, and then has no gradient.
    ratios, advantages = [2.5, 4.0, 4.0], [-2.0, -2.0, 2.0]
    loss, clipped, dual, grad = by_token(ratios, advantages, clip_range_low=0.2, clip_range_high=0.3, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([5.0, 6.0, -2.6]))
    torch.testing.assert_close(grad, torch.tensor([5.0, 0.0, 0.0]))
    assert clipped.tolist() == [False, False, True]
    assert dual.tolist() == [False, True, False]


def test_a_ratio_exactly_at_the_dual_clip_is_not_cut() -> None:
    logprobs, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    at_the_ratio = logprobs.exp().item()
    terms = vanilla(logprobs, torch.zeros(1, 1), -logprobs, mask, **{**KNOBS, "dual_clip": at_the_ratio})
    assert terms.per_token.item() == at_the_ratio
    assert not terms.dual_clipped.any()


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_agrees_with_a_plain_loop(dual_clip: float | None) -> None:
    now, old, advantages = like_mask(0), like_mask(1), like_mask(2)
    knobs: dict[str, Any] = {"clip_range_low": 0.1, "clip_range_high": 0.4, "dual_clip": dual_clip}
    terms = vanilla(poisoned(now), poisoned(old), poisoned(advantages), MASK, **knobs)
    seen = set()
    for at in real():
        ratio, advantage = math.exp(now[at].item() - old[at].item()), advantages[at].item()
        loss, clipped, dual = ppo_token(ratio, advantage, 0.1, 0.4, dual_clip)
        assert terms.per_token[at].item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert terms.ratio[at].item() == pytest.approx(ratio, rel=1e-5)
        assert (terms.clipped[at].item(), terms.dual_clipped[at].item()) == (clipped, dual)
        seen.add((clipped, dual))
    assert seen >= {(False, False), (True, False)} | ({(False, True)} if dual_clip else set())


def test_ratio_one_is_minus_the_advantage_with_the_policy_gradient() -> None:
    logprobs, advantages = like_mask(3).requires_grad_(), like_mask(4)
    terms = vanilla(logprobs, logprobs.detach(), advantages, MASK, **KNOBS)
    assert torch.equal(terms.per_token, torch.where(MASK, -advantages, 0.0))
    assert not (terms.clipped | terms.dual_clipped).any()
    terms.per_token.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.where(MASK, -advantages, 0.0))


def test_an_infinite_range_is_importance_sampling() -> None:
    now, old, advantages = like_mask(5), like_mask(6), like_mask(7)
    terms = vanilla(now, old, advantages, MASK, clip_range_low=math.inf, clip_range_high=math.inf)
    torch.testing.assert_close(terms.per_token, torch.where(MASK, -advantages * (now - old).exp(), 0.0))


def test_the_log_ratio_is_bounded() -> None:
    terms = vanilla(torch.tensor([[0.0, -90.0]]), torch.tensor([[-90.0, 0.0]]), torch.tensor([[-1.0, 1.0]]),
                    torch.ones(1, 2, dtype=torch.bool), clip_range_low=0.2, clip_range_high=0.2)  # fmt: skip
    torch.testing.assert_close(terms.ratio, torch.tensor([[math.exp(20), math.exp(-20)]]))
    torch.testing.assert_close(terms.per_token, torch.tensor([[math.exp(20), -math.exp(-20)]]))


def test_what_is_masked_reaches_neither_loss_nor_gradient() -> None:
    logprobs = poisoned(like_mask(8)).requires_grad_()
    others = (poisoned(like_mask(9)), poisoned(like_mask(10)))
    terms = vanilla(logprobs, *others, MASK, **KNOBS, weights=poisoned(like_mask(11).abs()))
    terms.per_token.sum().backward()
    reached = (terms.per_token, terms.clipped, terms.dual_clipped, terms.ratio - 1, there(logprobs.grad))
    assert all(blank_outside(each) for each in reached)


def test_weights_multiply_loss_and_gradient() -> None:
    logprobs, weights = like_mask(12).requires_grad_(), like_mask(13).abs()
    others = (like_mask(14), like_mask(15), MASK)
    plain = vanilla(logprobs, *others, **KNOBS)
    weighted = vanilla(logprobs, *others, **KNOBS, weights=weights)
    torch.testing.assert_close(weighted.per_token, plain.per_token * weights)
    assert torch.equal(weighted.clipped, plain.clipped) and torch.equal(weighted.dual_clipped, plain.dual_clipped)
    gradients = [torch.autograd.grad(terms.per_token.sum(), logprobs)[0] for terms in (weighted, plain)]
    torch.testing.assert_close(gradients[0], gradients[1] * weights)


def test_gradient_goes_to_the_policy_alone() -> None:
    logprobs, advantages, weights = (like_mask(seed).requires_grad_() for seed in (16, 17, 18))
    terms = vanilla(logprobs, like_mask(19), advantages, MASK, **KNOBS, weights=weights)
    terms.per_token.sum().backward()
    assert logprobs.grad is not None and advantages.grad is None and weights.grad is None
    assert not terms.ratio.requires_grad


def test_more_padding_changes_no_bit() -> None:
    tensors = (like_mask(20), like_mask(21), like_mask(22))
    narrow = vanilla(*tensors, MASK, **KNOBS)
    now, old, advantages = map(widened, tensors)
    wide = vanilla(now, old, advantages, widened(MASK), **KNOBS)
    assert all(torch.equal(a, b[:, :7]) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("dual_clip", [1.0, 0.2])
def test_a_dual_clip_that_cuts_everything_is_refused(dual_clip: float) -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match=rf"dual_clip={dual_clip} must be above 1.*try 3.0"):
        vanilla(x, x, x, x.bool(), clip_range_low=0.2, clip_range_high=0.2, dual_clip=dual_clip)


def test_the_registry_knows_vanilla() -> None:
    assert POLICY_LOSSES["vanilla"] is vanilla
