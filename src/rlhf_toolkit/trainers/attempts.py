"""The micro-batches of an update, on all ranks together: what one rank fails with ends the attempt on all of them.

Losses are divided by counts of the whole mini-batch, so an update does not depend on how it is cut: where memory runs
out, trainers make it again in smaller micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from rlhf_toolkit.distributed.attempt import together
from rlhf_toolkit.distributed.engine import backward

B = TypeVar("B")
PHASE = "the update"


def accumulate(
    model: nn.Module, parts: Sequence[B], loss_of: Callable[[B, bool], Tensor], least: Callable[[B], B]
) -> list[Tensor]:
    """Forward and backward of micro-batches; their losses, by ``loss_of(part, first)``. A collective.

    ``least(part)`` has a loss through the same layers and exchanges of as little as possible. What one rank fails with,
    all raise, and the engine is as it was before, without gradients: OutOfMemoryError where memory ran out and nothing
    else happened, StopAskedError where a rank was asked to stop before the last of them.
    """

    def run(part: B, number: int) -> Tensor:
        loss = loss_of(part, number == 0)
        backward(model, loss, last=number == len(parts) - 1)
        return loss.detach()

    losses = list[Tensor]()
    for number, part in enumerate(parts):
        last = number == len(parts) - 1  # then the step is made, and a stop is one after it
        idle = partial(lambda part, number: run(least(part), number), part, number)
        losses.append(together(model, partial(run, part, number), idle, PHASE, may_stop=not last))
    return losses
