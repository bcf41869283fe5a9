"""One uniform number to one token: frequencies, edges, what top-k and top-p leave, and which log-prob is returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.rollout.sampling import choose_tokens
from tests.support.offenders import for_each

LAST = 1 - 2**-53  # the largest number torch.rand gives in float64
GRID = 20_000


def logits_of(size: int, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def grid(points: int = GRID) -> Tensor:
    """The middles of ``points`` equal parts of [0, 1): no sample can be fairer."""
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points


def counts(logits: Tensor, points: int = GRID, **options: Any) -> Tensor:
    """How often each token is drawn over the grid."""
    tokens, *_ = choose_tokens(logits.expand(points, -1), grid(points), **{"temperature": 1.0, **options})
    return torch.bincount(tokens, minlength=len(logits))


def support(logits: Tensor, **options: Any) -> set[int]:
    """The tokens that can be drawn. None of those in these tests is likelier than the grid is fine."""
    return set(counts(logits, **options).nonzero().squeeze(1).tolist())


# ---- frequencies -----------------------------------------------------------------------------------------------------


@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16])
@for_each("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_probabilities(dtype: torch.dtype, temperature: float) -> None:
    """Over an even grid a token's count is its share to within the two ends of its interval."""
    logits = logits_of(30).to(dtype)
    shares = (logits.double() / temperature).softmax(-1) * GRID
    assert (counts(logits, temperature=temperature) - shares).abs().max() <= 1.01


def test_random_numbers_pass_a_chi_square_test() -> None:
    logits, draws = logits_of(10, scale=1.0), 50_000
    uniforms = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    tokens, *_ = choose_tokens(logits.expand(draws, -1), uniforms, temperature=1.0)
    expected = logits.double().softmax(-1) * draws
    statistic = ((torch.bincount(tokens, minlength=10) - expected).square() / expected).sum().item()
    assert 1.0 < statistic < 27.9  # of 9 degrees of freedom, 99.9% lie below


@pytest.mark.parametrize("options", [{"top_k": 4}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.7}])
def test_what_is_left_keeps_its_proportions(options: dict[str, Any]) -> None:
    logits = logits_of(30)
    left = sorted(support(logits, **options))
    shares = logits.double().softmax(-1)[left]
    assert (counts(logits, **options)[left] - shares / shares.sum() * GRID).abs().max() <= 1.01


def test_every_token_of_a_large_vocabulary_can_be_drawn() -> None:
    """In float32 a sum of 150,000 small numbers cannot tell its last terms apart."""
    size = 150_000
    logits = torch.zeros(size)
    wanted = torch.tensor([0, 1, 77_777, size - 2, size - 1])
    uniforms = (wanted.double() + 0.5) / size
    tokens, *_ = choose_tokens(logits.expand(len(wanted), -1), uniforms, temperature=1.0)
    assert tokens.tolist() == wanted.tolist()


def test_a_row_is_a_function_of_its_own_logits_and_number() -> None:
    logits = torch.stack([logits_of(40, seed=s) for s in range(6)])
    uniforms = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    tokens, logprobs, _ = choose_tokens(logits, uniforms, **options)
    for row in range(6):
        alone = choose_tokens(logits[row : row + 1], uniforms[row : row + 1], **options)
        assert (tokens[row], logprobs[row]) == (alone[0][0], alone[1][0])
    order = [3, 0, 5, 1, 4, 2]
    assert torch.equal(choose_tokens(logits[order], uniforms[order], **options)[0], tokens[order])


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "first", "last"), [({}, 0, 4), ({"top_k": 3}, 1, 3), ({"top_p": 0.85}, 1, 3), ({"top_k": 1}, 2, 2)]
)
def test_the_smallest_and_the_largest_number(options: dict[str, Any], first: int, last: int) -> None:
    """They must not fall on a token that is left out, nor beyond the end."""
    logits = torch.tensor([0.05, 0.2, 0.5, 0.2, 0.05]).log()
    uniforms = torch.tensor([0.0, LAST], dtype=torch.float64)
    tokens, *_ = choose_tokens(logits.expand(2, -1), uniforms, temperature=1.0, **options)
    assert tokens.tolist() == [first, last]


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    uniforms = torch.tensor([0.0, 0.4999, 0.5, LAST], dtype=torch.float64)
    tokens, logprobs, _ = choose_tokens(logits.expand(4, -1), uniforms, temperature=1.0)
    assert tokens.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(logprobs, torch.full((4,), 0.5).log())


@for_each("seed", range(5))
def test_the_largest_number_stays_inside_whatever_the_sum_rounds_to(seed: int) -> None:
    logits = torch.stack([logits_of(1000, seed=100 * seed + s) for s in range(100)])
    tokens, *_ = choose_tokens(logits, torch.full((100,), LAST, dtype=torch.float64), temperature=1.0)
    assert tokens.tolist() == [999] * 100


# ---- greedy, temperature, log-probs ----------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_and_its_log_prob() -> None:
    logits = torch.stack([logits_of(40, seed=s) for s in range(3)])
    tokens, logprobs, _ = choose_tokens(logits, None, temperature=0.7, top_k=2, top_p=0.5)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, (logits / 0.7).log_softmax(-1).max(-1).values)


@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16])
@for_each("options", [{}, {"top_k": 3}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.5}])
def test_the_log_prob_is_of_the_whole_tempered_distribution(dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits = logits_of(30).to(dtype)
    tokens, logprobs, _ = choose_tokens(logits.expand(50, -1), grid(50), temperature=0.6, **options)
    expected = (logits.double() / 0.6).log_softmax(-1)[tokens]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_low_temperature_leaves_the_likeliest_alone() -> None:
    logits = logits_of(30)
    assert support(logits, temperature=0.01) == {int(logits.argmax())}


# ---- top-k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 29])
def test_top_k_keeps_exactly_the_k_likeliest(k: int) -> None:
    logits = logits_of(30, scale=0.5)
    assert support(logits, top_k=k) == set(logits.topk(k).indices.tolist())


@pytest.mark.parametrize("k", [0, 30, 31])
def test_top_k_of_none_or_all_restricts_nothing(k: int) -> None:
    assert support(logits_of(30, scale=0.5), top_k=k) == set(range(30))


def test_top_k_keeps_what_is_as_likely_as_the_kth() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    assert support(logits, top_k=1) == {1}
    assert support(logits, top_k=2) == support(logits, top_k=4) == {1, 2, 3, 5}


# ---- top-p -----------------------------------------------------------------------------------------------------------


@for_each("p", [0.05, 0.3, 0.5, 0.75, 0.9, 0.97])
@for_each("seed", range(4))
def test_top_p_keeps_the_smallest_set_of_the_likeliest(p: float, seed: int) -> None:
    logits = logits_of(30, seed=seed, scale=1.0)
    probabilities = logits.double().softmax(-1)
    expected: set[int] = set()
    mass = 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass >= p:
            break
        expected.add(token)
        mass += probabilities[token].item()
    assert support(logits, top_p=p) == expected


def test_top_p_stops_where_the_mass_is_reached_exactly() -> None:
    logits = torch.tensor([0.25, 0.5, 0.25]).log()
    assert support(logits, top_p=0.5) == {1}
    assert len(support(logits, top_p=0.51)) == 2 and len(support(logits, top_p=0.75)) == 2
    assert support(logits, top_p=0.76) == {0, 1, 2}


def test_top_p_keeps_at_least_one_and_one_keeps_all() -> None:
    logits = logits_of(30, scale=0.5)
    assert support(logits, top_p=1e-9) == {int(logits.argmax())}
    assert support(logits, top_p=1.0) == set(range(30))


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    """0.4 is 2/3 of the 0.6 that the first two hold, but less than half of the whole."""
    logits = torch.tensor([0.4, 0.2, 0.15, 0.15, 0.1]).log()
    assert support(logits, top_p=0.5) == {0, 1}
    assert support(logits, top_k=2, top_p=0.5) == {0}
    assert support(logits, top_k=2, top_p=0.7) == {0, 1}
