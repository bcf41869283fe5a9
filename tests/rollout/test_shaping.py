"""Rewards of tokens, dropped responses, groups and baselines on their way to advantages, row by row."""

from __future__ import annotations

import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlhf_toolkit.algorithms.advantages import reinforce_plus_plus, remax
from rlhf_toolkit.algorithms.group_advantages import dr_grpo, grpo
from rlhf_toolkit.rewards.scores import Scores
from rlhf_toolkit.rollout.passes import Passes
from rlhf_toolkit.rollout.sampled import gather_rollout, sampled_here
from rlhf_toolkit.rollout.shaping import ScoreShaping
from rlhf_toolkit.types import Prompt, PromptBatch, Rollout
from tests.rollout.test_collect import FINISHED, LENGTHS, PENALTY, shaped

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
    *_, collector = shaped()
    shaping = replace(collector.shaping, scores=ScoreShaping(scale=2.0))
    found = shaping.rewards(shaping.scores(sampled, budget=4), sampled, Passes(), kl_coef=None)
    assert [row[:n] for row, n in zip(found.tolist(), LENGTHS, strict=True)] == [[2 * r for r in row] for row in given]


def test_the_kl_is_charged_to_the_policy_and_not_where_it_did_not_write() -> None:
    _, sampled, passes, collector = shaped()
    written = torch.ones(4, 4, dtype=torch.bool)
    written[0, 1] = False
    found = collector.shaping.rewards(torch.zeros(4), replace(sampled, written=written), passes, kl_coef=0.5)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            x = (passes.old_logprobs[b, t] - passes.ref_logprobs[b, t]).item() if written[b, t] else 0.0
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


def test_a_dropped_response_is_not_trained_on_and_does_not_whiten() -> None:
    experience, *_ = shaped(kept=KEPT, whiten_advantages=True)
    assert experience.response_mask.sum(1).tolist() == [3, 1, 0, 4]
    assert experience.advantages[experience.response_mask].mean().abs().item() < 1e-6


def test_scores_are_whitened_over_those_that_are_there() -> None:
    _, sampled, *_ = shaped(kept=KEPT)
    found = ScoreShaping(whiten=True)(sampled, budget=4)
    scores = [sampled.raw_scores[b].item() for b in (0, 1, 3)]
    expected = [(score - statistics.fmean(scores)) / statistics.stdev(scores) for score in scores]
    assert [found[b].item() for b in (0, 1, 3)] == pytest.approx(expected, rel=1e-5)


def test_returns_are_never_whitened() -> None:
    plain, whitened = (shaped(whiten_advantages=whiten)[0] for whiten in (False, True))
    assert torch.equal(plain.returns, whitened.returns) and not torch.equal(plain.advantages, whitened.advantages)


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


def test_a_rows_baseline_is_the_score_of_the_greedy_response_to_its_prompt() -> None:
    """The greedy responses come in the order of the prompts' numbers, the rows in another."""
    *_, collector = shaped()
    collector.prompts = [Prompt(index, "p", (1,), {}) for index in (8, 3, 5)]
    collector.position_of = {8: 0, 3: 1, 5: 2}
    asked = []

    def sample(
        shared: object, rows: PromptBatch, shares: object, sampling: object, *, stream: object
    ) -> SimpleNamespace:
        asked.append((sampling.greedy, [prompt.index for prompt in rows.prompts]))
        return SimpleNamespace(groups=torch.tensor([3, 5, 8]), raw_scores=torch.tensor([0.3, 0.5, 0.8]))

    collector.sample, collector.shaped_scores = sample, lambda greedy: greedy.raw_scores
    rows = SimpleNamespace(groups=torch.tensor([5, 5, 8, 3, 8]))
    assert collector._baselines(None, rows).tolist() == pytest.approx([0.5, 0.5, 0.8, 0.3, 0.8])
    assert asked == [(True, [3, 5, 8])]


# ---- which rows and which tokens ------------------------------------------------------------------------------------


def test_gathered_rows_come_back_to_their_own_places() -> None:
    _, sampled, *_ = shaped()
    shares = [[2, 0, 3, 1]]
    gathered = gather_rollout(sampled.rows(shares[0]), shares, pad_id=0)
    for name in ("raw_scores", "rollout_logprobs", "response_lengths", "groups", "finished"):
        assert torch.equal(getattr(gathered, name), getattr(sampled, name)), name


def test_what_an_environment_wrote_is_no_token_of_the_policy() -> None:
    _, sampled, passes, collector = shaped(estimator=reinforce_plus_plus)
    written = torch.ones(4, 4, dtype=torch.bool)
    written[3, 1:3] = False
    holed = replace(sampled, written=written)
    assert holed.token_mask.tolist() == [
        [True, True, True, False],
        [True] + [False] * 3,
        [True] * 4,
        [True, False, False, True],
    ]
    assert torch.equal(collector._experience(holed, passes).response_mask, holed.token_mask)


def test_only_a_response_that_was_cut_off_goes_on_with_the_value_of_its_end() -> None:
    """With lambda 0 the advantage of a last token is its TD error."""
    experience, sampled, passes, _ = shaped(truncated="bootstrap", kl_in_reward=False, gae_lambda=0.0)
    for b, length in enumerate(LENGTHS):
        score = sampled.raw_scores[b].item() - (0 if FINISHED[b] else PENALTY)
        following = 0.0 if FINISHED[b] else passes.final_values[b].item()
        expected = score + 0.9 * following - passes.values[b, length - 1].item()
        assert experience.advantages[b, length - 1].item() == pytest.approx(expected, rel=1e-5)
