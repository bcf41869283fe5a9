"""Rewards of tokens, dropped responses, groups and baselines on their way to advantages, row by row."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.algorithms.advantages import gae, reinforce_plus_plus, remax
from rlhf_toolkit.algorithms.group_advantages import dr_grpo, grpo, opo, reinforce_plus_plus_baseline, rloo
from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.errors import ConfigError, DataError
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.rewards.scores import Scores
from rlhf_toolkit.rollout.prompt_source import PromptSource
from rlhf_toolkit.rollout.sampled import Sampled, gather_rollout, sampled_here
from rlhf_toolkit.rollout.shaping import Estimator, ScoreShaping
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout
from tests.rollout.test_experience import FINISHED, LENGTHS, PENALTY, finished_by, maker_of, shaped
from tests.support.values import there

KEPT = torch.tensor([True, True, False, True])


# ---- rewards of tokens ----------------------------------------------------------------------------------------------


def test_rewards_of_tokens_are_paid_where_they_were_earned() -> None:
    """What rewards gave for tokens comes back as the reward of each, to the scale."""
    given = [[1.0, 2.0, 4.0], [8.0], [0.5, 0.25, 0.0, 0.0], [0.0, -1.0, -2.0, 3.0]]
    scores = Scores([sum(row) for row in given], {}, [True] * 4, given, {})
    batch = PromptBatch(tuple(Prompt(i, "p", (5, 6), {}) for i in range(4)), samples=(0,) * 4)
    rollout = Rollout(
        torch.ones(4, 4, dtype=torch.long), torch.tensor(LENGTHS), torch.zeros(4, 4), torch.tensor(FINISHED)
    )
    sampled = sampled_here(batch, rollout, ["r"] * 4, scores, pad_id=0)
    shaping = maker_of(reward_scale=2.0).shaping
    found = shaping.rewards(ScoreShaping(scale=2.0)(sampled, budget=4), sampled, RoleOutputs(), kl_coef=None)
    assert [row[:n] for row, n in zip(found.tolist(), LENGTHS, strict=True)] == [[2 * r for r in row] for row in given]


def test_the_kl_is_charged_to_the_policy_and_not_where_it_did_not_write() -> None:
    _, sampled, outputs, _, maker = shaped()
    written = torch.ones(4, 4, dtype=torch.bool)
    written[0, 1] = False
    found = maker.shaping.rewards(torch.zeros(4), replace(sampled, written=written), outputs, kl_coef=0.5)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            x = (outputs.policy_logprobs[b, t] - outputs.reference_logprobs[b, t]).item() if written[b, t] else 0.0
            assert found[b, t].item() == pytest.approx(-0.5 * x, abs=1e-6)


# ---- dropped responses ----------------------------------------------------------------------------------------------


def test_a_dropped_response_has_no_part_in_its_groups_statistics() -> None:
    experience, sampled, *_ = shaped(estimator=grpo, kept=KEPT, groups=torch.tensor([0, 0, 0, 0]), kl_in_reward=False)
    scores = [sampled.raw_scores[b].item() - (0 if FINISHED[b] else PENALTY) for b in (0, 1, 3)]
    mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
    for b, score in zip((0, 1, 3), scores, strict=True):
        expected = torch.full((LENGTHS[b],), (score - mean) / (deviation + 1e-6))
        torch.testing.assert_close(experience.advantages[b, : LENGTHS[b]], expected)
    assert not experience.advantages[2].any() and not experience.returns[2].any()


@pytest.mark.parametrize("estimator", [grpo, dr_grpo, rloo, opo, reinforce_plus_plus_baseline])
def test_the_only_response_left_of_a_group_has_the_advantage_zero(estimator: Any) -> None:
    """Its score, an arbitrary number, would weigh more than every measured difference. A prompt that was answered once
    (row 1) is another matter: there the score is the advantage."""
    for kept, groups, expected in (
        (KEPT, torch.tensor([0, 0, 9, 9]), [1, 1, 0, 0]),
        (KEPT, torch.tensor([4, 7, 9, 9]), [1, 1, 0, 0]),
        (torch.tensor([False, True, False, True]), torch.tensor([2, 7, 2, 2]), [0, 1, 0, 0]),
    ):
        experience, *_ = shaped(estimator=estimator, kept=kept, groups=groups, kl_in_reward=False)
        assert experience.advantages.any(1).int().tolist() == expected
        assert experience.response_mask.any(1).tolist() == kept.tolist(), "it is trained on: KL and entropy count"


def test_a_dropped_response_is_not_trained_on_and_does_not_whiten() -> None:
    experience, *_ = shaped(kept=KEPT, whiten_advantages=True)
    assert experience.response_mask.sum(1).tolist() == [3, 1, 0, 4]
    assert experience.advantages[experience.response_mask].mean().abs().item() < 1e-6


@pytest.mark.parametrize("estimator", [gae, grpo])
def test_a_spoiled_response_is_a_dropped_one_that_spoils_its_own_row_alone(estimator: Any) -> None:
    options: dict[str, Any] = {"estimator": estimator, "kept": KEPT, "groups": torch.tensor([0, 0, 0, 0])}
    options["whiten_advantages"] = True
    _, sampled, outputs, _, maker = shaped(**options)
    raw = sampled.raw_scores.clone()
    raw[2] = torch.nan
    dropped, spoiled = (
        finished_by(maker, each, outputs).experience for each in (sampled, replace(sampled, raw_scores=raw))
    )
    assert dropped.response_mask.any(1).tolist() == KEPT.tolist() and spoiled.response_mask.any(1).all()
    assert torch.equal(dropped.advantages[KEPT], spoiled.advantages[KEPT])
    assert spoiled.advantages[2].isnan().all() and spoiled.advantages[KEPT].isfinite().all()


def test_scores_are_whitened_over_those_that_are_there() -> None:
    _, sampled, *_ = shaped(kept=KEPT)
    found = ScoreShaping(whiten=True)(sampled, budget=4)
    scores = [sampled.raw_scores[b].item() for b in (0, 1, 3)]
    expected = [(score - statistics.fmean(scores)) / statistics.stdev(scores) for score in scores]
    assert [found[b].item() for b in (0, 1, 3)] == pytest.approx(expected, rel=1e-5)


def test_returns_are_never_whitened() -> None:
    plain, whitened = (shaped(whiten_advantages=whiten)[0] for whiten in (False, True))
    assert torch.equal(plain.returns, whitened.returns)
    assert not torch.equal(plain.advantages, whitened.advantages)


# ---- groups and baselines -------------------------------------------------------------------------------------------


def test_a_response_is_measured_against_its_own_group() -> None:
    experience, sampled, *_ = shaped(estimator=dr_grpo, groups=torch.tensor([4, 4, 9, 9]), kl_in_reward=False)
    scores = [sampled.raw_scores[b].item() - (0 if FINISHED[b] else PENALTY) for b in range(4)]
    for b, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        assert experience.advantages[b, 0].item() == pytest.approx((scores[b] - scores[other]) / 2, rel=1e-5)


def test_a_response_is_measured_against_its_own_baseline() -> None:
    baselines = torch.tensor([1.0, -2.0, 3.0, 0.5])
    experience, sampled, *_ = shaped(estimator=remax, baselines=baselines, kl_in_reward=False)
    for b, length in enumerate(LENGTHS):
        score = sampled.raw_scores[b].item() - (0 if FINISHED[b] else PENALTY)
        assert experience.advantages[b, length - 1].item() == pytest.approx(score - baselines[b].item(), rel=1e-5)


def with_baselines(kept: list[bool], scores: ScoreShaping) -> tuple[Sampled, list[tuple[bool, list[int]]]]:
    """The rows of ``shaped`` with baselines, and what was asked for: whether greedily, and which prompts. The greedy
    responses to prompts 3, 5 and 8 come in that order, the rows in another."""
    sampled = shaped(groups=torch.tensor([5, 8, 3, 5])).sampled
    maker, asked = maker_of(scores=scores), []
    prompts = [Prompt(index, "p", (1,), {}) for index in (8, 3, 5)]
    maker.source = PromptSource(prompts, PromptSchedule(3, 3, 0), responses_per_prompt=1)

    def responses(shared: object, rows: PromptBatch, shares: object, *, greedy: bool) -> Sampled:
        asked.append((greedy, [prompt.index for prompt in rows.prompts]))
        found = replace(sampled.rows([0, 1, 2]), raw_scores=torch.tensor([0.3, 0.5, 0.8]), kept=torch.tensor(kept))
        return replace(found, groups=torch.tensor([3, 5, 8]), finished=torch.tensor([True, False, True]))

    maker.scored_sampler.responses = responses  # type: ignore[method-assign,assignment]
    return maker._with_baselines(Mock(spec=SharedBase), sampled), asked


def test_a_rows_baseline_is_the_score_of_the_greedy_response_to_its_prompt() -> None:
    """The score after shaping: prompt 5's greedy response was cut off."""
    found, asked = with_baselines([True] * 3, ScoreShaping(missing_eos_penalty=0.1))
    assert there(found.baselines).tolist() == pytest.approx([0.4, 0.8, 0.3, 0.4]) and found.kept.all()
    assert asked == [(True, [3, 5, 8])]


def test_a_baseline_is_whitened_as_the_scores_are() -> None:
    """Else it would be a number of another kind: greedy responses alone have the mean 0."""
    found, _ = with_baselines([True] * 3, ScoreShaping(scale=2.0, whiten=True))
    scores = [2 * score for score in found.raw_scores.tolist()]
    mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
    expected = [(2 * greedy - mean) / deviation for greedy in (0.5, 0.8, 0.3, 0.5)]
    assert there(found.baselines).tolist() == pytest.approx(expected, rel=1e-5)


def test_without_a_baseline_there_is_nothing_to_train_on() -> None:
    """A dropped greedy response has no score, not the score 0."""
    found, _ = with_baselines([True, False, True], ScoreShaping())
    assert found.kept.tolist() == [False, True, True, False]


# ---- what is done to scores -----------------------------------------------------------------------------------------


def test_the_order_is_penalties_clip_scale_whitening() -> None:
    """Row 2 has 4 of at most 5 tokens, so 1 of the 2 in the buffer; rows 2 and 3 were cut off."""
    _, sampled, *_ = shaped()
    sampled = replace(sampled, raw_scores=torch.tensor([5.0, 0.25, 1.0, -9.0]))
    of: dict[str, Any] = {
        "missing_eos_penalty": 0.5,
        "overlong_buffer": 2,
        "overlong_penalty": 0.3,
        "clip": 2.0,
        "scale": 10.0,
    }
    by_hand = [20.0, 2.5, 10 * (1.0 - 0.5 - 0.3 / 2), -20.0]
    assert ScoreShaping(**of)(sampled, budget=5).tolist() == pytest.approx(by_hand)
    mean, deviation = statistics.fmean(by_hand), statistics.stdev(by_hand)
    whitened = ScoreShaping(**of, whiten=True)
    assert whitened(sampled, budget=5).tolist() == pytest.approx([(s - mean) / deviation for s in by_hand], rel=1e-5)
    assert whitened.before_whitening(sampled, budget=5).tolist() == pytest.approx(by_hand), "what an evaluation shows"


def test_a_dropped_response_counts_in_no_score_of_the_log() -> None:
    metrics = shaped(kept=KEPT, scores=ScoreShaping()).collected.metrics
    sampled = shaped().sampled
    there = [sampled.raw_scores[b].item() for b in (0, 1, 3)]
    for name in ("critic/score", "critic/raw_score"):
        assert metrics[f"{name}/mean"] == pytest.approx(statistics.fmean(there), rel=1e-5)
        assert metrics[f"{name}/min"] == pytest.approx(min(there))
    assert metrics["reward/dropped"] == 1.0


# ---- estimators of one's own ----------------------------------------------------------------------------------------


def wide(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return rewards.double() + 1, rewards.double()


def narrow(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return rewards.sum(1), rewards


def alone(rewards: Tensor, mask: Tensor) -> Tensor:
    return rewards


def listed(rewards: Tensor, mask: Tensor) -> list[Tensor]:
    return [rewards, rewards]


def test_an_estimator_may_work_in_double_precision() -> None:
    experience, *_ = shaped(estimator=wide)
    assert experience.advantages.dtype == experience.returns.dtype == torch.float32
    torch.testing.assert_close(experience.advantages, experience.returns + 1)


def of_numpy(rewards: Tensor, mask: Tensor) -> Any:
    return rewards.numpy(), rewards.numpy()


@pytest.mark.parametrize("estimator", [narrow, alone, listed, of_numpy])
def test_an_estimator_that_returns_something_else_is_named(estimator: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        shaped(estimator=estimator)
    assert str(caught.value) == (
        f"ppo.advantage: {estimator.__name__} must return (advantages, returns), each a tensor of shape (4, 4)"
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": 0.5}, "ppo.advantage_kwargs.gamma is given to gae anyway; leave it out"),
        ({"lamda": 0.5}, "ppo.advantage_kwargs.lamda: gae has no such parameter; it takes none of its own"),
    ],
)
def test_constants_that_do_not_fit_are_named_before_anything_runs(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Estimator(gae, kwargs)
    assert str(caught.value) == message


def test_an_estimator_that_needs_what_nobody_has_is_told_what_there_is() -> None:
    def greedy(rewards: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return rewards, rewards

    with pytest.raises(
        ConfigError, match=r"^ppo\.advantage: greedy needs temperature; set it in ppo\.advantage_kwargs"
    ):
        Estimator(greedy)
    assert Estimator(greedy, {"temperature": 2.0}).needs("mask")


# ---- too little to train on -----------------------------------------------------------------------------------------


def test_a_rollout_of_dropped_responses_ends_with_the_way_out() -> None:
    with pytest.raises(DataError) as caught:
        shaped(kept=torch.tensor([False] * 4))
    assert str(caught.value) == (
        "4 of 4 responses of a rollout were dropped, since their reward failed, which leaves 0 tokens to train on; "
        "repair the reward, or set its on_failure to score"
    )


# ---- which rows and which tokens ------------------------------------------------------------------------------------


def test_gathered_rows_come_back_to_their_own_places() -> None:
    _, sampled, *_ = shaped()
    shares = [[2, 0, 3, 1]]
    gathered = gather_rollout(sampled.rows(shares[0]), shares, pad_id=0)
    for name in ("raw_scores", "rollout_logprobs", "response_lengths", "groups", "finished"):
        assert torch.equal(getattr(gathered, name), getattr(sampled, name)), name


def test_what_an_environment_wrote_is_no_token_of_the_policy() -> None:
    _, sampled, outputs, _, maker = shaped(estimator=reinforce_plus_plus)
    written = torch.ones(4, 4, dtype=torch.bool)
    written[3, 1:3] = False
    holed = replace(sampled, written=written)
    assert holed.token_mask.tolist() == [
        [True, True, True, False],
        [True] + [False] * 3,
        [True] * 4,
        [True, False, False, True],
    ]
    assert torch.equal(finished_by(maker, holed, outputs).experience.response_mask, holed.token_mask)


def test_only_a_response_that_was_cut_off_goes_on_with_the_value_of_its_end() -> None:
    """With lambda 0 the advantage of a last token is its TD error."""
    experience, sampled, outputs, *_ = shaped(truncated="bootstrap", kl_in_reward=False, gae_lambda=0.0)
    for b, length in enumerate(LENGTHS):
        score = sampled.raw_scores[b].item() - (0 if FINISHED[b] else PENALTY)
        following = 0.0 if FINISHED[b] else outputs.final_values[b].item()
        expected = score + 0.9 * following - outputs.token_values[b, length - 1].item()
        assert experience.advantages[b, length - 1].item() == pytest.approx(expected, rel=1e-5)
