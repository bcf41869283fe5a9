from __future__ import annotations

import math
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS, WHITENED, gae, reinforce_plus_plus, remax, vapo
from rlhf_toolkit.algorithms.masking import centre_and_scale
from rlhf_toolkit.algorithms.rewards import reward_to_go
from rlhf_toolkit.plugins import takes
from tests.support.batches import MASK, blank_outside, like_mask, noise, poisoned, real, widened


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
    knobs: dict[str, Any] = {"gamma": 0.9, "gae_lambda": 0.8}
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
    rewards, values = like_mask(12), like_mask(13)
    knobs: dict[str, Any] = {"gamma": 0.9, "gae_lambda": 0.8}
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
    knobs: dict[str, Any] = {"gamma": 0.99, "gae_lambda": 0.95, "bootstrap": bootstrap}
    narrow = gae(like_mask(16), like_mask(17), MASK, **knobs)
    wide = gae(widened(like_mask(16)), widened(like_mask(17)), widened(MASK), **knobs)
    assert all(torch.equal(a, b[:, :7]) for a, b in zip(narrow, wide, strict=True))


def test_width_zero_gives_width_zero() -> None:
    nothing = torch.zeros(2, 0)
    advantages, returns = gae(nothing, nothing, nothing.bool(), gamma=1.0, gae_lambda=1.0)
    assert advantages.shape == returns.shape == (2, 0)


def test_a_lambda_for_each_row_is_that_row_alone() -> None:
    rewards, values, lambdas = like_mask(19), like_mask(20), [0.0, 0.3, 0.95, 1.0, 0.5]
    together = gae(rewards, values, MASK, gamma=0.9, gae_lambda=torch.tensor(lambdas))
    for b, each in enumerate(lambdas):
        row = slice(b, b + 1)
        alone = gae(rewards[row], values[row], MASK[row], gamma=0.9, gae_lambda=each)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[row], part)


@pytest.mark.parametrize("value_lambda", [1.0, 0.9])
def test_vapo_agrees_with_the_double_sum_row_by_row(value_lambda: float) -> None:
    rewards, values, bootstrap = like_mask(21), like_mask(22), noise(5, seed=23)
    knobs: dict[str, Any] = {"gamma": 0.98, "value_lambda": value_lambda, "alpha": 0.4, "bootstrap": bootstrap}
    advantages, returns = vapo(poisoned(rewards), poisoned(values), MASK, **knobs)
    seen = set()
    for b, length in enumerate([7, 4, 1, 3, 2]):
        by_length = max(0.0, 1 - 1 / (0.4 * length))
        row, last = slice(b, b + 1), [bootstrap[b].item()]
        policy, _ = gae_by_row(rewards[row], values[row], MASK[row], 0.98, by_length, last)
        _, value = gae_by_row(rewards[row], values[row], MASK[row], 0.98, value_lambda, last)
        torch.testing.assert_close(advantages[row], policy)
        torch.testing.assert_close(returns[row], value)
        seen.add(by_length)
    assert 0.0 in seen and len(seen) > 2


def test_the_weights_of_vapos_errors_sum_to_alpha_l() -> None:
    # One token of TD error 1 far enough from the start of 400: its weights in A_0, A_1, ... are lambda^k.
    rewards, values = torch.zeros(1, 400), torch.zeros(1, 400)
    rewards[0, 399] = 1.0
    advantages, _ = vapo(rewards, values, torch.ones(1, 400, dtype=torch.bool), gamma=1.0)
    assert advantages.sum().item() == pytest.approx(0.05 * 400, rel=1e-4)


def test_reward_to_go_by_hand() -> None:
    # gamma 1/2; the hole's 100 is neither earned nor a step of discount.
    rewards, mask = torch.tensor([[1.0, 100.0, 2.0, 4.0, 7.0]]), torch.tensor([[1, 0, 1, 1, 0]]).bool()
    assert reward_to_go(rewards, mask, gamma=0.5).tolist() == [[3.0, 0.0, 4.0, 4.0, 0.0]]
    assert reinforce_plus_plus(rewards, mask, gamma=0.5)[0].tolist() == [[3.0, 0.0, 4.0, 4.0, 0.0]]


def test_reinforce_plus_plus_is_gae_without_a_value_function() -> None:
    rewards = like_mask(24)
    ours = reinforce_plus_plus(poisoned(rewards), MASK, gamma=0.9)
    of_gae = gae(rewards, torch.zeros(MASK.shape), MASK, gamma=0.9, gae_lambda=1.0)
    for a, b in zip(ours, of_gae, strict=True):
        torch.testing.assert_close(a, b)


def test_remax_subtracts_the_greedy_score_from_what_is_still_to_come() -> None:
    rewards, baselines = like_mask(25), noise(5, seed=26)
    advantages, returns = remax(poisoned(rewards), MASK, baselines)
    for b, t in real():
        to_come = math.fsum(rewards[at].item() for at in real() if at[0] == b and at[1] >= t)
        assert returns[b, t].item() == pytest.approx(to_come, abs=1e-5)
        assert advantages[b, t].item() == pytest.approx(to_come - baselines[b].item(), abs=1e-5)
    assert blank_outside(advantages) and blank_outside(returns)


def offered(name: str, **changes: Tensor) -> dict[str, Any]:
    """Everything an estimator may ask for, of which it is given what its parameters name."""
    batch: dict[str, Any] = {
        "rewards": like_mask(27),
        "mask": MASK,
        "values": like_mask(28),
        "groups": torch.tensor([0, 1, 0, 0, 1]),
        "baselines": noise(5, seed=29),
        "bootstrap": noise(5, seed=30),
        "gamma": 0.9,
        "gae_lambda": 0.8,
    }
    return {key: value for key, value in (batch | changes).items() if takes(ADVANTAGE_ESTIMATORS[name], key)}


EVERY = pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)  # a test for each, to be chosen by its name


@EVERY
def test_every_estimator_asks_only_for_what_there_is(name: str) -> None:
    offer = set(offered(name))
    constants = {key for key, p in signature(ADVANTAGE_ESTIMATORS[name]).parameters.items() if p.default is not p.empty}
    assert set(signature(ADVANTAGE_ESTIMATORS[name]).parameters) == offer | constants


@EVERY
def test_nothing_outside_the_mask_reaches_any_estimator(name: str) -> None:
    clean = ADVANTAGE_ESTIMATORS[name](**offered(name))
    dirty = ADVANTAGE_ESTIMATORS[name](**offered(name, rewards=poisoned(like_mask(27)), values=poisoned(like_mask(28))))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and blank_outside(b) and a.dtype == torch.float32 and a.shape == MASK.shape


@EVERY
def test_rows_in_another_order_give_the_same_of_any_estimator(name: str) -> None:
    order, batch = torch.tensor([4, 2, 0, 3, 1]), offered(name)
    moved = {key: value[order] if isinstance(value, Tensor) else value for key, value in batch.items()}
    for a, b in zip(ADVANTAGE_ESTIMATORS[name](**batch), ADVANTAGE_ESTIMATORS[name](**moved), strict=True):
        torch.testing.assert_close(a[order], b, rtol=1e-6, atol=1e-7)


@EVERY
def test_an_estimator_leaves_its_inputs_and_does_not_whiten(name: str) -> None:
    batch = offered(name)
    before = {key: value.clone() for key, value in batch.items() if isinstance(value, Tensor)}
    advantages, _ = ADVANTAGE_ESTIMATORS[name](**batch)
    assert all(torch.equal(batch[key], value) for key, value in before.items())
    assert not torch.allclose(advantages, centre_and_scale(advantages, MASK), atol=1e-2)


def test_the_whitened_are_estimators() -> None:
    assert (
        set(ADVANTAGE_ESTIMATORS) > WHITENED == {"gae", "vapo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"}
    )
