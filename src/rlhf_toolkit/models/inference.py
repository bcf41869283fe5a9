"""The model inside an engine, for forward passes that train nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from rlhf_toolkit.models.shared_base import SharedBase


def bare(model: nn.Module) -> SharedBase:
    """The SharedBase inside an engine, or the model itself."""
    return cast(SharedBase, getattr(model, "module", model))


@contextmanager
def inference(model: nn.Module) -> Iterator[SharedBase]:
    """The bare SharedBase of ``model`` in eval mode without autograd; the mode it had comes back afterwards."""
    shared = bare(model)
    was_training = shared.training
    shared.eval()
    try:
        with torch.no_grad():
            yield shared
    finally:
        shared.train(was_training)
