"""How the rows of a rollout are cut: into mini-batches, among ranks, into micro-batches of bounded size.

Every function here is a pure function of lengths and names, so all ranks make the same plan without talking. The same
plan serves scoring and the first pass of the update: equal shapes are what makes the first ratio exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_toolkit.seeding import derived_generator

Rows = list[int]


def mini_batches(rows: int, count: int, *, seed: int, rollout: int, epoch: int) -> list[Rows]:
    """``count`` equal shares of a permutation of ``rows`` that is derived from (seed, rollout, epoch)."""
    order = torch.randperm(rows, generator=derived_generator(seed, "mini-batches", rollout, epoch)).tolist()
    size = rows // count
    return [order[i * size : (i + 1) * size] for i in range(count)]


def micro_batches(rows: Sequence[int], lengths: Sequence[int], *, ranks: int, budget: int) -> list[list[Rows]]:
    """Cut a mini-batch for each rank into the same number of micro-batches, ``[rank][micro-batch]`` to row numbers.

    ``lengths[row]`` are tokens; ``budget`` bounds rows x longest row of a micro-batch. Ranks get equally many rows,
    dealt by length in snake order so that their tokens balance; rows of similar length sit together so that little is
    padding.
    """
    shares = _deal(rows, lengths, ranks)
    cut = [_fill(share, lengths, budget) for share in shares]
    count = max(map(len, cut))
    return [_split_to(batches, count) for batches in cut]


def _deal(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[Rows]:
    """Longest first: to ranks 0, 1, ..., then back, and so on. Ties go by row number, so that the deal is unique."""
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    shares: list[Rows] = [[] for _ in range(ranks)]
    for i, row in enumerate(ordered):
        turn, place = divmod(i, ranks)
        shares[place if turn % 2 == 0 else ranks - 1 - place].append(row)
    return shares


def _fill(share: Rows, lengths: Sequence[int], budget: int) -> list[Rows]:
    """Rows, longest first, into batches whose first row sets the width."""
    batches: list[Rows] = []
    for row in share:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def _split_to(batches: list[Rows], count: int) -> list[Rows]:
    """Halve the largest batch until there are ``count``. Where ranks have equally many rows that is always possible."""
    batches = [list(batch) for batch in batches]
    while len(batches) < count and max(map(len, batches)) > 1:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        batch = batches[largest]
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches
