"""How the adapted layers compute while the policy alone decodes: no autograd, no role slices, adapters cast once.

    exact    y = x W^T + b, then y += s (x A^T) B^T in place: the training path's own products
    merged   y = x M^T + b with M = W + s B A, summed in fp32 and rounded once to the base's dtype

``exact`` saves the casts and the bookkeeping of some thousand small operations a token. ``merged`` also saves the
low-rank products, at the price of one more copy of the adapted weights and of rounding: an update smaller than the
spacing of the base's dtype is lost, so that responses come from a slightly older policy (docs/performance.md). The base
is never written to, so there is nothing to restore.

A quantised W becomes a matrix once, which then lies here as long as the rollout does, or anew for every product: that
takes longer than the product of a few rows, and no memory. M is such a matrix anyway.
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

from rlhf_toolkit.distributed.zero3 import is_here, whole
from rlhf_toolkit.models.precision import packs_bfloat16
from rlhf_toolkit.models.quantised import QuantisedLinear, matrix_of, products_of


class DecodingKind(StrEnum):
    """How adapted layers compute in decoding."""

    EXACT = "exact"
    MERGED = "merged"


EXACT, MERGED = DecodingKind.EXACT, DecodingKind.MERGED


@contextmanager
def decoding_weights(model: nn.Module, role: str, kind: str, *, keep_matrices: bool = True) -> Iterator[None]:
    """Inside, every adapted layer of ``model`` plays ``role`` for all rows, in the way that ``kind`` names.

    ``merged`` needs the whole base here (the window). With ``keep_matrices``, quantised weights that lie here become
    matrices once.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    own = [layer.forward for layer in layers]
    try:
        with torch.no_grad(), whole(p for layer in layers for p in _adapter(layer, role)):
            for layer in layers:
                if role in layer.lora_A and kind == MERGED:
                    product = merged_product(layer, role)
                else:
                    product = _plain(layer, keep_matrices)
                    product = exact_product(layer, role, product) if role in layer.lora_A else product
                layer.forward = product  # type: ignore
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            layer.forward = forward  # type: ignore[method-assign]


def exact_product(layer: LoraLinear, role: str, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``x -> plain(x) + s (x A^T) B^T``, with A and B cast once; ``plain`` is ``x -> x W^T + b``."""
    scale, dtype = layer.scaling[role], products_of(layer.get_base_layer())
    a, b = (parameter.to(dtype) for parameter in _adapter(layer, role))
    b = b.t().contiguous()

    def forward(x: Tensor) -> Tensor:
        y = plain(x)
        y.view(-1, y.shape[-1]).addmm_(linear(x.reshape(-1, x.shape[-1]), a), b, alpha=scale)
        return y

    return forward


def merged_product(layer: LoraLinear, role: str) -> Callable[[Tensor], Tensor]:
    """``x -> x M^T + b`` with M = W + s B A, made once."""
    base: Any = layer.get_base_layer()
    a, b = _adapter(layer, role)
    delta = layer.scaling[role] * (b.float() @ a.float())
    matrix = matrix_of(base)(base.weight, torch.float32)
    return _product((matrix.float() + delta).to(products_of(base)), base.bias)


def _plain(layer: LoraLinear, keep_matrices: bool) -> Callable[[Tensor], Tensor]:
    base: Any = layer.get_base_layer()
    matrix, dtype = matrix_of(base), products_of(base)
    if is_here(base.weight) and (keep_matrices or not isinstance(base, QuantisedLinear)):
        return _product(matrix(base.weight, dtype), base.bias)
    # The weight comes and goes while streaming, and a quantised one's matrix does anyway.
    return lambda x: linear(x, matrix(base.weight, dtype), base.bias)


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


def _adapter(layer: LoraLinear, role: str) -> list[nn.Parameter]:
    if role not in layer.lora_A:
        return []
    return [parameter for part in (layer.lora_A, layer.lora_B) for parameter in part[role].parameters()]
