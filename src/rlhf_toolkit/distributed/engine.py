"""The only place that calls backward. DeepSpeed's engine is told here which micro-batch ends an optimizer step."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from rlhf_toolkit.distributed.collectives import world_size


def backward(model: nn.Module, loss: torch.Tensor, *, last: bool) -> None:
    """Accumulate the gradient of ``loss``, this rank's share of a sum over all ranks and micro-batches.

    DeepSpeed divides gradients by the number of ranks; multiplying the loss first makes the result the plain sum. With
    ``last`` the engine also clips, steps the optimizer and clears the gradients; without DeepSpeed that is left to
    Trainer.
    """
    if isinstance(model, DeepSpeedEngine):
        model.set_gradient_accumulation_boundary(last)
        model.backward(loss * world_size(), scale_wrt_gas=False)
        if last:
            model.step()
    else:
        loss.backward()
