from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.advantages import gae
from tests.algorithms.batches import MASK, blank_outside, like_mask, noise, poisoned, widened


def gae_by_row(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: list[float]
) -> tuple[Tensor, Tensor]:
    """GAE as its definition, a double sum over each row's real tokens: A_t = sum_k (gamma lam)^k delta_{t+k}."""
    advantages, returns = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for b in range(mask.size(0)):
        at = [t for t in range(mask.size(1)) if mask[b, t]]
        r, v = [rewards[b, t].item() for t in at], [values[b, t].item() for t in at] + [bootstrap[b]]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(at))]
        for i, t in enumerate(at):
            advantages[b, t] = sum((gamma * lam) ** k * deltas[i + k] for k in range(len(at) - i))
            returns[b, t] = advantages[b, t] + v[i]
    return advantages, returns


def test_three_tokens_by_hand() -> None:
    # gamma 1/2, lambda 1/2. delta = (1 + 1 - 4, 0 + 4 - 2, 8 + 0 - 8) = (-2, 2, 0); A = (-2 + 2/4, 2 + 0, 0).
    rewards, values = torch.tensor([[1.0, 0.0, 8.0]]), torch.tensor([[4.0, 2.0, 8.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[-1.5, 2.0, 0.0]]
    assert returns.tolist() == [[2.5, 4.0, 8.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.98, 1.0), (1.0, 0.0)])
def test_agrees_with_the_double_sum(gamma: float, lam: float) -> None:
    rewards, values = like_mask(0), like_mask(1)
    ours = gae(poisoned(rewards), poisoned(values), MASK, gamma=gamma, gae_lambda=lam)
    for got, expected in zip(ours, gae_by_row(rewards, values, MASK, gamma, lam, [0.0] * 5), strict=True):
        torch.testing.assert_close(got, expected)


def test_bootstrap_agrees_with_the_double_sum() -> None:
    rewards, values, bootstrap = like_mask(2), like_mask(3), noise(5, seed=4)
    ours = gae(rewards, values, MASK, gamma=0.9, gae_lambda=0.8, bootstrap=bootstrap)
    for got, expected in zip(ours, gae_by_row(rewards, values, MASK, 0.9, 0.8, bootstrap.tolist()), strict=True):
        torch.testing.assert_close(got, expected)


def test_no_bootstrap_is_a_bootstrap_of_zero() -> None:
    knobs = {"gamma": 0.9, "gae_lambda": 0.8}
    without = gae(like_mask(5), like_mask(6), MASK, **knobs)
    zero = gae(like_mask(5), like_mask(6), MASK, **knobs, bootstrap=torch.zeros(5))
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))


def test_undiscounted_is_reward_to_go_minus_value() -> None:
    rewards, values = torch.where(MASK, like_mask(7), 0.0), like_mask(8)
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, gae_lambda=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns[MASK], to_go[MASK])
    torch.testing.assert_close(advantages[MASK], (to_go - values)[MASK])


def test_lambda_zero_is_the_one_step_error() -> None:
    rewards, values = like_mask(9)[:1], like_mask(10)[:1]
    advantages, _ = gae(rewards, values, MASK[:1], gamma=0.9, gae_lambda=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


def test_a_perfect_value_function_leaves_no_advantage() -> None:
    rewards = torch.where(MASK, like_mask(11), 0.0)
    _, perfect = gae(rewards, torch.zeros(MASK.shape), MASK, gamma=0.9, gae_lambda=1.0)
    advantages, returns = gae(rewards, perfect, MASK, gamma=0.9, gae_lambda=0.7)
    torch.testing.assert_close(advantages, torch.zeros(MASK.shape), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, perfect)


def test_a_hole_is_as_if_it_were_not_there() -> None:
    rewards, values, knobs = like_mask(12), like_mask(13), {"gamma": 0.9, "gae_lambda": 0.8}
    holed = gae(rewards[1:2], values[1:2], MASK[1:2], **knobs)
    kept = MASK[1]
    closed = gae(rewards[1:2, kept], values[1:2, kept], torch.ones(1, 4, dtype=torch.bool), **knobs)
    assert all(torch.equal(a[:, kept], b) for a, b in zip(holed, closed, strict=True))


def test_outside_the_mask_all_is_zero_and_an_empty_row_is_no_trouble() -> None:
    mask = MASK.clone()
    mask[3] = False
    for output in gae(poisoned(like_mask(14), mask), poisoned(like_mask(15), mask), mask, gamma=0.9, gae_lambda=0.8):
        assert blank_outside(output, mask)


def test_more_padding_changes_no_bit() -> None:
    bootstrap = noise(5, seed=18)
    knobs = {"gamma": 0.99, "gae_lambda": 0.95, "bootstrap": bootstrap}
    narrow = gae(like_mask(16), like_mask(17), MASK, **knobs)
    wide = gae(widened(like_mask(16)), widened(like_mask(17)), widened(MASK), **knobs)
    assert all(torch.equal(a, b[:, :7]) for a, b in zip(narrow, wide, strict=True))


def test_width_zero_gives_width_zero() -> None:
    nothing = torch.zeros(2, 0)
    advantages, returns = gae(nothing, nothing, nothing.bool(), gamma=1.0, gae_lambda=1.0)
    assert advantages.shape == returns.shape == (2, 0)
