"""How the rows of a rollout are cut: into mini-batches, among ranks, into micro-batches of bounded size.

Every function here is a pure function of lengths, prompts and names, so all ranks make the same plan without talking.
The role pass and the first pass of the update have the same plan: equal shapes are what makes the first ratio exactly
1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_toolkit.data.segments import GrowingRow, Tokens
from rlhf_toolkit.seeding import derived_generator

Rows = list[int]


def mini_batches(rows: int, count: int, *, seed: int, rollout: int, epoch: int) -> list[Rows]:
    """Cut a permutation of ``rows``, which is derived from (seed, rollout, epoch), into ``count`` equal shares."""
    order = torch.randperm(rows, generator=derived_generator(seed, "mini-batches", rollout, epoch)).tolist()
    size = rows // count
    return [order[i * size : (i + 1) * size] for i in range(count)]


def padded_micro_batches(rows: Sequence[int], lengths: Sequence[int], *, ranks: int, budget: int) -> list[list[Rows]]:
    """Cut a mini-batch for each rank into the same number of micro-batches, ``[rank][micro-batch]`` to row numbers.

    ``lengths[row]`` are tokens; ``budget`` bounds rows x longest row of a micro-batch. Ranks get equally many rows,
    dealt by length in snake order so that their tokens balance; rows of similar length sit together so that little is
    padding.
    """
    found: list[list[Rows]] = []
    for share in _deal(rows, lengths, ranks):
        batches: list[Rows] = []
        for row in share:  # longest first: a batch's first row sets its width
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
                batches.append([])
            batches[-1].append(row)
        found.append(batches)
    return _in_step(found)


def packed_micro_batches(
    rows: Sequence[int], lengths: Sequence[int], prompts: Sequence[Tokens], *, ranks: int, budget: int
) -> list[list[Rows]]:
    """Do the same for packed rows: ``budget`` bounds the tokens of a micro-batch once prefixes are shared.

    ``prompts[row]`` is a tuple of tokens. Ranks get equally many rows. Rows of one prompt go to one rank and one
    micro-batch where they fit, and prompts that begin alike sit together.
    """
    shares = _deal_by_prompt(rows, lengths, prompts, ranks)
    return _in_step([_fill_packed(share, lengths, prompts, budget) for share in shares])


def _deal(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[Rows]:
    """Deal rows, longest first, to ranks 0, 1, ..., then back, and so on. Ties go by row number: one deal results."""
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    shares: list[Rows] = [[] for _ in range(ranks)]
    for i, row in enumerate(ordered):
        turn, place = divmod(i, ranks)
        shares[place if turn % 2 == 0 else ranks - 1 - place].append(row)
    return shares


def _deal_by_prompt(rows: Sequence[int], lengths: Sequence[int], prompts: Sequence[Tokens], ranks: int) -> list[Rows]:
    """Deal rows to ranks, those of one prompt as a group: the costliest group first, to the rank with the fewest tokens
    so far. A group that would give a rank more than its share of rows goes on at the next. In a group rows come longest
    first; ties go by row number."""
    groups: dict[Tokens, Rows] = {}
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        groups.setdefault(prompts[row], []).append(row)
    room = [len(rows) // ranks + (number < len(rows) % ranks) for number in range(ranks)]
    shares: list[Rows] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for group in sorted(groups.values(), key=lambda group: (-_cost(group, lengths, prompts), group[0])):
        while group:
            number = min((n for n in range(ranks) if room[n]), key=lambda n: (room[n] < len(group), tokens[n], n))
            taken, group = group[: room[number]], group[room[number] :]
            shares[number] += taken
            room[number] -= len(taken)
            tokens[number] += _cost(taken, lengths, prompts)
    return shares


def _cost(group: Rows, lengths: Sequence[int], prompts: Sequence[Tokens]) -> int:
    """The tokens that rows with one prompt take together."""
    shared = len(prompts[group[0]])
    return shared + sum(lengths[row] - shared for row in group)


def _fill_packed(share: Rows, lengths: Sequence[int], prompts: Sequence[Tokens], budget: int) -> list[Rows]:
    """Put rows into batches in the order of their prompts' tokens, so that those that begin alike are neighbours."""
    batches, packed = list[Rows](), GrowingRow()
    for row in sorted(share, key=lambda row: (prompts[row], -lengths[row], row)):
        packed.add(prompts[row], lengths[row])
        if batches and packed.tokens <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            packed = GrowingRow()
            packed.add(prompts[row], lengths[row])
    return batches


def _in_step(shares: list[list[Rows]]) -> list[list[Rows]]:
    """Cut the share of each rank into as many batches as the rank has that needs most."""
    count = max(map(len, shares))
    return [_split_to(batches, count) for batches in shares]


def _split_to(batches: list[Rows], count: int) -> list[Rows]:
    """Halve the largest batch until there are ``count``. Where ranks have equally many rows that is always possible."""
    batches = [list(batch) for batch in batches]
    while len(batches) < count and max(map(len, batches)) > 1:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        batch = batches[largest]
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


def group_micro_batches(
    groups: Sequence[int], rows: Sequence[Sequence[int]], *, ranks: int, budget: int, padded: bool
) -> list[list[list[int]]]:
    """Cut ``groups`` for each rank into the same number of micro-batches, ``[rank][micro-batch]`` to group numbers.

    ``rows[group]`` are the lengths of a group's sequences, which stay together: the one of an example, the two of a
    pair. Ranks get equally many groups, or one more. ``budget`` bounds the tokens of a micro-batch; ``padded``: rows x
    longest row. A rank with fewer groups than micro-batches runs empty ones at the end.
    """

    def cost(batch: Sequence[int]) -> int:
        lengths = [length for group in batch for length in rows[group]]
        return len(lengths) * max(lengths) if padded else sum(lengths)

    shares = _deal(groups, [sum(lengths) for lengths in rows], ranks)
    cuts: list[list[list[int]]] = []
    for share in shares:
        batches: list[list[int]] = []
        for group in share:
            if batches and cost([*batches[-1], group]) <= budget:
                batches[-1].append(group)
            else:
                batches.append([group])
        cuts.append(batches)
    count = max(map(len, cuts))
    split = [_split_to(batches, count) for batches in cuts]
    return [batches + [[]] * (count - len(batches)) for batches in split]
