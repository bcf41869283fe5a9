"""RolloutLoader: what Trainer sees as the train dataloader.

PPO is a data source, not a loop: iterating the loader collects a rollout when the last one's experience is used up,
then yields mini-batches. Trainer's own loop stays as it is, with its callbacks, schedulers and checkpoints. The loader
must never go through ``accelerator.prepare``: its look-ahead of one batch would collect the next rollout before the
last update of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rlhf_toolkit.algorithms.masking import centre_and_scale
from rlhf_toolkit.data.packing import Rows
from rlhf_toolkit.distributed.collectives import rank
from rlhf_toolkit.rollout.experience import Collected, ExperienceMaker
from rlhf_toolkit.seeding import derived_generator
from rlhf_toolkit.types import Experience, RolloutTokens

MiniBatch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """How many rollouts a run has, and how many updates a rollout: ``epochs`` passes of ``mini_batches`` each."""

    rollouts: int
    epochs: int
    mini_batches: int

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps on each rollout."""
        return self.epochs * self.mini_batches

    def rollout_of(self, step: int) -> int:
        """The number of the rollout on which optimizer step number ``step``, from 0, is made."""
        return step // self.updates_per_rollout


@dataclass(frozen=True)
class OverMiniBatch:
    """What needs all rows of a mini-batch, of all ranks: whitening over it, and the tokens that a loss selects.

    ``select(logprobs=..., advantages=..., mask=..., generator=...)`` gives (n, R) bool; the log-probs are the old ones,
    which every rank has before the update, so that the choice does not depend on how the mini-batch is cut.
    """

    whiten: bool = False
    select: Callable[..., torch.Tensor] | None = None
    seed: int = 0

    @property
    def anything(self) -> bool:
        """Whether there is something to do."""
        return self.whiten or self.select is not None

    def columns(self, experience: Experience, rows: Rows, stream: Sequence[int]) -> dict[str, torch.Tensor]:
        """Columns for ``rows`` that replace or join those of the experience; ``stream`` names the mini-batch."""
        ordered = sorted(rows)  # what is drawn must not depend on how ranks share the rows
        mask, advantages = experience.response_mask[ordered], experience.advantages[ordered]
        columns = {}
        if self.whiten:
            columns["advantages"] = advantages = centre_and_scale(advantages, mask)
        if self.select is not None:
            assert experience.old_logprobs is not None, "Needs.old_logprobs has the policy run before such a loss"
            columns["selected"] = self.select(
                logprobs=experience.old_logprobs[ordered],
                advantages=advantages,
                mask=mask,
                generator=derived_generator(self.seed, "selected", *stream),
            )
        place = [ordered.index(row) for row in rows]
        return {name: column[place] for name, column in columns.items()}


class RolloutLoader:
    """Yields this rank's share of each mini-batch as a plain dict of tensors.

    Besides the fields of ``Experience`` it holds ``row`` (n,), the rows' numbers in the rollout, ``micro_batch`` (n,),
    the number of the micro-batch each row belongs to, and ``token_count`` and ``sequence_count`` of the whole
    mini-batch over all ranks, which losses are divided by; ``fresh`` is True when no update has happened since the
    rollout. Where the experience is deferred, the fields are those of ``RolloutTokens``.

    Args:
        maker: makes each rollout's experience.
        model: gives the engine, which exists only once training has begun.
        steps_done: tells the optimizer steps taken before this pass began: 0, or those of the checkpoint resumed from.
    """

    newest: Collected
    """The rollout whose mini-batches come out now: nothing, not even the attribute, before the first."""

    def __init__(
        self,
        maker: ExperienceMaker,
        schedule: Schedule,
        *,
        model: Callable[[], nn.Module],
        steps_done: Callable[[], int],
        over_mini_batch: OverMiniBatch = OverMiniBatch(),
    ) -> None:
        self.maker, self.schedule, self.model = maker, schedule, model
        self.steps_done, self.over_mini_batch = steps_done, over_mini_batch
        self._number: int | None = None  # of the rollout that ``newest`` is

    def __len__(self) -> int:
        """Optimizer steps in the run."""
        return self.schedule.rollouts * self.schedule.updates_per_rollout

    def __iter__(self) -> Iterator[MiniBatch]:
        step = self.steps_done()
        for rollout in range(self.schedule.rollout_of(step), self.schedule.rollouts):
            if self._number != rollout:
                self.newest, self._number = self.maker.collect(self.model(), rollout), rollout
            tokens, done = self.newest.tokens, step - rollout * self.schedule.updates_per_rollout
            for epoch in range(self.schedule.epochs):
                plan = self.maker.scored_sampler.cutting.plan(tokens, rollout, epoch=epoch)
                for number, shares in enumerate(plan.batches):
                    if epoch * self.schedule.mini_batches + number < done:
                        continue  # a resumed run has made this update
                    columns = {}
                    if self.over_mini_batch.anything:
                        everyone = [row for share in shares for rows in share for row in rows]
                        stream = (rollout, epoch, number)
                        columns = self.over_mini_batch.columns(self.newest.experience, everyone, stream)
                    yield share_of_mini_batch(tokens, shares, rank(), fresh=epoch == number == 0, columns=columns)

    def under_way(self, step: int) -> Collected | None:
        """The rollout that optimizer step number ``step`` is made on, where it has been collected and its experience
        does not wait for that very step."""
        if self._number != self.schedule.rollout_of(step):
            return None
        return None if self.newest.deferred is not None else self.newest

    def go_on_with(self, collected: Collected, rollout: int) -> None:
        """Take ``collected`` for rollout number ``rollout``, which is then not collected again."""
        self.newest, self._number = collected, rollout


def share_of_mini_batch(
    tokens: RolloutTokens,
    shares: list[list[Rows]],
    number: int,
    *,
    fresh: bool,
    columns: Mapping[str, torch.Tensor] | None = None,
) -> MiniBatch:
    """Rank ``number``'s rows of a mini-batch. ``fresh``: no update has happened since the rollout, so ratios must be
    1. ``columns`` are further ones, with a row for each of the mini-batch in the order of ``shares``."""
    everyone = [row for share in shares for rows in share for row in rows]
    mask = tokens.response_mask[everyone]
    mine = shares[number]
    numbers = [row for rows in mine for row in rows]
    first = sum(len(rows) for share in shares[:number] for rows in share)
    return {
        **tokens.rows(numbers),
        **{name: column[first : first + len(numbers)] for name, column in (columns or {}).items()},
        "row": torch.tensor(numbers),
        "micro_batch": torch.tensor([i for i, rows in enumerate(mine) for _ in rows]),
        "token_count": mask.sum().clamp(min=1),
        "sequence_count": mask.any(1).sum().clamp(min=1),
        "fresh": torch.tensor(fresh),
    }
