"""What a mini-batch is made of: its rows, its counts, and what is whitened or chosen over all of it."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import torch

from rlhf_toolkit.rollout import loader
from rlhf_toolkit.rollout.cutting import Plan
from rlhf_toolkit.rollout.experience import Collected
from rlhf_toolkit.rollout.loader import OverMiniBatch, RolloutLoader, Schedule, share_of_mini_batch
from rlhf_toolkit.trainers.mini_batches import cut
from rlhf_toolkit.types import Experience
from tests.support.batches import noise
from tests.support.values import there

LENGTHS = torch.tensor([3, 1, 4, 2, 4, 0, 3, 2])  # of what is trained on; row 5 is a response that was left out
SHARES = [[[6, 2], [0]], [[5, 3], [1]]]
"""[rank][micro-batch] to rows: a mini-batch of six rows of eight."""
EVERYONE = [6, 2, 0, 5, 3, 1]


def rollout() -> Experience:
    """Eight rows of random numbers."""
    mask = torch.arange(4) < LENGTHS[:, None]
    columns = {
        name: noise(8, 4, seed=seed) for seed, name in enumerate(("old_logprobs", "advantages", "returns", "values"))
    }
    return Experience(
        sequences=torch.arange(48).view(8, 6),
        prompt_lengths=torch.full((8,), 2),
        response_lengths=LENGTHS.clamp(min=1),
        token_mask=torch.ones(8, 4, dtype=torch.bool),
        response_mask=mask,
        rollout_logprobs=noise(8, 4, seed=9),
        **columns,
    )


def random_choice(*, logprobs: torch.Tensor, mask: torch.Tensor, generator: torch.Generator, **_: Any) -> torch.Tensor:
    """A selector whose choice depends on the order of the rows it is given."""
    return mask & (torch.rand(logprobs.shape, generator=generator) < 0.5)


def test_a_share_holds_its_own_rows_and_the_counts_of_all() -> None:
    experience = rollout()
    for number, rows in enumerate(([6, 2, 0], [5, 3, 1])):
        share = share_of_mini_batch(experience, SHARES, number, fresh=True)
        assert share["row"].tolist() == rows and share["micro_batch"].tolist() == [0, 0, 1]
        assert torch.equal(share["returns"], there(experience.returns)[rows])
        assert (share["token_count"].item(), share["sequence_count"].item()) == (3 + 4 + 3 + 0 + 2 + 1, 5)


def test_columns_of_the_mini_batch_go_to_the_rows_they_are_of() -> None:
    experience = rollout()
    columns = {"selected": torch.tensor(EVERYONE)[:, None].expand(6, 4)}
    for number in (0, 1):
        share = share_of_mini_batch(experience, SHARES, number, fresh=True, columns=columns)
        assert torch.equal(share["selected"][:, 0], share["row"])
        parts = cut(share)
        assert torch.equal(torch.cat([part["row"] for part in parts]), share["row"])
        for part in parts:
            assert torch.equal(part["selected"][:, 0], part["row"])
            assert torch.equal(part["advantages"], there(experience.advantages)[part["row"]])


def test_whitening_is_over_the_tokens_of_the_mini_batch() -> None:
    experience = rollout()
    whitened = OverMiniBatch(whiten=True).columns(experience, EVERYONE, (0, 0, 0))["advantages"]
    tokens = [there(experience.advantages)[row, t].item() for row in EVERYONE for t in range(LENGTHS[row])]
    mean = sum(tokens) / len(tokens)
    deviation = (sum((each - mean) ** 2 for each in tokens) / (len(tokens) - 1) + 1e-8) ** 0.5
    for place, row in enumerate(EVERYONE):
        expected = (there(experience.advantages)[row, : LENGTHS[row]] - mean) / deviation
        torch.testing.assert_close(whitened[place, : LENGTHS[row]], expected)
        assert not whitened[place, LENGTHS[row] :].any()


def test_a_mini_batch_with_fewer_than_two_trained_tokens_has_nothing_to_whiten() -> None:
    """Truncated responses are masked, failed ones dropped: of a small mini-batch nothing may be left."""
    experience = rollout()
    for rows in ([5, 1], [5]):  # one token, none
        assert LENGTHS[rows].sum() < 2
        columns = OverMiniBatch(whiten=True).columns(experience, rows, (0, 0, 0))
        assert not columns["advantages"].any()
        shares = [[rows]]
        share = share_of_mini_batch(experience, shares, 0, fresh=True, columns=columns)
        assert share["token_count"].item() == share["sequence_count"].item() == 1, "what losses are divided by"


def test_a_choice_is_made_by_old_log_probs_and_whitened_advantages() -> None:
    """Those that the update will see, row by row."""
    experience = rollout()
    seen: dict[str, Any] = {}

    def select(*, mask: torch.Tensor, **given: Any) -> torch.Tensor:
        seen.update(given, mask=mask)
        return mask

    columns = OverMiniBatch(whiten=True, select=select).columns(experience, EVERYONE, (0, 0, 0))
    assert torch.equal(columns["selected"], experience.response_mask[EVERYONE])
    ordered = sorted(EVERYONE)
    assert torch.equal(seen["logprobs"], there(experience.old_logprobs)[ordered])
    assert torch.equal(seen["mask"], experience.response_mask[ordered])
    place = [EVERYONE.index(row) for row in ordered]
    assert torch.equal(seen["advantages"], columns["advantages"][place])


def test_what_is_chosen_does_not_depend_on_the_order_of_rows_but_on_the_mini_batch() -> None:
    chooser, experience = OverMiniBatch(select=random_choice, seed=3), rollout()
    chosen = dict(zip(EVERYONE, chooser.columns(experience, EVERYONE, (0, 0, 1))["selected"], strict=True))
    other = EVERYONE[::-1]
    for row, each in zip(other, chooser.columns(experience, other, (0, 0, 1))["selected"], strict=True):
        assert torch.equal(chosen[row], each)
    for stream in ((1, 0, 1), (0, 1, 1), (0, 0, 0)):
        again = torch.stack(list(chosen.values()))
        assert not torch.equal(chooser.columns(experience, EVERYONE, stream)["selected"], again)


def test_mini_batches_come_in_order_and_only_the_first_is_fresh(monkeypatch: Any) -> None:
    plans = {epoch: Plan([[[[0, 1]], [[2, 3]]], [[[4, 5]], [[6, 7]]]]) for epoch in (0, 1)}
    collected: list[int] = []
    maker, model = Mock(), Mock()

    def collect(given: Any, number: int) -> Collected:
        assert given is model
        collected.append(number)
        return Collected(rollout())

    maker.collect = collect
    maker.scored_sampler.cutting.plan = lambda experience, number, *, epoch: plans[epoch]
    monkeypatch.setattr(loader, "rank", lambda: 1)
    found = list(RolloutLoader(maker, Schedule(3, 2, 2), model=lambda: model, steps_done=lambda: 4))
    assert collected == [1, 2], "one rollout of four steps has been done"
    assert [batch["row"].tolist() for batch in found] == [[2, 3], [6, 7]] * 4
    assert [batch["fresh"].item() for batch in found] == [True, False, False, False] * 2
