"""pass@k, maj@k, win rates and intervals against enumeration and the normal law."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from rlhf_toolkit.algorithms import evaluation
from rlhf_toolkit.algorithms.evaluation import estimate, majority_at_k, pass_at_k, win_rate
from tests.support.offenders import for_each


@for_each("samples, passed", [(1, 0), (1, 1), (5, 0), (5, 2), (7, 6), (7, 7)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_one_that_passes(samples: int, passed: int) -> None:
    marks = [i < passed for i in range(samples)]
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(marks, k))
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("k", [0, 4])
def test_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs {k} samples or more of a prompt"):
        pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match=f"maj@{k} needs {k} samples or more of a prompt"):
        majority_at_k([1, 2, 3], [True, False, False], k)


def by_draws(answers: list[str | None], right: str, k: int) -> float:
    """Every subset; where several answers lead, one of them is drawn: count all the draws there could be."""
    total = 0.0
    subsets = list(itertools.combinations(answers, k))
    for subset in subsets:
        counts = Counter(a for a in subset if a is not None)
        leaders = [a for a, n in counts.items() if n == max(counts.values())]
        total += leaders.count(right) / len(leaders) if leaders else 0.0
    return total / len(subsets)


@for_each(
    "answers",
    [["a"], [None], ["a", "b", "b"], ["a", None, "b", "a", "c"], ["b", "b", "a", "a", None, None, "c"]],
)
def test_majority_at_k_counts_the_votes_of_every_subset(answers: list[str | None]) -> None:
    passed = [answer == "a" for answer in answers]
    for k in range(1, len(answers) + 1):
        assert majority_at_k(answers, passed, k) == pytest.approx(by_draws(answers, "a", k), abs=1e-12)


def test_one_sample_votes_for_itself() -> None:
    answers, passed = ["a", "b", "a", "c"], [True, False, True, False]
    assert majority_at_k(answers, passed, 1) == pass_at_k(4, 2, 1) == 0.5


def test_an_answer_whose_responses_differ_passes_by_their_share() -> None:
    assert majority_at_k(["a", "a", "b"], [True, False, True], 3) == 0.5


def test_many_subsets_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What random subsets say is near what all of them say, and the same each time."""
    answers = [["a", "b", "c"][i % 3] if i % 5 else None for i in range(12)]
    passed = [answer == "a" for answer in answers]
    exact = majority_at_k(answers, passed, 6)
    monkeypatch.setattr(evaluation, "SUBSETS", 900)
    sampled = majority_at_k(answers, passed, 6)
    assert sampled != exact and sampled == pytest.approx(exact, abs=3 * math.sqrt(0.25 / 900))
    assert sampled == majority_at_k(answers, passed, 6) != majority_at_k(answers, passed, 6, seed=1)


def test_win_rate_compares_every_pair() -> None:
    mine, theirs = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.0])
    wins = [1.0 if m > t else 0.5 if m == t else 0.0 for m in (1, 2, 3) for t in (2, 0)]
    assert win_rate(mine, theirs) == pytest.approx(sum(wins) / 6)
    assert win_rate(mine, theirs) + win_rate(theirs, mine) == pytest.approx(1.0)


def test_the_interval_is_the_normal_laws_where_that_holds() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = estimate(values.tolist())
    half = 1.96 * values.std().item() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean().item())
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found == estimate(values.tolist()) != estimate(values.tolist(), seed=1)


def test_one_prompt_and_none() -> None:
    assert estimate([0.25]) == evaluation.Estimate(0.25, 0.25, 0.25)
    assert math.isnan(estimate([]).mean)
