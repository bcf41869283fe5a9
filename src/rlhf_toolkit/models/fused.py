"""The elementwise parts of a decoder layer with backward written by hand: same bits forward, less kept for backward.

transformers' RMSNorm keeps two fp32 copies of every hidden state, its gated MLP three tensors of the MLP's width where
two determine the third. The functions here keep what came in. They are put in only where transformers' own forward,
tried on random numbers, gives the same bits (bench/update.py has what they bring).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

NORMS = frozenset(
    f"{family}RMSNorm"
    for family in (
        "Llama",
        "Mistral",
        "Mixtral",
        "Qwen2",
        "Qwen2Moe",
        "Qwen3",
        "Qwen3Moe",
        "Phi3",
        "SmolLM3",
        "Granite",
    )
)
GATED_MLPS = frozenset(f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite"))


class RMSNorm(torch.autograd.Function):
    """y = w xhat with xhat = x / sqrt(mean(x^2) + eps), in fp32 and rounded before the product with the frozen w.

        dx = (g - xhat mean(g xhat)) / sqrt(mean(x^2) + eps),    g = w dy

    Keeps x and one number a row. Source: Zhang & Sennrich (2019), arXiv:1910.07467, equation 4.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``x`` (..., H) to (..., H); the same operations in the same order as in transformers."""
        y, inverse = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """The gradient of ``x``."""
        x, weight, inverse = ctx.saved_tensors
        xhat, g = x * inverse, (dy * weight).to(inverse.dtype)
        along = torch.linalg.vecdot(g, xhat).div_(x.shape[-1]).unsqueeze(-1)
        return g.addcmul_(xhat, along, value=-1).mul_(inverse).to(x.dtype), None, None


class GatedProduct(torch.autograd.Function):
    """silu(gate) up. Keeps its two factors; silu(gate) is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Both (..., I)."""
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """The gradients of ``gate`` and ``up``."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), silu(gate).mul_(dy)


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of ``x`` (..., H), and 1 / sqrt(mean(x^2) + eps) (..., 1) in fp32 or better."""
    # One kernel on a GPU, where the separate operations are six; on a CPU they are what it consists of.
    xhat, inverse = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, eps)
    return weight * xhat, inverse


def fuse(model: nn.Module) -> int:
    """Put these functions into every module of ``model`` that computes the same; return how many.

    Call it once the base is frozen: no gradient of a norm's weight is computed. Modules stay where they are and call
    their linear layers as before, so adapters and ZeRO's hooks see nothing of it.
    """
    replaced = 0
    for module in model.modules():
        forward = norm_forward(module) or mlp_forward(module)
        if forward is not None:
            module.forward = forward
            replaced += 1
    return replaced


def norm_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward for ``module`` by ``RMSNorm``; None where ``module`` computes anything else, or trains its weight."""
    if type(module).__name__ not in NORMS or module.weight.requires_grad:
        return None
    for dtype in {module.weight.dtype, torch.float32}:
        x, weight = _random(2, dtype)
        stand_in = SimpleNamespace(weight=weight, variance_epsilon=module.variance_epsilon)
        if not _same(type(module).forward, stand_in, x, normed(x, weight, module.variance_epsilon)[0]):
            return None

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return normed(hidden_states, module.weight, module.variance_epsilon)[0]
        return RMSNorm.apply(hidden_states, module.weight, module.variance_epsilon)

    return forward


def mlp_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward for ``module`` by ``GatedProduct``; None where ``module`` computes anything else."""
    if type(module).__name__ not in GATED_MLPS:
        return None
    x, factor = _random(2, torch.float32)
    stand_in = SimpleNamespace(
        gate_proj=lambda x: x * factor, up_proj=lambda x: x + factor, down_proj=lambda x: x - 1, act_fn=module.act_fn
    )
    if not _same(type(module).forward, stand_in, x, silu(x * factor).mul_(x + factor) - 1):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        product = GatedProduct.apply(gate, up) if torch.is_grad_enabled() else silu(gate).mul_(up)
        return module.down_proj(product)

    return forward


def _random(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """(3, 64) each, the last with one row; from a stream of their own."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 64)] * (count - 1) + [(64,)]
    return [torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes]


def _same(forward: Callable[..., Any], stand_in: SimpleNamespace, x: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether ``forward`` of a module with nothing but the attributes of ``stand_in`` gives exactly ``expected``.

    A stand-in because under ZeRO-3 the module's own weight is elsewhere. A forward that needs more than it has is
    another function.
    """
    try:
        with torch.no_grad():
            return torch.equal(forward(stand_in, x), expected)
    except AttributeError:
        return False
