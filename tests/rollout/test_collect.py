"""Shaping a rollout: scores to rewards to advantages, against plain loops over rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_toolkit.algorithms.advantages import gae
from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl_control import FixedKL
from rlhf_toolkit.data.layout import padded_layout
from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.errors import DataError
from rlhf_toolkit.rollout.collect import Collector
from rlhf_toolkit.rollout.cutting import Cutting, Plan
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.passes import Needs, Passes, score
from rlhf_toolkit.rollout.sampled import Sampled
from rlhf_toolkit.rollout.shaping import Estimator, ScoreShaping, Shaping
from rlhf_toolkit.types import Experience, Prompt
from tests.support.roles import tiny_shared
from tests.support.values import there

LENGTHS, FINISHED = [3, 1, 4, 4], [True, True, False, False]
KL_COEF, PENALTY, GAMMA, LAMBDA = 0.3, 0.5, 0.9, 0.8


def shaped(finished: list[bool] = FINISHED, **changes: Any) -> tuple[Experience, Sampled, Passes, Collector]:
    """A rollout of four rows with random passes, shaped under ``changes``."""
    whiten = changes.pop("whiten_advantages", False)
    settings = {
        "estimator": Estimator(changes.pop("estimator", gae), whiten=whiten),
        "gamma": GAMMA,
        "gae_lambda": LAMBDA,
        "kl_in_reward": True,
        "kl_estimator": "k1",
        "truncated": "terminal",
        "scores": ScoreShaping(missing_eos_penalty=PENALTY),
    }
    of_sampled = {
        name: changes.pop(name) for name in ("kept", "token_rewards", "groups", "baselines") if name in changes
    }
    collector = Collector(
        None,  # type: ignore[arg-type]
        [Prompt(0, "p", (1,), {})],
        PromptSchedule(1, 1, 0),
        None,  # type: ignore[arg-type]
        Sampling(max_new_tokens=4, stop_ids=(1,), pad_id=0),
        Shaping(**{**settings, **changes}),  # type: ignore[arg-type]
        Cutting(1, 100),
        FixedKL(KL_COEF),
        responses_per_prompt=1,
        seed=0,
    )
    g = torch.Generator().manual_seed(3)
    old, ref, entropies, values = (torch.randn(4, 4, generator=g) for _ in range(4))
    sampled = Sampled(
        sequences=torch.zeros(4, 6, dtype=torch.long),
        prompt_lengths=torch.full((4,), 2),
        response_lengths=torch.tensor(LENGTHS),
        rollout_logprobs=old.clone(),
        finished=torch.tensor(finished),
        raw_scores=torch.randn(4, generator=g),
        written=torch.ones(4, 4, dtype=torch.bool),
        **{
            "kept": torch.ones(4, dtype=torch.bool),
            "groups": torch.tensor([0, 0, 1, 1]),
            "token_rewards": torch.zeros(4, 4),
            **of_sampled,
        },
        prompts=["p"] * 4,
        responses=["r"] * 4,
    )
    passes = Passes(old, entropies, ref, values, torch.randn(4, generator=g))
    return collector._experience(sampled, passes), sampled, passes, collector


def loop_gae(sampled: Sampled, passes: Passes, *, kl: bool, bootstrap: bool) -> list[list[float]]:
    """Advantages of each row's real tokens, by the definition."""
    rows = []
    for b, length in enumerate(LENGTHS):
        score = sampled.raw_scores[b].item() - (0 if sampled.finished[b] else PENALTY)
        difference = (there(passes.old_logprobs)[b] - there(passes.ref_logprobs)[b]).tolist()
        rewards = [-(KL_COEF * difference[t] if kl else 0.0) for t in range(length)]
        rewards[-1] += score
        last = there(passes.final_values)[b].item() if bootstrap and not sampled.finished[b] else 0.0
        values = [*there(passes.values)[b, :length].tolist(), last]
        deltas = [rewards[t] + GAMMA * values[t + 1] - values[t] for t in range(length)]
        rows.append([sum((GAMMA * LAMBDA) ** (i - t) * deltas[i] for i in range(t, length)) for t in range(length)])
    return rows


@pytest.mark.parametrize("truncated", ["terminal", "bootstrap", "mask"])
@pytest.mark.parametrize("kl_in_reward", [True, False])
def test_advantages_and_returns_agree_with_plain_loops(truncated: str, kl_in_reward: bool) -> None:
    experience, sampled, passes, _ = shaped(truncated=truncated, kl_in_reward=kl_in_reward)
    expected = loop_gae(sampled, passes, kl=kl_in_reward, bootstrap=truncated == "bootstrap")
    for b, row in enumerate(expected):
        torch.testing.assert_close(there(experience.advantages)[b, : len(row)], torch.tensor(row), rtol=1e-5, atol=1e-5)
        returns = torch.tensor(row) + there(passes.values)[b, : len(row)]
        torch.testing.assert_close(there(experience.returns)[b, : len(row)], returns, rtol=1e-5, atol=1e-5)


def test_mask_leaves_out_the_responses_that_were_cut_off() -> None:
    experience, *_ = shaped(truncated="mask")
    assert experience.response_mask.sum(1).tolist() == [3, 1, 0, 0]
    everything, *_ = shaped(truncated="terminal")
    assert everything.response_mask.sum(1).tolist() == LENGTHS


def test_whitening_is_over_the_trained_tokens_only() -> None:
    experience, *_ = shaped(truncated="mask", whiten_advantages=True)
    trained = there(experience.advantages)[experience.response_mask]
    assert trained.mean().abs().item() < 1e-6
    assert trained.std().item() == pytest.approx(1.0, abs=1e-4)


def test_mask_with_nothing_left_is_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"max_new_tokens.*truncated: bootstrap"):
        shaped(finished=[False] * 4, truncated="mask")


def test_the_record_says_what_happened() -> None:
    _, sampled, passes, collector = shaped()
    metrics = collector.metrics
    raw = sampled.raw_scores.tolist()
    assert metrics["critic/raw_score/mean"] == pytest.approx(sum(raw) / 4)
    assert metrics["critic/score/mean"] == pytest.approx((sum(raw) - 2 * PENALTY) / 4)
    differences = [
        (there(passes.old_logprobs) - there(passes.ref_logprobs))[b, :n].tolist() for b, n in enumerate(LENGTHS)
    ]
    assert metrics["actor/ref_kl"] == pytest.approx(sum(map(sum, differences)) / 4, rel=1e-5)
    per_token = [sum(row) / len(row) for row in differences]
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(sum(per_token) / 4, rel=1e-5)
    k3 = [math.exp(-d) - 1 + d for row in differences for d in row]
    assert metrics["actor/ref_kl_k3"] == pytest.approx(sum(k3) / len(k3), rel=1e-4)
    assert metrics["response_length/mean"] == 3.0 and metrics["response_length/clip_ratio"] == 0.5
    assert metrics["perf/total_num_tokens"] == sum(LENGTHS) + 8


# ---- which roles score ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("kl_in_reward", [True, False])
@pytest.mark.parametrize("kl_asked", [True, False])
def test_a_role_scores_where_something_needs_it(updates: int, kl_in_reward: bool, kl_asked: bool) -> None:
    needs = Needs(updates_per_rollout=updates, kl_in_reward=kl_in_reward, kl_asked=kl_asked)
    roles = needs.roles(one_forward=False)
    assert "value" in roles, "advantages need it"
    assert ("reference" in roles) == kl_asked
    assert ("policy" not in roles) == (updates == 1 and (not kl_in_reward or not kl_asked))
    if updates == 1:
        assert needs.roles(one_forward=True) == (("reference",) if kl_asked else ())
    else:
        assert needs.roles(one_forward=True) == roles, "a later update needs numbers from before the first"


def test_the_first_rollout_is_scored_by_all_for_the_checks() -> None:
    *_, collector = shaped()
    collector.needs = Needs(updates_per_rollout=1, kl_in_reward=True, kl_asked=False)
    whole, cut, two_updates = Plan([[[[0]], [[1]]]]), Plan([[[[0], [1]]]]), Plan([[[[0]]], [[[1]]]])
    assert collector.roles_of(0, whole) == ("policy", "value", "reference")
    assert collector.roles_of(1, whole) == ()
    assert collector.roles_of(1, cut) == collector.roles_of(1, two_updates) == ("value",)


def test_an_experience_that_is_completed_later_is_the_same() -> None:
    """Rows come in another order than the rollout's, and only once."""
    experience, sampled, passes, collector = shaped()
    collector._incomplete = (sampled, Passes(ref_logprobs=passes.ref_logprobs))
    rows = [2, 0, 3, 1]
    said = {name: getattr(passes, name)[rows] for name in ("old_logprobs", "entropies", "values", "final_values")}
    completed = collector.complete(rows, **said)
    for name, column in experience.rows(range(4)).items():
        torch.testing.assert_close(getattr(completed, name), column, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="complete already"):
        collector.complete(rows, **said)


SAID_BY = {
    "policy": {"old_logprobs", "entropies"},
    "value": {"values", "final_values"},
    "reference": {"ref_logprobs"},
}


@pytest.mark.parametrize("value_on", ["adapter", "policy_trunk"])
@pytest.mark.parametrize("roles", [("value",), ("policy", "reference"), ("value", "reference"), ()], ids="-".join)
def test_roles_say_what_all_of_them_say_and_the_others_nothing(roles: tuple[str, ...], value_on: str) -> None:
    _, sampled, *_ = shaped()
    sampled = replace(sampled, sequences=torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(1)))
    adapters = ("policy",) if value_on == "policy_trunk" else ("policy", "value")
    shared, plan = tiny_shared(roles=adapters, value_on=value_on).eval(), Plan([[[[2, 0], [1, 3]]]])
    with torch.no_grad():
        everything = score(shared, sampled, plan, padded_layout, 0.7)
        found = score(shared, sampled, plan, padded_layout, 0.7, roles=roles)
    for name in set().union(*SAID_BY.values()):
        expected, result = getattr(everything, name), getattr(found, name)
        if name in set().union(*(SAID_BY[role] for role in roles)):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        else:
            assert result is None


def test_without_roles_no_pass_runs() -> None:
    _, sampled, *_ = shaped()
    shared = tiny_shared()
    shared.forward = None  # type: ignore[assignment, method-assign] # not callable
    assert score(shared, sampled, Plan([[[[0, 1, 2, 3]]]]), padded_layout, 1.0, roles=()) == Passes()


# ---- what the policy's pass tells -----------------------------------------------------------------------------------


def test_importance_metrics_by_a_plain_loop() -> None:
    _, sampled, passes, collector = shaped()
    g = torch.Generator().manual_seed(8)
    rollout_logprobs = there(passes.old_logprobs) + 0.5 * torch.randn(4, 4, generator=g)
    collector.correction = Correction("token", 1.2)
    collector._experience(replace(sampled, rollout_logprobs=rollout_logprobs), passes)
    ratios = [
        min(math.exp((there(passes.old_logprobs) - rollout_logprobs)[b, t].item()), 1.2)
        for b, length in enumerate(LENGTHS)
        for t in range(length)
    ]
    n, metrics = len(ratios), collector.metrics
    assert metrics["rollout/importance_mean"] == pytest.approx(sum(ratios) / n)
    capped = sum(w == 1.2 for w in ratios) / n
    assert 0 < capped < 1 and metrics["rollout/importance_capped"] == pytest.approx(capped)
    ess = sum(ratios) ** 2 / (n * sum(w * w for w in ratios))
    assert metrics["rollout/importance_ess"] == pytest.approx(ess, rel=1e-5)


def test_without_a_policy_pass_its_metrics_are_not_there() -> None:
    _, sampled, passes, collector = shaped()
    collector.needs = Needs(updates_per_rollout=1, kl_in_reward=True, kl_asked=False)
    experience = collector._experience(sampled, Passes(values=passes.values, final_values=passes.final_values))
    assert experience.old_logprobs is None and experience.ref_logprobs is None
    told = {name for name in collector.metrics if name.startswith(("actor/", "rollout/"))}
    assert told == {"actor/reward_kl_penalty_coeff"}


def test_a_reward_with_a_kl_needs_its_passes() -> None:
    _, sampled, passes, collector = shaped()
    with pytest.raises(RuntimeError, match="roles leave out"):
        collector._experience(sampled, Passes(values=passes.values, final_values=passes.final_values))
