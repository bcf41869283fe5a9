"""How the adapted layers compute while the policy alone decodes: no autograd, no role slices, adapters cast once.

    exact    y = x W^T + b, then y += s (x A^T) B^T in place: the training path's own products
    merged   y = x M^T + b with M = W + s B A, summed in fp32 and rounded once to the base's dtype

``exact`` saves the casts and the bookkeeping of some thousand small operations a token. ``merged`` also saves the
low-rank products, at the price of one more copy of the adapted weights and of rounding: an update smaller than the
spacing of the base's dtype is lost, so that responses come from a slightly older policy (docs/performance.md). The base
is never written to, so there is nothing to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from rlhf_toolkit.distributed.zero3 import is_here, whole
from rlhf_toolkit.models.precision import packs_bfloat16


class DecodingKind(StrEnum):
    """How adapted layers compute in decoding."""

    EXACT = "exact"
    MERGED = "merged"


EXACT, MERGED = DecodingKind.EXACT, DecodingKind.MERGED


@contextmanager
def decoding_weights(model: nn.Module, role: str, kind: str) -> Iterator[None]:
    """Inside, every adapted layer of ``model`` plays ``role`` for all rows, in the way that ``kind`` names.

    ``merged`` needs the whole base here (the window).
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    own = [layer.forward for layer in layers]
    make = merged_product if kind == MERGED else exact_product
    try:
        with torch.no_grad(), whole(p for layer in layers for p in _adapter(layer, role)):
            for layer in layers:
                layer.forward = make(layer, role) if role in layer.lora_A else _plain(layer)  # type: ignore
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            layer.forward = forward  # type: ignore[method-assign]


def exact_product(layer: LoraLinear, role: str) -> Callable[[Tensor], Tensor]:
    """``x -> x W^T + b + s (x A^T) B^T``, with A and B cast once."""
    base, scale, dtype = _plain(layer), layer.scaling[role], _weight(layer.get_base_layer()).dtype
    a, b = (parameter.to(dtype) for parameter in _adapter(layer, role))
    b = b.t().contiguous()

    def forward(x: Tensor) -> Tensor:
        y = base(x)
        y.view(-1, y.shape[-1]).addmm_(linear(x.reshape(-1, x.shape[-1]), a), b, alpha=scale)
        return y

    return forward


def merged_product(layer: LoraLinear, role: str) -> Callable[[Tensor], Tensor]:
    """``x -> x M^T + b`` with M = W + s B A, made once."""
    base: Any = layer.get_base_layer()
    a, b = _adapter(layer, role)
    delta = layer.scaling[role] * (b.float() @ a.float())
    return _product((_weight(base).float() + delta).to(_weight(base).dtype), base.bias)


def _plain(layer: LoraLinear) -> Callable[[Tensor], Tensor]:
    base: Any = layer.get_base_layer()
    if is_here(base.weight):
        return _product(_weight(base), base.bias)
    return lambda x: linear(x, _weight(base), base.bias)  # streaming: the weight comes and goes


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``x -> x W^T + b`` for many calls with few rows.

    On a CPU PyTorch brings a bfloat16 weight into its kernel's order anew for every product, which for 16 rows takes as
    long as the product (26 ms a token for all layers of SmolLM2, 17 without). The copy in that order, the same that
    torch.compile makes, lasts as long as the rollout; results are the same bits. Processors without AVX-512 have no
    such kernel.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not packs_bfloat16():
        return lambda x: linear(x, weight, bias)
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, bias, "none", [], "")


def _weight(base: Any) -> Tensor:
    """(out, in); GPT-2 keeps its weight as (in, out)."""
    return base.weight.t() if isinstance(base, Conv1D) else base.weight


def _adapter(layer: LoraLinear, role: str) -> list[nn.Parameter]:
    if role not in layer.lora_A:
        return []
    return [parameter for part in (layer.lora_A, layer.lora_B) for parameter in part[role].parameters()]
