from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.kl import KL_ESTIMATORS, approximate_kl, kl_abs, kl_k1, kl_k2, kl_k3, kl_penalty
from rlhf_toolkit.errors import ConfigError
from tests.support.batches import MASK, blank_outside, like_mask, noise, poisoned
from tests.support.offenders import for_each
from tests.support.values import there


def test_the_estimators_by_hand() -> None:
    # The policy gives the token probability 1/2, the reference 1/4, then the other way round.
    policy, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    x = math.log(2)
    torch.testing.assert_close(kl_k1(policy, reference), torch.tensor([x, -x]))
    torch.testing.assert_close(kl_abs(policy, reference), torch.tensor([x, x]))
    torch.testing.assert_close(kl_k2(policy, reference), torch.tensor([x * x / 2, x * x / 2]))
    torch.testing.assert_close(kl_k3(policy, reference), torch.tensor([0.5 - 1 + x, 2 - 1 - x]))


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(estimator: Callable[..., Tensor]) -> None:
    # The expectation under the policy, taken exactly over the vocabulary, is the KL itself.
    policy, reference = noise(8, seed=0).log_softmax(0), noise(8, seed=1).log_softmax(0)
    exact = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), exact)


def test_k2_has_the_right_gradient_in_expectation() -> None:
    # Schulman: the expected gradient of k2 is the gradient of the KL; that of k1 is 0.
    logits, reference = noise(8, seed=2).requires_grad_(), noise(8, seed=3).log_softmax(0)
    policy = logits.log_softmax(0)
    (of_k2,) = torch.autograd.grad((policy.exp().detach() * kl_k2(policy, reference)).sum(), logits, retain_graph=True)
    (of_k1,) = torch.autograd.grad((policy.exp().detach() * kl_k1(policy, reference)).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    torch.testing.assert_close(of_k2, exact)
    torch.testing.assert_close(of_k1, torch.zeros(8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["abs", "k2", "k3"])
def test_all_but_k1_are_never_negative(name: str) -> None:
    x = torch.cat([noise(1000, seed=4, scale=scale) for scale in (1e-3, 1e-1, 1, 30)])
    assert (KL_ESTIMATORS[name](x, torch.zeros_like(x)) >= 0).all()


def test_k3_keeps_its_digits_near_zero() -> None:
    x = torch.tensor([1e-3, -1e-3])
    torch.testing.assert_close(kl_k3(x, torch.zeros(2)), x.square() / 2, rtol=1e-3, atol=0)


def test_k3_is_clamped_in_and_out() -> None:
    policy = torch.tensor([-2.0, -3.0, -500.0, 500.0], requires_grad=True)
    k3 = kl_k3(policy, torch.zeros(4))
    k3.sum().backward()
    # e^2 - 2 - 1 is below 10, e^3 - 3 - 1 above it; 500 is first clamped to 20: e^-20 + 20 - 1, above 10 as well.
    torch.testing.assert_close(k3.detach(), torch.tensor([math.e**2 - 3, 10.0, 10.0, 10.0]))
    torch.testing.assert_close(policy.grad, torch.tensor([1 - math.e**2, 0.0, 0.0, 0.0]))


@for_each("name", KL_ESTIMATORS)
def test_equal_policies_have_no_kl(name: str) -> None:
    assert torch.equal(kl_penalty(like_mask(5), like_mask(5), estimator=name), torch.zeros(MASK.shape))


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_penalty_names_the_estimator_and_blanks_the_rest(name: str) -> None:
    clean = KL_ESTIMATORS[name](like_mask(6), like_mask(7))
    assert torch.equal(kl_penalty(like_mask(6), like_mask(7), estimator=name), clean)
    logprobs = poisoned(like_mask(6)).requires_grad_()
    masked = kl_penalty(logprobs, poisoned(like_mask(7)), MASK, estimator=name)
    assert torch.equal(masked, torch.where(MASK, clean, 0.0))
    masked.sum().backward()
    assert blank_outside(there(logprobs.grad))


def test_an_unknown_estimator_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="estimator='k4' is not a KL estimator; choose one of k1, abs, k2, k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), estimator="k4")


PLUS = pytest.mark.parametrize("name", ["k1", "abs", "k2", "k3"])


@PLUS
def test_a_plus_has_the_value_of_its_estimator_and_the_gradient_of_k2(name: str) -> None:
    logprobs, reference = like_mask(8).requires_grad_(), like_mask(9)
    plus = kl_penalty(logprobs, reference, MASK, estimator=f"{name}+")
    assert torch.equal(plus.detach(), kl_penalty(logprobs.detach(), reference, MASK, estimator=name))
    (slopes,) = torch.autograd.grad(plus.sum(), logprobs)
    torch.testing.assert_close(slopes, torch.where(MASK, logprobs.detach() - reference, 0.0))


@PLUS
def test_a_plus_has_the_gradient_of_the_kl_in_expectation(name: str) -> None:
    logits, reference = noise(8, seed=10).requires_grad_(), noise(8, seed=11).log_softmax(0)
    policy = logits.log_softmax(0)
    plus = policy.exp().detach() * kl_penalty(policy, reference, estimator=f"{name}+")
    (ours,) = torch.autograd.grad(plus.sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    torch.testing.assert_close(ours, exact)


def test_the_approximate_kl_by_hand() -> None:
    # Ratios of now to old 1/2 and 2: k1 is log 2 and -log 2, k3 is 1/2 - 1 + log 2 and 2 - 1 - log 2.
    now, old = torch.tensor([[0.25, 0.5, 1.0]]).log(), torch.tensor([[0.5, 0.25, 1.0]]).log()
    found = approximate_kl(now, old, torch.tensor([[True, True, False]]))
    assert found.k1.item() == pytest.approx(0, abs=1e-7)
    assert found.k3.item() == pytest.approx((0.5 - 1 + 1) / 2)


def test_the_approximate_kl_is_that_of_the_old_policy_to_the_new() -> None:
    # Its expectation under the old policy, over the vocabulary, is KL(old || now), not the other way round.
    old, now = noise(8, seed=12).log_softmax(0), noise(8, seed=13).log_softmax(0)
    exact = torch.nn.functional.kl_div(now, old, log_target=True, reduction="sum").item()
    each = [approximate_kl(now[i : i + 1], old[i : i + 1], torch.ones(1, dtype=torch.bool)) for i in range(8)]
    for name in ("k1", "k3"):
        mean = sum(old[i].exp().item() * getattr(each[i], name).item() for i in range(8))
        assert mean == pytest.approx(exact, rel=1e-5)


def test_the_shares_of_an_approximate_kl_add_up() -> None:
    now, old = like_mask(14).requires_grad_(), like_mask(15)
    whole = approximate_kl(poisoned(now.detach()), poisoned(old), MASK)
    parts = [
        approximate_kl(*piece, count=17)
        for piece in zip(now.split((2, 3)), old.split((2, 3)), MASK.split((2, 3)), strict=True)
    ]
    assert torch.stack([part.k1 for part in parts]).sum().item() == pytest.approx(whole.k1.item(), rel=1e-5)
    assert torch.stack([part.k3 for part in parts]).sum().item() == pytest.approx(whole.k3.item(), rel=1e-5)
    assert not parts[0].k3.requires_grad and whole.k3 > 0
