"""The terms of the loss, their signs, weights and gradients, and what decides which of them count."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.aggregation import aggregate
from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.policy_losses import vanilla
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.rollout.deferred import UpdatePolicyRecord
from rlhf_toolkit.rollout.loader import Schedule
from rlhf_toolkit.runs.algorithm import resolve
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.trainers.ppo import PPOTrainer
from rlhf_toolkit.trainers.ppo_loss import PolicyLoss, PPOLoss
from rlhf_toolkit.types import Experience
from tests.support.batches import MASK, like_mask, real
from tests.support.tiny import merged, write_task
from tests.support.values import there

LOSS = PPOLoss(
    clip_range_low=0.1,
    clip_range_high=0.3,
    dual_clip=None,
    value_clip_range=0.4,
    value_coef=0.7,
    entropy_coef=0.2,
    loss_aggregation="token-mean",
    kl_in_loss=True,
    kl_estimator="k2",
    value_warmup_rollouts=0,
    width=7,
    temperature=1.0,
    correction=Correction("token", cap=1.2),
    policy_loss=PolicyLoss(vanilla),
)
KL_COEF = 0.6


def batch() -> Experience:
    """Random numbers on MASK's tokens."""
    names = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "advantages", "returns")
    return Experience(
        sequences=torch.zeros(5, 9, dtype=torch.long),
        prompt_lengths=torch.full((5,), 2),
        response_lengths=torch.full((5,), 7),
        token_mask=torch.ones_like(MASK),
        response_mask=MASK,
        **{name: like_mask(seed, scale=0.5) for seed, name in enumerate(names)},
    )


def said() -> RoleOutputs:
    """What the roles say now, with gradients."""
    names = ("policy_logprobs", "policy_entropies", "token_values")
    return RoleOutputs({name: like_mask(10 + i, scale=0.5).requires_grad_() for i, name in enumerate(names)})


def priced(loss: PPOLoss, experience: Experience, now: RoleOutputs, *, policy_weight: float = 1.0) -> Tensor:
    """The loss of the whole mini-batch."""
    reduce = partial(aggregate, mask=MASK, mode=loss.loss_aggregation, tokens=17, sequences=5, width=7)
    given: dict[str, Any] = {"selected": None, "reduce": reduce, "kl_coef": KL_COEF, "policy_weight": policy_weight}
    return loss.terms(experience, now, there(experience.old_logprobs), **given).loss


@pytest.mark.parametrize("policy_weight", [1.0, 0.0])
def test_loss_and_gradients_are_the_formula_written_out(policy_weight: float) -> None:
    """Mean over tokens of w max(-A r, -A clip r) - 0.2 H + 0.6 x^2 / 2, and 0.7 times the value's, which is not
    weighed; with the derivative by each number that the roles say."""
    experience, now = batch(), said()
    loss = priced(LOSS, experience, now, policy_weight=policy_weight)
    loss.backward()
    total = 0.0
    for at in real():
        logprob, entropy, value = (column[at].item() for column in now.values())
        old, ref, sampler, old_value, advantage, target = (
            getattr(experience, name)[at].item()
            for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "advantages", "returns")
        )
        ratio, weight, x = math.exp(logprob - old), min(math.exp(old - sampler), 1.2), logprob - ref
        clipped = min(max(ratio, 0.9), 1.3)
        decides = -advantage * ratio >= -advantage * clipped
        policy = weight * max(-advantage * ratio, -advantage * clipped) - 0.2 * entropy + KL_COEF * x * x / 2
        slope = (-weight * advantage * ratio if decides else 0.0) + KL_COEF * x
        limited = min(max(value, old_value - 0.4), old_value + 0.4)
        total += policy_weight * policy + 0.7 * max((value - target) ** 2, (limited - target) ** 2) / 2
        free = (value - target) ** 2 >= (limited - target) ** 2
        assert there(now.policy_logprobs.grad)[at].item() == pytest.approx(
            policy_weight * slope / 17, rel=1e-4, abs=1e-7
        )
        assert there(now.policy_entropies.grad)[at].item() == pytest.approx(policy_weight * -0.2 / 17, rel=1e-5)
        assert there(now.token_values.grad)[at].item() == pytest.approx(
            0.7 * (value - target) / 17 if free else 0.0, rel=1e-4, abs=1e-7
        )
    assert loss.item() == pytest.approx(total / 17, rel=1e-5)
    for column in now.values():
        assert not there(column.grad)[~MASK].any()


def test_without_critic_and_kl_only_policy_and_entropy_are_left() -> None:
    experience, now = batch(), without_values(said())
    whole = priced(replace(LOSS, kl_in_loss=False), experience, now)
    policy_alone = priced(replace(LOSS, kl_in_loss=False, entropy_coef=0.0), experience, now)
    mean_entropy = sum(now.policy_entropies[at].item() for at in real()) / 17
    assert whole.item() == pytest.approx(policy_alone.item() - 0.2 * mean_entropy, rel=1e-5)


def without_values(now: RoleOutputs) -> RoleOutputs:
    """The same without a critic."""
    return RoleOutputs(policy_logprobs=now.policy_logprobs, policy_entropies=now.policy_entropies)


def test_a_loss_of_ones_own_is_masked_like_the_others() -> None:
    loss = PolicyLoss(lambda logprobs, advantages: -advantages * logprobs)
    mine = like_mask(20).requires_grad_()
    terms = loss({"logprobs": mine, "old_logprobs": mine.detach(), "advantages": like_mask(21), "mask": MASK})
    torch.testing.assert_close(terms.per_token, torch.where(MASK, -like_mask(21) * mine, 0.0))
    assert torch.equal(terms.ratio, torch.ones(MASK.shape))


# ---- what decides ---------------------------------------------------------------------------------------------------


def stub(**attributes: Any) -> Any:
    """As much of a trainer as one of its methods looks at."""
    return SimpleNamespace(**attributes)


def test_a_micro_batch_is_divided_by_the_counts_of_its_mini_batch_and_only_over_what_is_trained() -> None:
    batch = stub(response_mask=MASK, token_mask=torch.ones_like(MASK))
    inputs = {"response_mask": MASK, "token_count": torch.tensor(50), "sequence_count": torch.tensor(20)}
    trainer = stub(loss=replace(LOSS, loss_aggregation="token-mean"))
    per_token = like_mask(30)
    found = PPOTrainer._reduction(trainer, inputs, batch)(per_token)
    assert found.item() == pytest.approx(sum(per_token[at].item() for at in real()) / 50, rel=1e-5)
    trainer = stub(loss=replace(LOSS, loss_aggregation="seq-mean-token-sum-norm"))
    found = PPOTrainer._reduction(trainer, inputs, batch)(per_token)
    assert found.item() == pytest.approx(sum(per_token[at].item() for at in real()) / (20 * 7), rel=1e-5)


def test_updates_stop_above_the_kl_of_the_policy_to_that_at_rollout() -> None:
    """k3 of old against new: e^-d - 1 + d with d = old - new, the mean over two micro-batches' real tokens."""
    differences = [like_mask(31, scale=0.3), like_mask(32, scale=0.3)]
    each = [math.exp(-d[at].item()) - 1 + d[at].item() for d in differences for at in real()]
    kl = sum(each) / len(each)
    for limit, stops in ((0.9 * kl, True), (1.1 * kl, False)):
        trainer = stub(loss=replace(LOSS, kl_stop=limit), _kl_sums=torch.zeros(2), _stopped=False)
        for difference in differences:
            PPOTrainer._watch_kl(trainer, torch.zeros(5, 7), difference, MASK)
        PPOTrainer.decide_whether_to_go_on(trainer)
        assert trainer._stopped == stops and not trainer._kl_sums.any()


def test_warm_up_ends_with_the_last_update_of_its_last_rollout() -> None:
    """Two rollouts of three epochs and two mini-batches are the steps 0 to 11."""
    loss = replace(LOSS, value_warmup_rollouts=2)
    steps = range(14)
    trainers = [stub(loss=loss, schedule=Schedule(9, 3, 2), state=stub(global_step=n)) for n in steps]
    warm = [vars(PPOTrainer)["warming_up"].fget(trainer) for trainer in trainers]
    assert warm == [True] * 12 + [False] * 2


def test_old_log_probs_that_the_update_makes_itself_are_constants() -> None:
    """Or the ratio's gradient would cancel."""
    experience, now = replace(batch(), old_logprobs=None), said()
    maker, record = stub(checks=None), UpdatePolicyRecord()
    for deferred in (None, stub()):
        trainer = stub(maker=maker, rollouts=stub(newest=stub(deferred=deferred)), _policy_record=record)
        old = PPOTrainer.old_logprobs(trainer, experience, now, check=False)
        assert torch.equal(old, now.policy_logprobs) and not old.requires_grad
    known = batch()
    trainer = stub(maker=maker, rollouts=stub(newest=stub(deferred=None)))
    assert PPOTrainer.old_logprobs(trainer, known, now, check=False) is known.old_logprobs
    assert record, "what the policy says is kept for the rollout's metrics"


def test_a_knob_of_the_experiment_becomes_the_knob_of_that_name(tmp_path: Path) -> None:
    """Every number another one, so that no two can be confused."""
    numbers = {
        "clip_range_low": 0.11,
        "clip_range_high": 0.12,
        "dual_clip": 1.13,
        "value_clip_range": 0.14,
        "value_coef": 0.15,
        "entropy_coef": 0.16,
        "loss_aggregation": "seq-mean-token-sum",
        "kl_estimator": "k2",
        "value_warmup_rollouts": 1,
        "kl_stop": 0.17,
        "gamma": 0.18,
        "gae_lambda": 0.19,
        "truncated": "bootstrap",
    }
    of_scores = {
        "missing_eos_penalty": 0.21,
        "clip": 0.22,
        "scale": 0.23,
        "overlong_buffer": 2,
        "overlong_penalty": 0.24,
    }
    changes = {f"ppo.{name}": value for name, value in numbers.items()}
    changes |= {f"reward.{name}": value for name, value in of_scores.items()}
    experiment: Any = experiment_from_dict(
        merged(write_task(tmp_path), {**changes, "rollout.temperature": 0.8, "ppo.mini_batches": 2})
    )
    algorithm = resolve(experiment)
    loss, shaping, scores = algorithm.loss, algorithm.shaping, algorithm.score_shaping
    found = {each.name: getattr(made, each.name) for made in (loss, shaping) for each in fields(made)}
    found |= {each.name: getattr(scores, each.name) for each in fields(scores)}
    assert shaping.reward_scale == scores.scale
    assert {name: found[name] for name in numbers | of_scores} == numbers | of_scores
    assert (loss.temperature, loss.width, loss.kl_in_loss, shaping.kl_in_reward) == (0.8, 6, False, True)
