"""Prompts whose responses all have one score give way to others: which ones, how many, how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from rlhf_toolkit.algorithms.group_advantages import grpo
from rlhf_toolkit.algorithms.kl_control import FixedKL
from rlhf_toolkit.data.prompts import PromptSchedule
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.rollout import experience
from rlhf_toolkit.rollout.cutting import Cutting
from rlhf_toolkit.rollout.decoding import Sampling
from rlhf_toolkit.rollout.experience import ExperienceMaker
from rlhf_toolkit.rollout.prompt_source import PromptSource
from rlhf_toolkit.rollout.role_pass import Needs
from rlhf_toolkit.rollout.sampled import Sampled
from rlhf_toolkit.rollout.sampler import Sampler
from rlhf_toolkit.rollout.scored_sampler import ScoredSampler, Scorer
from rlhf_toolkit.rollout.shaping import Estimator, Shaping
from rlhf_toolkit.types import Prompt, PromptBatch

PROMPTS, PER_ROLLOUT, RESPONSES = 20, 6, 2
Score = Callable[[int, int], float | None]


class Scripted(ScoredSampler):
    """Samples nothing: response ``sample`` to prompt ``index`` scores what ``score`` says, and is dropped at None."""

    def __init__(self, score: Score) -> None:
        sampling = Sampling(max_new_tokens=4, stop_ids=(1,), pad_id=0)
        super().__init__(Mock(spec=Sampler), Mock(spec=Scorer), sampling, Cutting(1, 100))
        self.score, self.calls = score, list[Counter[int]]()

    def responses(self, shared: Any, rows: PromptBatch, shares: Sequence[Sequence[int]], **named: Any) -> Sampled:
        assert len({len(share) for share in shares}) == 1, "ranks have unequal shares"
        self.calls.append(Counter(prompt.index for prompt in rows.prompts))
        names = [(prompt.index, sample) for prompt, sample in zip(rows.prompts, rows.samples, strict=True)]
        assert len(set(names)) == len(names), "two responses with one random stream"
        scores, n = [self.score(*name) for name in names], len(rows)
        return Sampled(
            sequences=torch.zeros(n, 5, dtype=torch.long),
            prompt_lengths=torch.ones(n, dtype=torch.long),
            response_lengths=torch.full((n,), 4),
            rollout_logprobs=torch.zeros(n, 4),
            finished=torch.ones(n, dtype=torch.bool),
            written=torch.ones(n, 4, dtype=torch.bool),
            raw_scores=torch.tensor([score or 0.0 for score in scores]),
            kept=torch.tensor([score is not None for score in scores]),
            groups=torch.tensor([index for index, _ in names]),
            token_rewards=torch.zeros(n, 4),
            parts={"r": torch.tensor([score or 0.0 for score in scores])},
            prompts=[prompt.text for prompt in rows.prompts],
            responses=[f"{index}-{sample}" for index, sample in names],
            failures={"r": sum(score is None for score in scores)},
        )


class Rollouts(ExperienceMaker):
    """Makes no experience of its rollouts."""

    def __init__(self, score: Score, *, rounds: int, prompts: int = PROMPTS, per_rollout: int = PER_ROLLOUT) -> None:
        self.scripted = Scripted(score)
        source = PromptSource(
            [Prompt(100 + i, f"prompt {i}", (1,), {}) for i in range(prompts)],
            PromptSchedule(prompts, per_rollout, 0),
            RESPONSES,
            replacement_rounds=rounds,
        )
        shaping = Shaping(Estimator(grpo), 1.0, 1.0, True, "k1", "terminal", 1.0)
        super().__init__(self.scripted, source, shaping, Needs(), FixedKL(0.0))

    @property
    def calls(self) -> list[Counter[int]]:
        """How often each prompt was in each call."""
        return self.scripted.calls

    def rollout(self, number: int = 0) -> Sampled:
        """A rollout after its replacements."""
        shared = Mock(spec=SharedBase)
        first = self.responses_to(shared, self.source.positions(number), number)
        return self._without_uniform_groups(shared, first, number)


def few_differ(index: int, sample: int) -> float:
    """Every third prompt has two scores, the others one."""
    return 1.0 if index % 3 else float(sample)


def assert_whole(sampled: Sampled) -> None:
    """As many prompts as before, each once, with all its responses; texts and scores go with their rows."""
    counts = Counter(sampled.groups.tolist())
    assert len(counts) == PER_ROLLOUT and set(counts.values()) == {RESPONSES}
    assert all(
        text.startswith(f"{group}-") for text, group in zip(sampled.responses, sampled.groups.tolist(), strict=True)
    )
    assert sampled.parts["r"].tolist() == sampled.raw_scores.tolist()


def uniform(sampled: Sampled) -> list[int]:
    groups = sampled.groups.tolist()
    return [
        g
        for g in set(groups)
        if len({s for s, o in zip(sampled.raw_scores.tolist(), groups, strict=True) if o == g}) == 1
    ]


def test_without_rounds_nothing_is_replaced() -> None:
    maker = Rollouts(few_differ, rounds=0)
    sampled = maker.rollout()
    assert len(maker.calls) == 1 and len(uniform(sampled)) > 0


def test_others_take_the_places_until_none_is_uniform() -> None:
    maker = Rollouts(few_differ, rounds=5)
    sampled = maker.rollout()
    assert not uniform(sampled)
    assert_whole(sampled)
    first = Counter({100 + i: RESPONSES for i in maker.source.schedule.indices(0)})
    assert maker.calls[0] == first
    assert {g for g in first if g % 3 == 0} <= set(sampled.groups.tolist()), "those with two scores stay"


def test_each_round_draws_as_many_as_are_to_be_replaced() -> None:
    maker = Rollouts(few_differ, rounds=5)
    maker.rollout()
    left = sum(group % 3 > 0 for group in maker.calls[0])
    for call in maker.calls[1:]:
        assert len(call) == left
        left -= sum(group % 3 == 0 for group in call)
    assert left == 0 and len(maker.calls) > 2, "one round would say little"


def test_the_rounds_are_bounded() -> None:
    maker = Rollouts(lambda index, sample: 1.0, rounds=2, prompts=100)
    sampled = maker.rollout()
    assert len(maker.calls) == 3
    assert Counter(sampled.groups.tolist()) == maker.calls[0], "a prompt that does no better takes no place"


def test_no_prompt_is_drawn_twice_nor_again() -> None:
    maker = Rollouts(lambda index, sample: 1.0, rounds=10)
    maker.rollout()
    drawn = [index for call in maker.calls for index in call]
    assert sorted(drawn) == [100 + i for i in range(PROMPTS)], "all of them, each once"
    assert len(maker.calls) == 1 + 3, "6, 6 and 2 others, and then there are none left"


def test_where_fewer_are_left_than_needed_these_are_drawn() -> None:
    maker = Rollouts(lambda index, sample: float(sample) if index >= 106 else 1.0, rounds=1, prompts=8)
    sampled = maker.rollout()
    assert len(maker.calls[1]) == 2
    assert_whole(sampled)
    assert {106, 107} <= set(sampled.groups.tolist()) and len(uniform(sampled)) == PER_ROLLOUT - 2


def test_where_none_are_left_nothing_is_drawn() -> None:
    maker = Rollouts(lambda index, sample: 1.0, rounds=3, prompts=PER_ROLLOUT)
    maker.rollout()
    assert len(maker.calls) == 1


def test_a_prompt_that_is_there_twice_is_left_alone() -> None:
    """A rollout across two epochs: its four responses are no group of two."""
    maker = Rollouts(lambda index, sample: 1.0, rounds=1, prompts=8)
    twice = next(r for r in range(20) if len(set(maker.source.schedule.indices(r))) < PER_ROLLOUT)
    sampled = maker.rollout(twice)
    counts = Counter(100 + i for i in maker.source.schedule.indices(twice))
    assert len(maker.calls[1]) == min(sum(n == 1 for n in counts.values()), 8 - len(counts))
    assert Counter(sampled.groups.tolist()) == Counter({group: RESPONSES * n for group, n in counts.items()})


def test_dropped_responses_make_no_difference_between_scores() -> None:
    """A group with one score beside a dropped response, whose total of 0 is no score, is uniform; so is one without."""
    first = {i: n for n, i in enumerate(PromptSchedule(PROMPTS, PER_ROLLOUT, 0).indices(0))}

    def score(index: int, sample: int) -> float | None:
        place = first.get(index - 100)
        if place == 0:
            return 1.0 if sample else None
        return None if place == 1 else float(sample)

    maker = Rollouts(score, rounds=1)
    sampled = maker.rollout()
    gone = {100 + i for i, place in first.items() if place < 2}
    assert len(maker.calls[1]) == 2 and not gone & set(sampled.groups.tolist())
    assert sampled.kept.all() and sampled.failures == {"r": 3}, "what failed is still counted"
    assert_whole(sampled)


def one_is_uniform(index: int, sample: int) -> float:
    """The first prompt of the first rollout has one score."""
    return 1.0 if index == 100 + PromptSchedule(PROMPTS, PER_ROLLOUT, 0).indices(0)[0] else float(sample)


@pytest.mark.parametrize("score", [few_differ, one_is_uniform])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_number_of_ranks_changes_nothing(monkeypatch: pytest.MonkeyPatch, ranks: int, score: Score) -> None:
    """Some prompts get responses that are left out again, for equal shares; also where there are fewer than ranks."""
    alone, several = Rollouts(score, rounds=5), Rollouts(score, rounds=5)
    expected = alone.rollout()
    monkeypatch.setattr(experience, "world_size", lambda: ranks)
    found = several.rollout()
    assert found.responses == expected.responses and torch.equal(found.raw_scores, expected.raw_scores)
    assert [set(call) for call in several.calls] == [set(call) for call in alone.calls]
    assert several.source.mean_scores.state == alone.source.mean_scores.state
    assert any(max(call.values()) > RESPONSES for call in several.calls), "no share had to be filled"


def test_what_was_replaced_is_remembered() -> None:
    """A curriculum must know that the prompt was too easy or too hard."""
    maker = Rollouts(few_differ, rounds=5)
    maker.rollout()
    seen = {str(index) for call in maker.calls[1:] for index in call}
    expected = {i: 1.0 if int(i) % 3 else 0.5 for i in seen}
    assert seen and {i: maker.source.mean_scores.state.get(i) for i in seen} == expected
