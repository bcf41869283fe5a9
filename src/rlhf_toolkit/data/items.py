"""Examples and pairs as rows of a forward pass: what supervised trainers cut into mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from rlhf_toolkit.data.packing import group_micro_batches
from rlhf_toolkit.data.prompts import PromptSchedule

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One sequence: its tokens, how many of them are the prompt, and which of the others get a loss."""

    token_ids: tuple[int, ...]
    prompt_length: int
    trained: tuple[bool, ...]


@dataclass(frozen=True)
class Item:
    """The rows that stay together: one for an example, chosen and rejected for a pair, which also has a ``margin``."""

    rows: tuple[Row, ...]
    margin: float = 0.0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.token_ids) for row in self.rows]


@dataclass(frozen=True)
class Cut:
    """How items are cut into mini-batches, among ranks and into micro-batches of ``tokens``."""

    batch_size: int
    tokens: int
    padded: bool
    ranks: int

    def halved(self) -> Cut:
        """The same with half as many tokens in a micro-batch: results do not depend on it."""
        return replace(self, tokens=max(1, self.tokens // 2))

    def among_ranks(self, chosen: Sequence[int], items: Sequence[Item]) -> list[list[list[int]]]:
        """Cut the items ``chosen`` for each rank: ``[rank][micro-batch]`` to item numbers."""
        lengths = [items[i].lengths for i in chosen]
        cut = group_micro_batches(range(len(chosen)), lengths, ranks=self.ranks, budget=self.tokens, padded=self.padded)
        return [[[chosen[place] for place in batch] for batch in share] for share in cut]


class ItemLoader:
    """What Trainer sees as the train dataloader: this rank's share of each mini-batch, as a list of micro-batches.

    Step k's items are a function of (seed, k): one permutation of all items after another, cut into blocks of
    ``cut.batch_size``, so that every item is seen equally often and a resumed run goes on where it was.
    """

    def __init__(
        self,
        items: Sequence[Item],
        cut: Cut,
        *,
        steps: int,
        seed: int,
        rank: int,
        pad_id: int,
        steps_done: Callable[[], int],
    ) -> None:
        self.items, self.cut, self.steps, self.rank, self.pad_id = items, cut, steps, rank, pad_id
        self.schedule = PromptSchedule(len(items), min(cut.batch_size, len(items)), seed)
        self.steps_done = steps_done

    def __len__(self) -> int:
        """Optimizer steps in the run."""
        return self.steps

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in range(self.steps_done(), self.steps):
            yield self.parts(step)

    def parts(self, step: int) -> list[Batch]:
        """This rank's micro-batches of step number ``step``."""
        chosen = self.schedule.indices(step)
        counts = counts_of([self.items[i] for i in chosen])
        mine = self.cut.among_ranks(chosen, self.items)[self.rank]
        return [batch_of([self.items[i] for i in part], counts, pad_id=self.pad_id) for part in mine]


def counts_of(items: Sequence[Item]) -> dict[str, int]:
    """What a mini-batch's losses are divided by: its trained tokens and its items, over all ranks."""
    return {"token_count": max(1, sum(sum(row.trained) for item in items for row in item.rows)), "items": len(items)}


def batch_of(items: Sequence[Item], counts: dict[str, int], *, pad_id: int) -> Batch:
    """A micro-batch as tensors: ``sequences`` (n, T) right-padded, ``prompt_lengths`` and ``response_lengths`` (n,),
    ``trained`` (n, R) bool, ``margins`` (items,), and the ``counts`` of the whole mini-batch.

    An empty one holds a row of a prompt token and a response token that no loss sees, so that every rank has a
    gradient, of zeros, for every parameter.
    """
    rows = [row for item in items for row in item.rows] or [Row((pad_id, pad_id), 1, (False,))]
    width, longest = max(len(row.token_ids) for row in rows), max(len(row.trained) for row in rows)
    return {
        "sequences": torch.tensor([[*row.token_ids, *[pad_id] * (width - len(row.token_ids))] for row in rows]),
        "prompt_lengths": torch.tensor([row.prompt_length for row in rows]),
        "response_lengths": torch.tensor([len(row.trained) for row in rows]),
        "trained": torch.tensor([[*row.trained, *[False] * (longest - len(row.trained))] for row in rows]),
        "margins": torch.tensor([item.margin for item in items], dtype=torch.float32),
        **{name: torch.tensor(count) for name, count in counts.items()},
    }
