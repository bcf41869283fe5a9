"""What an evaluation says about sampled responses: pass@k, maj@k, win rates, and how sure it is of its means.

Every quantity is a value for each prompt, averaged over prompts: responses to one prompt are not independent, so
intervals resample prompts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

DRAWS = 2000
"""Resamples of an interval."""
SUBSETS = 1000
"""Subsets of the samples that maj@k looks at; where there are no more, all of them."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95% interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean of ``values``, one for each prompt, and the percentile bootstrap's 95% interval (Efron 1979): prompts are
    drawn with replacement ``DRAWS`` times. NaN where there are none."""
    if not values:
        return Estimate(float("nan"), float("nan"), float("nan"))
    column = torch.tensor(values, dtype=torch.float64)
    generator, count = torch.Generator().manual_seed(seed), len(values)
    means = torch.stack([column[torch.randint(count, (count,), generator=generator)].mean() for _ in range(DRAWS)])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(column.mean().item(), low, high)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k responses passes, from ``passed`` of ``samples``, without bias:

    1 - C(samples - passed, k) / C(samples, k)        Chen et al. 2021, equation 1

    Raises ValueError for a k that is not in 1 to ``samples``.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs {k} samples or more of a prompt, at least one; there are {samples}")
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def majority_at_k(answers: Sequence[Hashable | None], passed: Sequence[bool], k: int, *, seed: int = 0) -> float:
    """Share of the subsets of k responses whose most frequent answer is one that passes (self-consistency, Wang et al.
    2023).

    ``answers[i]`` is the answer in response i, None where it has none: such a response has no vote, and a subset
    without votes does not pass. Answers with equally many votes share the subset. All subsets are counted where they
    are at most ``SUBSETS``, else as many random ones. Raises ValueError for a k that is not in 1 to their number.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} needs {k} samples or more of a prompt, at least one; there are {len(answers)}")
    if comb(len(answers), k) <= SUBSETS:
        subsets = list(itertools.combinations(range(len(answers)), k))
    else:
        generator = torch.Generator().manual_seed(seed)
        subsets = [tuple(torch.randperm(len(answers), generator=generator)[:k].tolist()) for _ in range(SUBSETS)]
    passing = 0.0
    for subset in subsets:
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        most = max(votes.values(), default=0)
        first = [answer for answer, count in votes.items() if count == most]
        # Responses with one answer may differ in their score, as where the reward looks at more than the answer.
        shares = [[passed[i] for i in subset if answers[i] == answer] for answer in first]
        passing += sum(sum(share) / len(share) for share in shares) / max(len(first), 1)
    return passing / len(subsets)


def win_rate(mine: Tensor, theirs: Tensor) -> float:
    """Share of pairs (i, j) of responses to one prompt in which ``mine[i]`` scores above ``theirs[j]``; equal ones
    count a half. Scores (n,) and (m,)."""
    ahead = mine[:, None] - theirs[None, :]
    return ((ahead > 0).double() + 0.5 * (ahead == 0)).mean().item()
