"""The metrics of a rollout against plain loops over its rows and tokens, with poison wherever nothing may be read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.reporting.metrics import (
    explained_variance,
    policy_metrics,
    reference_kl,
    repetition,
    reward_metrics,
    rollout_metrics,
    spread,
    uniform_groups,
)
from rlhf_toolkit.types import Experience
from tests.support.batches import noise

LENGTHS = [3, 1, 4, 2]
KEPT = [True, True, False, True]
"""Row 2 has no score."""
POISON = 1e30


def masks() -> tuple[Tensor, Tensor]:
    """(4, 5) where the policy wrote, and what of it is trained on. Row 0 has a hole: an environment's answer."""
    written = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    written[0, 1] = False
    return written, written & torch.tensor(KEPT)[:, None]


def column(seed: int, mask: Tensor) -> Tensor:
    """Random numbers, with poison outside the mask."""
    return torch.where(mask, noise(*mask.shape, seed=seed), POISON)


def experience(**changes: Any) -> Experience:
    written, trained = masks()
    columns = {"advantages": 1, "returns": 2, "values": 3}
    made = Experience(
        sequences=torch.zeros(4, 9, dtype=torch.long),
        prompt_lengths=torch.tensor([4, 2, 3, 3]),
        response_lengths=torch.tensor(LENGTHS),
        token_mask=written,
        response_mask=trained,
        rollout_logprobs=torch.zeros(4, 5),
        **{name: column(seed, trained) for name, seed in columns.items()},
    )
    return replace(made, **changes)


def told(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"mean": sum(values) / len(values), "max": max(values), "min": min(values)}


def tokens(columns: Tensor | None, mask: Tensor) -> list[float]:
    assert columns is not None
    rows = zip(columns.tolist(), mask.tolist(), strict=True)
    return [value for row, there in rows for value, real in zip(row, there, strict=True) if real]


def approximately(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-6)


# ---- of the whole rollout --------------------------------------------------------------------------------------------


def metrics_of(made: Experience, finished: list[bool]) -> dict[str, float]:
    scores, raw = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([4.0, 1.0, 1.0])
    rewards = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.25, 0.25]])
    return rollout_metrics(made, scores=scores, raw_scores=raw, rewards=rewards, finished=torch.tensor(finished))


def test_a_rollout_by_plain_loops() -> None:
    made = experience()
    found = metrics_of(made, [True, False, False, True])
    trained = made.response_mask
    values, returns = tokens(made.values, trained), tokens(made.returns, trained)
    errors = [r - v for r, v in zip(returns, values, strict=True)]
    expected = {
        "critic/score": told([1.0, -2.0, 0.5]),
        "critic/raw_score": told([4.0, 1.0, 1.0]),
        "critic/rewards": told([3.0, -1.0, 0.5]),
        "critic/advantages": told(tokens(made.advantages, trained)),
        "critic/returns": told(returns),
        "critic/values": told(values),
        "response_length": told(LENGTHS),
        "prompt_length": told([4, 2, 3, 3]),
    }
    flat = {f"{name}/{kind}": value for name, three in expected.items() for kind, value in three.items()}
    flat["response_length/clip_ratio"] = 2 / 4
    flat["response_length/repetition"] = 0.0
    flat["critic/vf_explained_var"] = 1 - statistics.variance(errors) / (statistics.variance(returns) + 1e-5)
    assert found == approximately(flat)


def test_repetition_is_of_what_the_policy_wrote_after_each_prompt() -> None:
    """Row 0 says one token eight times, after a prompt that would double any row's runs; row 1 says nothing twice; in
    row 2 an environment wrote the middle of eight such tokens, so that no run is left."""
    prompt, mask = [3, 3, 3, 3, 3], torch.ones(3, 8, dtype=torch.bool)
    mask[2, 3:5] = False
    sequences = torch.tensor([[*prompt, *[5] * 8], [*prompt, *range(8)], [*prompt, *[5] * 8]])
    made = experience(
        sequences=torch.cat([sequences, torch.full((1, 13), 5)]),
        prompt_lengths=torch.full((4,), 5),
        response_lengths=torch.tensor([8, 8, 8, 3]),
        token_mask=torch.cat([mask, (torch.arange(8) < 3)[None]]),
        response_mask=torch.ones(4, 8, dtype=torch.bool),
        rollout_logprobs=torch.zeros(4, 8),
        **{name: torch.zeros(4, 8) for name in ("advantages", "returns", "values")},
    )
    assert repetition(made) == pytest.approx((1 - 1 / 5) / 4)


def test_without_a_value_role_nothing_is_said_about_values() -> None:
    found = metrics_of(experience(values=None), [True] * 4)
    assert not [name for name in found if "value" in name or "vf_" in name] and found["response_length/clip_ratio"] == 0


def test_spread_of_nothing_is_nothing() -> None:
    assert spread("a", torch.zeros(0)) == {}
    assert spread("a", torch.tensor([3, 4])) == {"a/mean": 3.5, "a/max": 4.0, "a/min": 3.0}


def test_explained_variance_of_a_perfect_a_useless_and_a_wrong_value() -> None:
    returns = noise(50, seed=1)
    assert explained_variance(returns + 3.0, returns) == pytest.approx(1.0), "an offset explains as well"
    assert explained_variance(torch.zeros(50), returns) == pytest.approx(0.0, abs=1e-4)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0, abs=1e-3)
    assert explained_variance(returns[:1], returns[:1]) == 0.0, "one token has no variance"


# ---- of its rewards --------------------------------------------------------------------------------------------------


def rewards_told(**changes: Any) -> dict[str, float]:
    given: dict[str, Any] = {
        "parts": {"exact": torch.tensor([1.0, 3.0, math.nan, 5.0]), "style": torch.tensor([0.0, 1.0, 1.0, 0.0])},
        "kept": torch.tensor(KEPT),
        "failures": {"exact": 1, "style": 0},
        "scores": torch.tensor([2.0, 2.0, 9.0, 1.0]),
        "groups": torch.tensor([7, 7, 8, 8]),
    }
    return reward_metrics(**{**given, **changes})


def test_rewards_by_hand() -> None:
    assert rewards_told() == {
        "reward/exact": 3.0,
        "reward/exact_failures": 1.0,
        "reward/style": 0.5,
        "reward/dropped": 1.0,
        "reward/uniform_groups": 1.0,  # the second by the one score that is left of it
    }


def test_what_is_not_worth_saying_is_not_said() -> None:
    everything = torch.ones(4, dtype=torch.bool)
    alone = {"exact": torch.zeros(4)}
    assert rewards_told(parts=alone, kept=everything, failures={}, groups=torch.arange(4)) == {}
    assert rewards_told(parts={**alone, "gone": torch.full((4,), math.nan)}, kept=everything, failures={}) == {
        "reward/exact": 0.0,
        "reward/uniform_groups": 0.5,
    }


def test_uniform_groups_by_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        scores, groups, kept = (torch.randint(high, (7,), generator=generator) for high in (2, 3, 2))
        rows = list(zip(scores.tolist(), groups.tolist(), kept.tolist(), strict=True))
        expected = []
        for group in sorted({g for _, g, _ in rows}):
            size, own = sum(g == group for _, g, _ in rows), {s for s, g, k in rows if g == group and k}
            if size > 1 and len(own) <= 1:
                expected.append(group)
        assert uniform_groups(scores, groups, kept.bool()) == expected


# ---- of the policy ---------------------------------------------------------------------------------------------------

NAMES = ("old_logprobs", "entropies", "rollout_logprobs", "ref_logprobs")


def policy_told(correction: Correction = Correction(), **changes: Any) -> tuple[dict[str, float], dict[str, Any]]:  # noqa: B008
    written, trained = masks()
    columns = {name: torch.where(written, noise(4, 5, seed=10 + i), 5.0) for i, name in enumerate(NAMES)}
    given = {**columns, "token_mask": written, "trained": trained, **changes}
    return policy_metrics(**given, kl_estimator="k1", correction=correction), given


def test_the_policys_numbers_by_plain_loops() -> None:
    found, given = policy_told()
    written = given["token_mask"]
    gaps = [abs(gap) for gap in tokens(given["rollout_logprobs"] - given["old_logprobs"], written)]
    difference = given["old_logprobs"] - given["ref_logprobs"]
    rows = [tokens(difference[row : row + 1], written[row : row + 1]) for row in range(4)]
    assert found == approximately(
        {
            "actor/entropy": statistics.mean(tokens(given["entropies"], written)),
            "rollout/logprob_gap_mean": statistics.mean(gaps),
            "rollout/logprob_gap_max": max(gaps),
            "actor/reward_kl_penalty": statistics.mean(statistics.mean(row) for row in rows),
            "actor/ref_kl": statistics.mean(map(sum, rows)),
            "actor/ref_kl_k3": statistics.mean(math.exp(-d) - 1 + d for row in rows for d in row),
        }
    )


def test_nothing_outside_the_mask_matters() -> None:
    found, given = policy_told()
    noisy: dict[str, Any] = {
        name: torch.where(given["token_mask"], given[name], noise(4, 5, seed=99)) for name in NAMES
    }
    assert policy_told(**noisy)[0] == approximately(found)


def test_without_a_reference_nothing_is_said_about_it() -> None:
    found, _ = policy_told(ref_logprobs=None)
    assert not [name for name in found if "kl" in name] and "actor/entropy" in found


def test_importance_is_over_what_is_trained_on() -> None:
    found, given = policy_told(Correction("token", 1.5))
    ratios = [math.exp(d) for d in tokens(given["old_logprobs"] - given["rollout_logprobs"], given["trained"])]
    weights = [min(ratio, 1.5) for ratio in ratios]
    assert 0 < sum(ratio > 1.5 for ratio in ratios) < len(ratios)
    assert found["rollout/importance_mean"] == pytest.approx(statistics.mean(weights), rel=1e-5)
    assert found["rollout/importance_capped"] == pytest.approx(sum(r >= 1.5 for r in ratios) / len(ratios))
    ess = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
    assert found["rollout/importance_ess"] == pytest.approx(ess, rel=1e-5)
    assert not [name for name in policy_told()[0] if "importance" in name]


def test_what_tokens_were_drawn_from_is_what_weighs() -> None:
    drawn = noise(4, 5, seed=50)
    found, given = policy_told(Correction("token", 1.5), drawn_logprobs=drawn)
    weights = [min(math.exp(d), 1.5) for d in tokens(given["old_logprobs"] - drawn, given["trained"])]
    assert found["rollout/importance_mean"] == pytest.approx(statistics.mean(weights), rel=1e-5)
    apart = statistics.mean(tokens(drawn - given["rollout_logprobs"], given["token_mask"]))
    assert found["rollout/drawn_kl"] == pytest.approx(apart, rel=1e-5)
    gap = policy_told()[0]["rollout/logprob_gap_mean"]
    assert found["rollout/logprob_gap_mean"] == gap and "rollout/drawn_kl" not in policy_told()[0]


def test_the_kl_to_a_policy_like_the_reference_is_0_and_k3_never_negative() -> None:
    written, _ = masks()
    logprobs = noise(4, 5, seed=3)
    assert reference_kl(logprobs, logprobs, written) == {"actor/ref_kl": 0.0, "actor/ref_kl_k3": 0.0}
    for seed in range(20):
        assert reference_kl(logprobs, noise(4, 5, seed=seed), written)["actor/ref_kl_k3"] >= 0.0
