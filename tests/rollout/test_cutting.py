"""How a rollout is cut: every row once in each pass over it, each pass in another order, the same on every rank."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_toolkit.data.layout import packed_layout, padded_layout
from rlhf_toolkit.data.packing import mini_batches
from rlhf_toolkit.data.segments import share_prefixes
from rlhf_toolkit.rollout import cutting, loader
from rlhf_toolkit.rollout.cutting import Cutting, Plan
from rlhf_toolkit.rollout.experience import Collected
from rlhf_toolkit.rollout.loader import RolloutLoader, Schedule
from rlhf_toolkit.types import Experience

ROWS, GROUP = 24, 3
ROLLOUTS, EPOCHS, MINI_BATCHES = 2, 3, 4


def rollout() -> Experience:
    """Eight prompts of different lengths, which begin alike, with three responses each."""
    draw = random.Random(5)
    prompts = [(50, 51, 52, *range(60 + i, 61 + i + i % 4)) for i in range(ROWS // GROUP) for _ in range(GROUP)]
    responses = [draw.randint(1, 6) for _ in range(ROWS)]
    sequences = torch.full((ROWS, max(map(len, prompts)) + 6), 99)
    for row, (prompt, length) in enumerate(zip(prompts, responses, strict=True)):
        sequences[row, : len(prompt) + length] = torch.tensor([*prompt, *range(length)])
    lengths = torch.tensor(responses)
    mask = torch.arange(6) < lengths[:, None]
    zeros = torch.zeros(ROWS, 6)
    return Experience(
        sequences=sequences,
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        response_lengths=lengths,
        token_mask=mask,
        response_mask=mask,
        rollout_logprobs=zeros,
        **{name: zeros for name in ("old_logprobs", "advantages", "returns", "values")},
    )


def rows_of(plan: list[list[list[int]]]) -> list[int]:
    return [row for share in plan for batch in share for row in batch]


# ---- a pass over the rollout -----------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cutting, "world_size", lambda: request.param)
    return int(request.param)


@pytest.mark.parametrize("packing", [False, True])
def test_ranks_share_a_mini_batch_within_the_budget(ranks: int, packing: bool) -> None:
    experience, rows = rollout(), [*range(2, 20)]
    cut = Cutting(1, role_tokens=40, packing=packing).among_ranks(rows, experience)
    assert len(cut) == ranks and sorted(rows_of(cut)) == rows
    assert len({len(share) for share in cut}) == 1, "as many forward passes on each rank"
    for batch in (batch for share in cut for batch in share):
        assert tokens(experience, batch, packing) <= 40
    joined = [[*first, *second] for share in cut for first, second in pairwise(share)]
    assert all(tokens(experience, both, packing) > 40 for both in joined) or ranks > 1, "no more passes than needed"


def tokens(experience: Experience, batch: list[int], packing: bool) -> int:
    """What a forward pass over these rows costs, counted from the sequences themselves."""
    lengths = [experience.lengths()[row] for row in batch]
    if not packing:
        return len(batch) * max(lengths)
    widths = experience.prompt_lengths.tolist()
    prompts = [tuple(experience.sequences[row, : widths[row]].tolist()) for row in batch]
    return share_prefixes(prompts, lengths).tokens


def test_packed_rows_of_one_prompt_stay_together() -> None:
    """Which they can only where each row's prompt is its own: without the padding, and of the right row."""
    order = random.Random(1).sample(range(ROWS), ROWS)
    (share,) = Cutting(1, role_tokens=10**6, packing=True).among_ranks(order, rollout())
    assert [row // GROUP for row in share[0]] == [group for group in order_of(share[0]) for _ in range(GROUP)]


def order_of(rows: list[int]) -> list[int]:
    return list(dict.fromkeys(row // GROUP for row in rows))


def test_the_layout_is_that_of_the_cut() -> None:
    assert Cutting(1, 10).layout is padded_layout and Cutting(1, 10, packing=True).layout is packed_layout


# ---- plans -----------------------------------------------------------------------------------------------------------

PLAN = Plan([[[[0], [1, 2]], [[3, 4], [5]]], [[[6, 7]], [[8, 9]]]])
"""Two mini-batches on two ranks."""


def test_a_rank_has_its_own_share_of_each_mini_batch() -> None:
    assert PLAN.of_rank(0) == [[[0], [1, 2]], [[6, 7]]]
    assert PLAN.of_rank(1) == [[[3, 4], [5]], [[8, 9]]]


def test_the_first_micro_batch_is_that_of_the_first_mini_batch_on_every_rank() -> None:
    assert PLAN.first == Plan([[[[0]], [[3, 4]]]])
    assert PLAN.first.one_forward


def test_one_forward_is_one_micro_batch_on_each_rank_and_nothing_else() -> None:
    assert Plan([[[[0, 1]], [[2]]]]).one_forward
    assert not Plan([[[[0], [1]], [[2], [3]]]]).one_forward, "two micro-batches"
    assert not Plan([[[[0]]], [[[1]]]]).one_forward, "two mini-batches"
    assert not Plan([[[[0]], [[1], [2]]]]).one_forward, "two on one of the ranks"


# ---- passes of a run -------------------------------------------------------------------------------------------------


def trained_rows(monkeypatch: pytest.MonkeyPatch, *, seed: int = 0) -> dict[tuple[int, int], list[list[int]]]:
    """The rows of each mini-batch that the loader gives to two ranks, by rollout and epoch."""
    found: dict[tuple[int, int], list[list[int]]] = {}
    monkeypatch.setattr(cutting, "world_size", lambda: 2)
    scored_sampler = SimpleNamespace(cutting=Cutting(MINI_BATCHES, 40, seed=seed))
    maker: Any = SimpleNamespace(collect=lambda model, number: Collected(rollout()), scored_sampler=scored_sampler)
    schedule, given = Schedule(ROLLOUTS, EPOCHS, MINI_BATCHES), []
    for number in range(2):
        monkeypatch.setattr(loader, "rank", lambda number=number: number)
        batches = RolloutLoader(maker, schedule, model=nn.Identity, steps_done=lambda: 0)
        given.append([batch["row"].tolist() for batch in batches])
    for step, shares in enumerate(zip(*given, strict=True)):
        place = divmod(step // MINI_BATCHES, EPOCHS)
        found.setdefault(place, []).append(sorted(row for share in shares for row in share))
    return found


def test_every_epoch_trains_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained_rows(monkeypatch)
    assert len(found) == ROLLOUTS * EPOCHS
    for batches in found.values():
        assert [len(batch) for batch in batches] == [ROWS // MINI_BATCHES] * MINI_BATCHES
        assert sorted(row for batch in batches for row in batch) == [*range(ROWS)]


def test_no_two_epochs_are_cut_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rollout, of different rollouts, and with another seed."""
    cuts = [*trained_rows(monkeypatch).values(), *trained_rows(monkeypatch, seed=1).values()]
    sets = [{frozenset(batch) for batch in batches} for batches in cuts]
    assert not [pair for i, first in enumerate(sets) for pair in sets[:i] if first & pair], "a mini-batch comes again"


def test_a_run_is_cut_alike_when_it_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained_rows(monkeypatch) == trained_rows(monkeypatch)


def test_the_first_epoch_is_cut_like_the_role_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal shapes are what makes the first ratio exactly 1."""
    plan = Cutting(MINI_BATCHES, 40).plan(rollout(), 1, epoch=0)
    assert [sorted(rows_of(batch)) for batch in plan.batches] == trained_rows(monkeypatch)[1, 0]


def test_rows_meet_other_rows_in_each_epoch() -> None:
    """Over many epochs two rows share a mini-batch as often as chance has it."""
    epochs, together = 400, torch.zeros(8, 8)
    for epoch in range(epochs):
        for part in mini_batches(8, 2, seed=3, rollout=0, epoch=epoch):
            together[torch.tensor(part)[:, None], torch.tensor(part)] += 1
    shares = together[~torch.eye(8, dtype=torch.bool)] / epochs
    expected = 3 / 7
    assert (shares - expected).abs().max() < 5 * (expected * (1 - expected) / epochs) ** 0.5
