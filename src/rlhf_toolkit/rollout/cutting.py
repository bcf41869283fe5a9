"""How a rollout is cut: into mini-batches, among ranks, into forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_toolkit.data.layout import Layout, packed_layout, padded_layout
from rlhf_toolkit.data.packing import Rows, mini_batches, packed_micro_batches, padded_micro_batches
from rlhf_toolkit.data.segments import Tokens
from rlhf_toolkit.distributed.collectives import world_size
from rlhf_toolkit.rollout.sampled import Sampled
from rlhf_toolkit.types import RolloutTokens


@dataclass(frozen=True)
class Plan:
    """How one pass over a rollout is cut: ``batches[mini-batch][rank][micro-batch]`` to row numbers."""

    batches: list[list[list[Rows]]]

    def of_rank(self, number: int) -> list[list[Rows]]:
        """``[mini-batch][micro-batch]`` of one rank."""
        return [batch[number] for batch in self.batches]

    @property
    def first(self) -> Plan:
        """The first micro-batch of every rank alone."""
        return Plan([[share[:1] for share in self.batches[0]]])

    @property
    def most_rows(self) -> int:
        """Rows of the largest micro-batch on any rank."""
        return max((len(rows) for batch in self.batches for share in batch for rows in share), default=0)

    @property
    def one_forward(self) -> bool:
        """Whether each rank runs a single micro-batch."""
        return all(len(share) == 1 for batch in self.batches for share in batch) and len(self.batches) == 1


@dataclass(frozen=True)
class Cutting:
    """How a rollout is cut into optimizer steps and forward passes. ``role_tokens``: the most tokens of one role in a
    forward pass; ``seed``: from which every pass's mini-batches are drawn."""

    mini_batches: int
    role_tokens: int
    packing: bool = False
    seed: int = 0

    def halved(self) -> Cutting:
        """The same with half as many tokens in a forward pass: results do not depend on it."""
        return replace(self, role_tokens=max(1, self.role_tokens // 2))

    @property
    def layout(self) -> Layout:
        """Sequences (n, T) and both lengths (n,) to the layout of a forward pass."""
        return packed_layout if self.packing else padded_layout

    def plan(self, rows: Sampled | RolloutTokens, rollout: int, *, epoch: int) -> Plan:
        """How pass number ``epoch`` over rollout number ``rollout`` is cut. The role pass has the plan of epoch 0."""
        parts = mini_batches(len(rows), self.mini_batches, seed=self.seed, rollout=rollout, epoch=epoch)
        return Plan([self.among_ranks(part, rows) for part in parts])

    def in_order(self, sampled: Sampled) -> Plan:
        """One pass over rows in their own order, on which nothing is trained."""
        return Plan([self.among_ranks(range(len(sampled)), sampled)])

    def among_ranks(self, rows: Sequence[int], sampled: Sampled | RolloutTokens) -> list[list[Rows]]:
        """``[rank][micro-batch]`` to row numbers, for a mini-batch of ``rows``."""
        cut = {"ranks": world_size(), "budget": self.role_tokens}
        lengths = sampled.lengths()
        if not self.packing:
            return padded_micro_batches(rows, lengths, **cut)
        chosen, prompts = list(rows), list[Tokens]([()]) * len(lengths)  # a rollout's other prompts take time to copy
        widths = sampled.prompt_lengths[chosen].tolist()
        tokens = sampled.sequences[chosen, : max(widths)].tolist()
        for row, line, width in zip(chosen, tokens, widths, strict=True):
            prompts[row] = tuple(line[:width])
        return packed_micro_batches(rows, lengths, prompts, **cut)
