"""A mini-batch of PPO in micro-batches, and the least of one."""

from __future__ import annotations

from dataclasses import fields

import torch

from rlhf_toolkit.rollout.loader import MiniBatch
from rlhf_toolkit.types import Experience

COLUMNS = (*(field.name for field in fields(Experience)), "row", "selected")
COUNTS = ("token_count", "sequence_count", "fresh")


def least(part: MiniBatch) -> MiniBatch:
    """One row of a micro-batch with one token of its prompt and one of its response: what a rank runs that has run out
    of memory, as the partner of the others."""
    small = {name: column[:1, :1] if column.ndim == 2 else column[:1] for name, column in part.items() if column.ndim}
    one = torch.ones(1, dtype=part["prompt_lengths"].dtype)
    return {**part, **small, "sequences": part["sequences"][:1, :2], "prompt_lengths": one, "response_lengths": one}


def cut(mini_batch: MiniBatch) -> list[MiniBatch]:
    """A mini-batch's micro-batches; the counts of the whole go with every one."""
    number = mini_batch["micro_batch"]
    parts = []
    columns = [name for name in COLUMNS if name in mini_batch]
    for i in range(int(number.max()) + 1):
        part = {name: mini_batch[name][number == i] for name in columns}
        parts.append({**part, **{name: mini_batch[name] for name in COUNTS}})
    return parts
