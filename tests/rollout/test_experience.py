"""Shaping a rollout: scores to rewards to advantages, against plain loops over rows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch

from rlhf_toolkit.algorithms.advantages import gae
from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL, FixedKL
from rlhf_toolkit.data.layout import padded_layout
from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.errors import DataError
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.rollout.cutting import Cutting, Plan
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.deferred import DeferredExperience
from rlhf_toolkit.rollout.experience import Collected, ExperienceMaker
from rlhf_toolkit.rollout.prompt_source import PromptSource
from rlhf_toolkit.rollout.role_pass import ROLES, Needs, run_role_pass
from rlhf_toolkit.rollout.sampled import Sampled
from rlhf_toolkit.rollout.sampler import Sampler
from rlhf_toolkit.rollout.scored_sampler import ScoredSampler, Scorer
from rlhf_toolkit.rollout.shaping import Estimator, ScoreShaping, Shaping
from rlhf_toolkit.types import Experience, Prompt
from tests.support.roles import tiny_shared

LENGTHS, FINISHED = [3, 1, 4, 4], [True, True, False, False]
KL_COEF, PENALTY, GAMMA, LAMBDA = 0.3, 0.5, 0.9, 0.8


class Made(NamedTuple):
    """An experience, and what it was made of and by."""

    experience: Experience
    sampled: Sampled
    outputs: RoleOutputs
    collected: Collected
    maker: ExperienceMaker


def maker_of(**changes: Any) -> ExperienceMaker:
    """A maker that samples nothing, of rollouts of one prompt."""
    score_shaping = changes.pop("scores", ScoreShaping(missing_eos_penalty=PENALTY))
    whiten = changes.pop("whiten_advantages", False)
    settings: dict[str, Any] = {
        "estimator": Estimator(changes.pop("estimator", gae), whiten=whiten),
        "gamma": GAMMA,
        "gae_lambda": LAMBDA,
        "kl_in_reward": True,
        "kl_estimator": "k1",
        "truncated": "terminal",
        "reward_scale": 1.0,
    }
    sampling = Sampling(max_new_tokens=4, stop_ids=(1,), pad_id=0)
    scored_sampler = ScoredSampler(
        Mock(spec=Sampler), Mock(spec=Scorer), sampling, Cutting(1, 100), score_shaping=score_shaping
    )
    source = PromptSource([Prompt(0, "p", (1,), {})], PromptSchedule(1, 1, 0), responses_per_prompt=1)
    return ExperienceMaker(scored_sampler, source, Shaping(**{**settings, **changes}), Needs(), FixedKL(KL_COEF))


def finished_by(maker: ExperienceMaker, sampled: Sampled, outputs: RoleOutputs) -> Made:
    """The experience that ``maker`` makes of a rollout whose role pass is over."""
    collected = Collected(maker._tokens_of(sampled, outputs))
    return Made(maker._finish(collected, sampled, outputs), sampled, outputs, collected, maker)


def shaped(finished: list[bool] = FINISHED, **changes: Any) -> Made:
    """A rollout of four rows with random numbers of its roles, shaped under ``changes``."""
    of_sampled = {
        name: changes.pop(name) for name in ("kept", "token_rewards", "groups", "baselines") if name in changes
    }
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
    outputs = RoleOutputs(
        policy_logprobs=old,
        policy_entropies=entropies,
        reference_logprobs=ref,
        token_values=values,
        final_values=torch.randn(4, generator=g),
    )
    return finished_by(maker_of(**changes), sampled, outputs)


def loop_gae(sampled: Sampled, outputs: RoleOutputs, *, kl: bool, bootstrap: bool) -> list[list[float]]:
    """Advantages of each row's real tokens, by the definition."""
    rows = []
    for b, length in enumerate(LENGTHS):
        score = sampled.raw_scores[b].item() - (0 if sampled.finished[b] else PENALTY)
        difference = (outputs.policy_logprobs[b] - outputs.reference_logprobs[b]).tolist()
        rewards = [-(KL_COEF * difference[t] if kl else 0.0) for t in range(length)]
        rewards[-1] += score
        last = outputs.final_values[b].item() if bootstrap and not sampled.finished[b] else 0.0
        values = [*outputs.token_values[b, :length].tolist(), last]
        deltas = [rewards[t] + GAMMA * values[t + 1] - values[t] for t in range(length)]
        rows.append([sum((GAMMA * LAMBDA) ** (i - t) * deltas[i] for i in range(t, length)) for t in range(length)])
    return rows


@pytest.mark.parametrize("truncated", ["terminal", "bootstrap", "mask"])
@pytest.mark.parametrize("kl_in_reward", [True, False])
def test_advantages_and_returns_agree_with_plain_loops(truncated: str, kl_in_reward: bool) -> None:
    experience, sampled, outputs, *_ = shaped(truncated=truncated, kl_in_reward=kl_in_reward)
    expected = loop_gae(sampled, outputs, kl=kl_in_reward, bootstrap=truncated == "bootstrap")
    for b, row in enumerate(expected):
        torch.testing.assert_close(experience.advantages[b, : len(row)], torch.tensor(row), rtol=1e-5, atol=1e-5)
        returns = torch.tensor(row) + outputs.token_values[b, : len(row)]
        torch.testing.assert_close(experience.returns[b, : len(row)], returns, rtol=1e-5, atol=1e-5)


def test_mask_leaves_out_the_responses_that_were_cut_off() -> None:
    experience, *_ = shaped(truncated="mask")
    assert experience.response_mask.sum(1).tolist() == [3, 1, 0, 0]
    everything, *_ = shaped(truncated="terminal")
    assert everything.response_mask.sum(1).tolist() == LENGTHS


def test_whitening_is_over_the_trained_tokens_only() -> None:
    experience, *_ = shaped(truncated="mask", whiten_advantages=True)
    trained = experience.advantages[experience.response_mask]
    assert trained.mean().abs().item() < 1e-6
    assert trained.std().item() == pytest.approx(1.0, abs=1e-4)


def test_mask_with_nothing_left_is_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"max_new_tokens.*truncated: bootstrap"):
        shaped(finished=[False] * 4, truncated="mask")


def test_the_record_says_what_happened() -> None:
    _, sampled, outputs, collected, _ = shaped()
    metrics = collected.metrics
    raw = sampled.raw_scores.tolist()
    assert metrics["critic/raw_score/mean"] == pytest.approx(sum(raw) / 4)
    assert metrics["critic/score/mean"] == pytest.approx((sum(raw) - 2 * PENALTY) / 4)
    differences = [
        (outputs.policy_logprobs - outputs.reference_logprobs)[b, :n].tolist() for b, n in enumerate(LENGTHS)
    ]
    assert metrics["actor/ref_kl"] == pytest.approx(sum(map(sum, differences)) / 4, rel=1e-5)
    per_token = [sum(row) / len(row) for row in differences]
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(sum(per_token) / 4, rel=1e-5)
    k3 = [math.exp(-d) - 1 + d for row in differences for d in row]
    assert metrics["actor/ref_kl_k3"] == pytest.approx(sum(k3) / len(k3), rel=1e-4)
    assert metrics["response_length/mean"] == 3.0 and metrics["response_length/clip_ratio"] == 0.5
    assert metrics["perf/total_num_tokens"] == sum(LENGTHS) + 8


# ---- which roles run in the role pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("kl_in_reward", [True, False])
@pytest.mark.parametrize("kl_asked", [True, False])
def test_a_role_runs_where_something_needs_it(updates: int, kl_in_reward: bool, kl_asked: bool) -> None:
    needs = Needs(updates_per_rollout=updates, kl_in_reward=kl_in_reward, kl_asked=kl_asked)
    roles = needs.roles(rollout=1, one_forward=False)
    assert "value" in roles, "advantages need it"
    assert ("reference" in roles) == kl_asked
    assert ("policy" not in roles) == (updates == 1 and (not kl_in_reward or not kl_asked))
    if updates == 1:
        assert needs.roles(rollout=1, one_forward=True) == (("reference",) if kl_asked else ())
    else:
        assert needs.roles(rollout=1, one_forward=True) == roles, "a later update needs numbers from before the first"


def test_in_the_first_rollout_all_roles_run_for_the_checks() -> None:
    needs = Needs(updates_per_rollout=1, kl_in_reward=True, kl_asked=False)
    for one_forward in (True, False):
        assert needs.roles(rollout=0, one_forward=one_forward) == ("policy", "value", "reference")
        assert not needs.defers(rollout=0, one_forward=one_forward)
    assert needs.roles(rollout=1, one_forward=True) == () and needs.defers(rollout=1, one_forward=True)
    assert needs.roles(rollout=1, one_forward=False) == ("value",)
    assert not needs.defers(rollout=1, one_forward=False)


def test_a_plan_is_one_forward_where_each_rank_runs_one_micro_batch() -> None:
    assert Plan([[[[0]], [[1]]]]).one_forward
    assert not Plan([[[[0], [1]]]]).one_forward and not Plan([[[[0]], [[1]]], [[[2]], [[3]]]]).one_forward


def test_a_deferred_experience_is_the_same() -> None:
    """Rows come in another order than the rollout's."""
    experience, sampled, outputs, collected, maker = shaped()
    reference = RoleOutputs(reference_logprobs=outputs.reference_logprobs)
    later = Collected(maker._tokens_of(sampled, reference))
    deferred = DeferredExperience(sampled, reference, partial(maker._finish, later))
    rows = [2, 0, 3, 1]
    said = RoleOutputs({name: column[rows] for name, column in outputs.items() if name != "reference_logprobs"})
    completed = deferred.complete(rows, said)
    for name, column in experience.rows(range(4)).items():
        torch.testing.assert_close(getattr(completed, name), column, rtol=0, atol=0)
    assert later.metrics == collected.metrics and later.samples == collected.samples
    with pytest.raises(RuntimeError, match="complete already"):
        deferred.complete(rows, said)


SAID_BY = {
    "policy": {"policy_logprobs", "policy_entropies"},
    "value": {"token_values", "final_values"},
    "reference": {"reference_logprobs"},
}


@pytest.mark.parametrize("value_on", ["adapter", "policy_trunk"])
@pytest.mark.parametrize("roles", [("value",), ("policy", "reference"), ("value", "reference"), ()], ids="-".join)
def test_roles_say_what_all_of_them_say_and_the_others_nothing(roles: tuple[str, ...], value_on: str) -> None:
    _, sampled, *_ = shaped()
    sampled = replace(sampled, sequences=torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(1)))
    adapters = ("policy",) if value_on == "policy_trunk" else ("policy", "value")
    shared, plan = tiny_shared(roles=adapters, value_on=value_on).eval(), Plan([[[[2, 0], [1, 3]]]])
    with torch.no_grad():
        everything = run_role_pass(shared, sampled, plan, padded_layout, temperature=0.7, roles=ROLES)
        found = run_role_pass(shared, sampled, plan, padded_layout, temperature=0.7, roles=roles)
    assert everything.keys() == set().union(*SAID_BY.values())
    assert found.keys() == set().union(*(SAID_BY[role] for role in roles))
    for name, column in found.items():
        torch.testing.assert_close(column, everything[name], rtol=1e-5, atol=1e-5)


def test_without_roles_no_pass_runs() -> None:
    _, sampled, *_ = shaped()
    shared = tiny_shared()
    shared.forward = None  # type: ignore[assignment, method-assign] # not callable
    plan = Plan([[[[0, 1, 2, 3]]]])
    assert run_role_pass(shared, sampled, plan, padded_layout, temperature=1.0, roles=()) == {}


# ---- what the policy's pass tells -----------------------------------------------------------------------------------


def test_importance_metrics_by_a_plain_loop() -> None:
    _, sampled, outputs, _, maker = shaped()
    g = torch.Generator().manual_seed(8)
    rollout_logprobs = outputs.policy_logprobs + 0.5 * torch.randn(4, 4, generator=g)
    maker.correction = Correction("token", 1.2)
    metrics = finished_by(maker, replace(sampled, rollout_logprobs=rollout_logprobs), outputs).collected.metrics
    ratios = [
        min(math.exp((outputs.policy_logprobs - rollout_logprobs)[b, t].item()), 1.2)
        for b, length in enumerate(LENGTHS)
        for t in range(length)
    ]
    n = len(ratios)
    assert metrics["rollout/importance_mean"] == pytest.approx(sum(ratios) / n)
    capped = sum(w == 1.2 for w in ratios) / n
    assert 0 < capped < 1 and metrics["rollout/importance_capped"] == pytest.approx(capped)
    ess = sum(ratios) ** 2 / (n * sum(w * w for w in ratios))
    assert metrics["rollout/importance_ess"] == pytest.approx(ess, rel=1e-5)


def without_policy(outputs: RoleOutputs) -> RoleOutputs:
    return RoleOutputs(token_values=outputs.token_values, final_values=outputs.final_values)


def test_without_a_policy_pass_its_metrics_are_not_there() -> None:
    _, sampled, outputs, _, maker = shaped()
    maker.needs = Needs(updates_per_rollout=1, kl_in_reward=True, kl_asked=False)
    made = finished_by(maker, sampled, without_policy(outputs))
    assert made.experience.old_logprobs is None and made.experience.ref_logprobs is None
    told = {name for name in made.collected.metrics if name.startswith(("actor/", "rollout/"))}
    assert told == {"actor/reward_kl_penalty_coeff"}


def test_a_reward_with_a_kl_needs_its_roles() -> None:
    _, sampled, outputs, _, maker = shaped()
    with pytest.raises(RuntimeError, match="policy_logprobs is needed, but the policy did not run"):
        finished_by(maker, sampled, without_policy(outputs))


def test_the_controller_is_told_the_kl_of_the_penalty() -> None:
    _, sampled, outputs, collected, maker = shaped()
    maker.kl_control = AdaptiveKL(KL_COEF, target=0.5, horizon=100)
    finished_by(maker, sampled, outputs)
    error = min(max(collected.metrics["actor/reward_kl_penalty"] / 0.5 - 1, -0.2), 0.2)
    assert maker.kl_control.coefficient == pytest.approx(KL_COEF * (1 + error * 4 / 100))
