"""The only place that calls backward and DeepSpeed's step. The engine is told here which micro-batch is the last of an
optimizer step, and an update whose numbers are not finite ends here, on all ranks together, before the optimizer has
moved anything."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from rlhf_toolkit.distributed.collectives import world_size


def backward(model: nn.Module, loss: torch.Tensor, *, last: bool) -> None:
    """Accumulate the gradient of ``loss``, this rank's share of a sum over all ranks and micro-batches.

    DeepSpeed divides gradients by the number of ranks; multiplying the loss first makes the result the plain sum.
    ``last``: the optimizer steps next (``step``).
    """
    # The factor is 1, or NaN where the loss is not finite: an infinite loss may have finite gradients, and the norm,
    # which is of all ranks, then tells the others. Nothing is read back, and no collective is added.
    sound = 1 + 0 * loss.detach()
    if isinstance(model, DeepSpeedEngine):
        model.set_gradient_accumulation_boundary(last)
        model.backward(loss * (world_size() * sound), scale_wrt_gas=False)
    else:
        (loss * sound).backward()


def step(model: nn.Module) -> bool:
    """Have the engine clip, step the optimizer and clear the gradients; without DeepSpeed that is left to Trainer.

    Returns whether the update goes on: False where a loss or the norm of the gradient is not finite on any rank. Then
    the gradients are gone, and neither a parameter nor a moment of the optimizer has changed.
    """
    if isinstance(model, DeepSpeedEngine):
        model.step()  # which is none of a norm that is not finite
        applied = bool(model.was_step_applied())
        model.optimizer.overflow = False  # else Trainer would hold the schedule, in updates that do nothing as well
        return applied
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
        return True
    for parameter in model.parameters():  # so that the optimizer finds none
        parameter.grad = None
    return False
