"""Every policy loss against its formula, written out token by token with its gradient, and what all have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.aggregation import AGGREGATION_MODES, aggregate
from rlhf_toolkit.algorithms.policy_losses import AGGREGATION_OF, POLICY_LOSSES, SELECTORS, PolicyLossTerms
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.plugins import takes
from tests.support.batches import MASK, blank_outside, like_mask, poisoned, real, widened
from tests.support.offenders import for_each

SELECTED = torch.zeros_like(MASK)
SELECTED[0, [1, 4]] = SELECTED[1, 4] = SELECTED[4, 1] = SELECTED[3, 6] = True  # the last is not a real token
LOW, HIGH = 0.1, 0.3
KNOBS: dict[str, Any] = {
    "clip_range_low": LOW,
    "clip_range_high": HIGH,
    "dual_clip": 1.5,
    "tau_positive": 0.8,
    "tau_negative": 1.3,
    "beta": 0.7,
    "kl_cov_coef": 0.4,
    "selected": SELECTED,
}
EVERY = pytest.mark.parametrize("name", POLICY_LOSSES)  # a test for each, to be chosen by its name


def price(name: str, *tensors: Tensor, mask: Tensor = MASK, **changes: Any) -> PolicyLossTerms:
    """The loss of that name with those of KNOBS that it takes."""
    loss = POLICY_LOSSES[name]
    knobs = {key: value for key, value in (KNOBS | changes).items() if takes(loss, key)}
    return loss(*tensors, mask, **knobs)


def gradient(terms: PolicyLossTerms, logprobs: Tensor) -> Tensor:
    """Of the summed loss to the log-probs."""
    return torch.autograd.grad(terms.per_token.sum(), logprobs)[0]


# One function per loss: what a token's loss and its derivative by that token's log-prob are, in Python's own floats.
# ``row`` holds (log-prob now, advantage, log-ratio) of every real token of the token's row.

Row = list[tuple[float, float, float]]


def ppo(ratio: float, advantage: float) -> tuple[float, float]:
    """The clipped surrogate and its derivative by the log of its ratio."""
    limited = min(max(ratio, 1 - LOW), 1 + HIGH)
    if ratio * advantage <= limited * advantage:
        return -ratio * advantage, -ratio * advantage
    return -limited * advantage, 0.0


def vanilla(row: Row, i: int, chosen: bool) -> tuple[float, float]:
    _, a, d = row[i]
    loss, slope = ppo(math.exp(d), a)
    return (-1.5 * a, 0.0) if a < 0 and loss > -1.5 * a else (loss, slope)


def gspo(row: Row, i: int, chosen: bool) -> tuple[float, float]:
    return ppo(math.exp(math.fsum(d for _, _, d in row) / len(row)), row[i][1])


def sapo(row: Row, i: int, chosen: bool) -> tuple[float, float]:
    _, a, d = row[i]
    ratio, tau = math.exp(d), 0.8 if a > 0 else 1.3
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    return -a * gate * 4 / tau, -a * 4 * gate * (1 - gate) * ratio


def cispo(row: Row, i: int, chosen: bool) -> tuple[float, float]:
    logprob, a, d = row[i]
    weight = min(max(math.exp(d), 1 - LOW), 1 + HIGH)
    return -weight * a * logprob, -weight * a


def gpg(row: Row, i: int, chosen: bool) -> tuple[float, float]:
    logprob, a, _ = row[i]
    return -a * logprob, -a


def dro(row: Row, i: int, chosen: bool) -> tuple[float, float]:
    logprob, a, d = row[i]
    return -a * logprob + 0.7 / 2 * d * d, -a + 0.7 * d


def geo_mean(row: Row, i: int, chosen: bool) -> tuple[float, float]:
    # Every token carries the sequence's loss, so the sum of the row's losses moves n times as fast as one of them.
    kept = [min(d, HIGH) if a > 0 else max(d, -LOW) for _, a, d in row]
    loss = -math.fsum(a for _, a, _ in row) / len(row) * math.exp(math.fsum(kept) / len(row))
    return loss, loss if kept[i] == row[i][2] else 0.0


def kl_cov(row: Row, i: int, chosen: bool) -> tuple[float, float]:
    _, a, d = row[i]
    price_of_kl = 0.4 if chosen else 0.0
    return -a * math.exp(d) + price_of_kl * abs(d), -a * math.exp(d) + math.copysign(price_of_kl, d)


def clip_cov(row: Row, i: int, chosen: bool) -> tuple[float, float]:
    return (0.0, 0.0) if chosen else ppo(math.exp(row[i][2]), row[i][1])


WRITTEN_OUT: dict[str, Callable[[Row, int, bool], tuple[float, float]]] = {
    each.__name__: each for each in (vanilla, gspo, sapo, cispo, gpg, dro, geo_mean, kl_cov, clip_cov)
}


@EVERY
def test_loss_and_gradient_are_the_formula_written_out(name: str) -> None:
    clipped = set()
    for seed in range(0, 9, 3):
        now, moved, advantages = like_mask(seed), like_mask(seed + 1, scale=0.4), like_mask(seed + 2)
        old = now - moved
        logprobs = poisoned(now).requires_grad_()
        terms = price(name, logprobs, poisoned(old), poisoned(advantages))
        slopes = gradient(terms, logprobs)
        for b, t in real():
            at = [each for each in real() if each[0] == b]
            row = [(now[x].item(), advantages[x].item(), now[x].item() - old[x].item()) for x in at]
            loss, slope = WRITTEN_OUT[name](row, at.index((b, t)), bool(SELECTED[b, t]))
            assert terms.per_token[b, t].item() == pytest.approx(loss, rel=2e-5, abs=2e-6)
            assert slopes[b, t].item() == pytest.approx(slope, rel=2e-5, abs=2e-6)
            assert terms.ratio[b, t].item() == pytest.approx(math.exp(row[at.index((b, t))][2]), rel=1e-5)
            assert not terms.clipped[b, t] or slope == 0 or name == "cispo"
            clipped.add(terms.clipped[b, t].item())
    assert clipped == ({True, False} if takes(POLICY_LOSSES[name], "clip_range_low") else {False})


def test_every_loss_is_written_out() -> None:
    assert WRITTEN_OUT.keys() == POLICY_LOSSES.keys()


@EVERY
def test_nothing_outside_the_mask_reaches_loss_or_gradient(name: str) -> None:
    inputs = [like_mask(seed) for seed in (10, 11, 12)]
    weights = like_mask(13).abs()
    results = []
    for change in (lambda x: x.clone(), poisoned):
        logprobs = change(inputs[0]).requires_grad_()
        terms = price(name, logprobs, *map(change, inputs[1:]), weights=change(weights))
        results.append((*terms, gradient(terms, logprobs)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    per_token, clipped, dual_clipped, ratio, slopes = results[1]
    assert all(map(blank_outside, (per_token, clipped, dual_clipped, ratio - 1, slopes)))


@EVERY
def test_an_empty_row_costs_nothing(name: str) -> None:
    mask = MASK.clone()
    mask[2:4] = False
    logprobs = poisoned(like_mask(14), mask).requires_grad_()
    terms = price(name, logprobs, poisoned(like_mask(15), mask), poisoned(like_mask(16), mask), mask=mask)
    assert blank_outside(terms.per_token, mask) and blank_outside(gradient(terms, logprobs), mask)


@EVERY
@for_each("mode", AGGREGATION_MODES)
@for_each("cuts", [(1, 4), (2, 2, 1), (1, 1, 1, 1, 1)])
def test_how_rows_are_cut_does_not_matter(name: str, mode: str, cuts: tuple[int, ...]) -> None:
    tensors = [like_mask(seed) for seed in (17, 18, 19)]
    tensors[1] = tensors[0] + 0.3 * tensors[1]
    results = []
    for sizes in ((5,), cuts):
        logprobs = tensors[0].clone().requires_grad_()
        pieces = [each.split(sizes) for each in (logprobs, *tensors[1:], MASK, SELECTED)]
        total = torch.zeros(())
        for *piece, mask, selected in zip(*pieces, strict=True):
            loss = price(name, *piece, mask=mask, selected=selected).per_token
            total = total + aggregate(loss, mask, mode=mode, tokens=17, sequences=5, width=7)
        results.append((total.detach(), torch.autograd.grad(total, logprobs)[0]))
    for whole, in_pieces in zip(*results, strict=True):
        torch.testing.assert_close(in_pieces, whole, rtol=1e-5, atol=1e-7)


@EVERY
def test_rows_in_another_order_cost_the_same(name: str) -> None:
    order, tensors = torch.tensor([3, 0, 4, 1, 2]), [like_mask(seed) for seed in (20, 21, 22)]
    straight = price(name, *tensors)
    moved = price(name, *(each[order] for each in tensors), mask=MASK[order], selected=SELECTED[order])
    for a, b in zip(straight, moved, strict=True):
        torch.testing.assert_close(b, a[order], rtol=1e-6, atol=1e-7)


@EVERY
def test_more_padding_costs_the_same(name: str) -> None:
    tensors = [like_mask(seed) for seed in (23, 24, 25)]
    narrow = price(name, *tensors)
    wide = price(name, *map(widened, tensors), mask=widened(MASK), selected=widened(SELECTED))
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(b[:, :7], a, rtol=1e-6, atol=1e-7)


@EVERY
def test_the_gradient_of_an_unmoved_policy_is_minus_the_advantage(name: str) -> None:
    # Every loss is REINFORCE at first order; geo_mean with the row's mean advantage. Chosen tokens are left out.
    logprobs, advantages = like_mask(26).requires_grad_(), like_mask(27)
    terms = price(name, logprobs, logprobs.detach(), advantages, selected=torch.zeros_like(MASK))
    expected = torch.where(MASK, -advantages, 0.0)
    if name == "geo_mean":
        expected = torch.where(MASK, (expected.sum(1) / MASK.sum(1)).unsqueeze(1), 0.0)
    torch.testing.assert_close(gradient(terms, logprobs), expected)
    assert not terms.clipped.any()


@EVERY
def test_weights_are_constants_that_multiply(name: str) -> None:
    logprobs, weights, advantages = like_mask(28).requires_grad_(), like_mask(29).abs(), like_mask(31)
    weights.requires_grad_(), advantages.requires_grad_()
    plain = price(name, logprobs, like_mask(30), advantages)
    weighted = price(name, logprobs, like_mask(30), advantages, weights=weights)
    factor = weights.detach()
    if name == "geo_mean":  # its sequence has one loss, and one weight: the geometric mean
        logs = torch.where(MASK, factor.log(), 0.0)
        factor = (logs.sum(1, keepdim=True) / MASK.sum(1, keepdim=True)).exp()
    torch.testing.assert_close(weighted.per_token, plain.per_token * factor)
    torch.testing.assert_close(gradient(weighted, logprobs), gradient(plain, logprobs) * factor)
    for a, b in zip(weighted[1:], plain[1:], strict=True):
        assert torch.equal(a, b)
    again = price(name, logprobs, like_mask(30), advantages, weights=weights)
    again.per_token.sum().backward()
    assert weights.grad is None and advantages.grad is None and not again.ratio.requires_grad


@EVERY
def test_every_loss_is_called_alike(name: str) -> None:
    parameters = signature(POLICY_LOSSES[name]).parameters
    assert [*parameters][:4] == ["logprobs", "old_logprobs", "advantages", "mask"]
    assert parameters["weights"].default is None
    assert all(each.kind is each.KEYWORD_ONLY for each in [*parameters.values()][4:])


def test_the_tables_speak_of_losses_and_of_modes() -> None:
    assert AGGREGATION_OF.keys() <= POLICY_LOSSES.keys() and set(AGGREGATION_OF.values()) <= set(AGGREGATION_MODES)
    assert {name for name in POLICY_LOSSES if takes(POLICY_LOSSES[name], "selected")} == SELECTORS.keys()


def test_geo_mean_under_its_aggregation_is_the_mean_over_sequences() -> None:
    now, old, advantages = like_mask(32), like_mask(33), like_mask(34)
    terms = price("geo_mean", now, old, advantages)
    of_rows = [terms.per_token[b, t].item() for b, t in ((0, 0), (1, 0), (2, 0), (3, 0), (4, 1))]
    for b, t in real():
        assert terms.per_token[b, t].item() == pytest.approx(of_rows[b])
    mean = aggregate(terms.per_token, MASK, mode=AGGREGATION_OF["geo_mean"], tokens=17, sequences=5, width=7)
    assert mean.item() == pytest.approx(sum(of_rows) / 5)


def test_a_geo_mean_of_no_advantage_leaves_that_token_out() -> None:
    # d = (log 2, log 8), A = (2, 0): the second token has no say in the ratio, but counts in both means.
    now, mask = torch.tensor([[2.0, 8.0]]).log(), torch.ones(1, 2, dtype=torch.bool)
    terms = price("geo_mean", now, torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), mask=mask, clip_range_high=9.0)
    torch.testing.assert_close(terms.per_token, torch.full((1, 2), -1.0 * math.sqrt(2)))


def test_clip_cov_counts_the_chosen_as_clipped_and_ppos_own_too() -> None:
    # Ratios 1, 1, 2 with A = 1: the first is chosen, the last is beyond the range.
    now, mask = torch.tensor([[1.0, 1.0, 2.0]]).log(), torch.ones(1, 3, dtype=torch.bool)
    selected = torch.tensor([[True, False, False]])
    terms = price("clip_cov", now, torch.zeros(1, 3), torch.ones(1, 3), mask=mask, selected=selected)
    assert terms.clipped.tolist() == [[True, False, True]]
    torch.testing.assert_close(terms.per_token, torch.tensor([[0.0, -1.0, -1.3]]))


def test_gspo_bounds_the_ratio_of_a_sequence() -> None:
    logprobs, mask = torch.tensor([[30.0]], requires_grad=True), torch.ones(1, 1, dtype=torch.bool)
    terms = price("gspo", logprobs, torch.zeros(1, 1), torch.tensor([[-1.0]]), mask=mask)
    assert terms.per_token.item() == pytest.approx(math.exp(10), rel=1e-6)
    assert gradient(terms, logprobs).item() == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sapo", {"tau_positive": 0.0}, r"tau_positive=0\.0.*above 0"),
        ("sapo", {"tau_negative": -1.0}, r"tau_negative=-1\.0.*above 0"),
        ("dro", {"beta": 0.0}, r"beta=0\.0 must be above 0"),
        ("vanilla", {"dual_clip": 1.0}, r"dual_clip=1\.0 must be above 1"),
    ],
)
def test_a_constant_that_cannot_work_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        price(name, *(like_mask(35),) * 3, **changes)
