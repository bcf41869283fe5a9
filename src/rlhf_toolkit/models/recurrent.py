"""Models whose layers carry a state from token to token: gated delta nets, state spaces and what they are mixed with.

A prompt is padded on the left and masked, which is exact: a masked token adds nothing to a state that is zero. Training
rows are padded on the right, where nothing is read. Packed rows would carry one sequence's state into the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rlhf_toolkit.distributed.zero3 import share_parameters
from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.targets import weights_read

TESTED = frozenset(
    {
        *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid"),
        *("lara_mini", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "jamba", "zamba", "zamba2"),
        *("mamba", "mamba2", "falcon_mamba"),
    }
)
"""Kinds of models that the tests run in every role, against the model alone."""
UNFIT_STATES = {
    "minimax": "decodes with a cache of its own kind",
    "recurrent_gemma": "keeps its state in its layers, where each pass would go on from the last one's",
    "rwkv": "decodes with a state of its own kind",
    "xlstm": "decodes with a cache of its own kind",
}
TRIED = 1024  # tokens of the pass that a layer's memory is measured with: so many that the state itself is little


def keeps_state(base: PreTrainedModel) -> bool:
    """Whether the model has layers with a recurrent state."""
    return bool(getattr(base, "_is_stateful", False))


def refuse_state(base: PreTrainedModel) -> None:
    """Raise ModelError for a model with states that it cannot be given as slots, or that were not tested as such."""
    kind = base.config.model_type
    if kind in UNFIT_STATES:
        raise ModelError(f"{type(base).__name__} {UNFIT_STATES[kind]}; use another model")
    if keeps_state(base) and kind not in TESTED:
        raise ModelError(
            f"{type(base).__name__} keeps recurrent state, and is not among the architectures that were tested with "
            f"it: {', '.join(sorted(TESTED))}"
        )


def read_themselves(module: nn.Module) -> frozenset[str]:
    """Names of the children whose weights ``module``, a layer with a convolution, reads itself, always or where fused
    kernels run, without calling them: the convolution, and projections such as Mamba's ``dt_proj`` and ``out_proj``.
    Empty for every other module."""
    children = dict(module.named_children())
    convolutions = {name for name, child in children.items() if isinstance(child, nn.Conv1d)}
    kind: Any = type(module)
    return frozenset(convolutions | weights_read(kind) & children.keys() if convolutions else ())


def share_read_weights(base: PreTrainedModel) -> None:
    """Tell ZeRO-3 of the weights that a layer with a convolution reads without calling their owner."""
    for module in base.modules():
        for name in sorted(read_themselves(module)):
            share_parameters(module, getattr(module, name).parameters())


class LayerMemory(NamedTuple):
    """Bytes that the largest layer with a state takes for each token of a pass: at its peak without gradient, and kept
    for backward; and how many layers are of its kind."""

    scratch: int = 0
    kept: int = 0
    layers: int = 0


def layer_memory(base: PreTrainedModel) -> LayerMemory:
    """Measured on a copy without memory: no formula fits the scans of all families.

    Compiled kernels, which only a GPU has, raise at such tensors. They keep in registers what lies between their steps,
    so that their layers take no more than attention does, and zeros are returned.
    """
    names = [name for name, module in base.named_modules() if read_themselves(module)] if keeps_state(base) else []
    if not names:
        return LayerMemory()
    with torch.device("meta"):
        copy: Any = type(base)(base.config).eval().requires_grad_(False)
        copy.to(base.dtype)
        x = torch.zeros(1, TRIED, base.config.hidden_size, dtype=base.dtype)
    mixer = copy.get_submodule(names[0])
    try:
        with torch.no_grad(), _Live() as made:
            mixer(x)
        with torch.enable_grad(), _Live() as graph:
            y = mixer(x.requires_grad_())
            kept = graph.now
    except Exception:  # a kernel may raise whatever it likes
        if base.device.type == "cpu":
            raise
        return LayerMemory()
    del y
    return LayerMemory(made.peak // TRIED, kept // TRIED, len(names))


class _Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and live ``now``, and at the ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in given:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size
