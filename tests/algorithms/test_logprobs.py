from __future__ import annotations

import math

import torch

from rlhf_toolkit.algorithms.logprobs import bounded_exp, log_ratio, logprobs_and_entropy
from tests.support.batches import MASK, like_mask, noise, poisoned


def test_logprobs_and_entropy_by_hand() -> None:
    # Probabilities 1/8, 3/8, 4/8, whatever constant is added to the logits.
    logits = torch.tensor([[1.0, 3.0, 4.0]]).log() + 11
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1]))
    expected = -sum(p * math.log(p) for p in (1 / 8, 3 / 8, 4 / 8))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(3 / 8)]))
    torch.testing.assert_close(entropy, torch.tensor([expected]))


def test_logprobs_agree_with_a_plain_loop() -> None:
    logits, targets = noise(2, 3, 5, seed=0, scale=3.0), torch.tensor([[0, 4, 2], [1, 1, 3]])
    logprobs, entropy = logprobs_and_entropy(logits, targets)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(z) for z in logits[b, t].tolist()]
            probabilities = [w / sum(weights) for w in weights]
            assert math.isclose(logprobs[b, t], math.log(probabilities[targets[b, t]]), abs_tol=1e-5)
            assert math.isclose(entropy[b, t], -sum(p * math.log(p) for p in probabilities), abs_tol=1e-5)


def test_uniform_logits_have_the_entropy_of_the_vocabulary() -> None:
    _, entropy = logprobs_and_entropy(torch.full((1, 9), -3.0), torch.tensor([0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(9)]))


def test_bf16_logits_are_reduced_in_fp32() -> None:
    logits = noise(4, 300, seed=1, scale=4.0).bfloat16()
    logprobs, entropy = logprobs_and_entropy(logits, torch.arange(4))
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, logits.double().log_softmax(-1)[torch.arange(4), torch.arange(4)].float())


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
