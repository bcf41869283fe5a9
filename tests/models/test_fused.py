"""The functions with hand-written backward against transformers' own modules, and what they are put into."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from rlhf_toolkit.models import fused
from rlhf_toolkit.models.fused import GATED_MLPS, NORMS, GatedProduct, RMSNorm, fuse
from tests.support.allocations import Allocations
from tests.support.offenders import for_each
from tests.support.roles import rows_of, sequences_and_mask, tiny_shared
from tests.support.tiny import tiny_llama

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
EPS = 1e-5


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def norm(kind: Any = LlamaRMSNorm, dtype: torch.dtype = torch.float32) -> Any:
    module = kind(16, eps=EPS).to(dtype).requires_grad_(False)
    module.weight.copy_(numbers(16, seed=1))
    return module


def test_gradcheck_in_fp64() -> None:
    x, weight = numbers(3, 2, 5).requires_grad_(), numbers(5, seed=1)
    assert torch.autograd.gradcheck(lambda x: RMSNorm.apply(x, weight, EPS), x)
    gate, up = (numbers(3, 5, seed=seed).requires_grad_() for seed in (2, 3))
    assert torch.autograd.gradcheck(GatedProduct.apply, (gate, up))


@DTYPES
def test_a_norm_has_transformers_bits_and_autograds_gradient(dtype: torch.dtype) -> None:
    module, x = norm(dtype=dtype), numbers(4, 7, 16, dtype=dtype).mul_(3).requires_grad_()
    expected, found = module(x), RMSNorm.apply(x, module.weight, EPS)
    assert torch.equal(found, expected)
    dy = numbers(4, 7, 16, dtype=dtype, seed=2)
    (right,), (gradient,) = (torch.autograd.grad(y, x, dy) for y in (expected, found))
    assert (gradient - right).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * right.norm()


@DTYPES
def test_a_gated_product_has_transformers_bits_forward_and_backward(dtype: torch.dtype) -> None:
    gate, up = (numbers(4, 7, dtype=dtype, seed=seed).requires_grad_() for seed in (2, 3))
    expected, found = nn.functional.silu(gate) * up, GatedProduct.apply(gate, up)
    assert torch.equal(found, expected)
    dy = numbers(4, 7, dtype=dtype, seed=4)
    for right, gradient in zip(*(torch.autograd.grad(y, (gate, up), dy) for y in (expected, found)), strict=True):
        assert torch.equal(gradient, right)


@DTYPES
def test_what_is_kept_is_what_came_in(dtype: torch.dtype) -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, weight = numbers(4, 16, dtype=dtype).requires_grad_(), numbers(16, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        RMSNorm.apply(x, weight, EPS)
        GatedProduct.apply(x, x)
    assert [tuple(tensor.shape) for tensor in kept] == [(4, 16), (16,), (4, 1), (4, 16), (4, 16)]
    assert all(tensor.data_ptr() in (x.data_ptr(), weight.data_ptr()) for tensor in kept if tensor.shape[-1] == 16)


def test_the_model_computes_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits forward, with and without gradients; gradients to rounding."""
    layout, outputs, gradients = rows_of(*sequences_and_mask((2, 4, 3), (5, 3, 2))), [], []
    for replace in (True, False):
        if not replace:
            monkeypatch.setattr("rlhf_toolkit.models.shared_base.fuse", lambda base: 0)
        shared = tiny_shared().train()
        assert ("forward" in vars(shared.causal_lm.model.norm)) == replace
        out = shared(layout, roles=("policy", "value"))
        with torch.no_grad():
            assert torch.equal(shared(layout, roles=("policy", "value")).token_values, out.token_values)
        (out.policy_logprobs.sum() + out.token_values.square().sum()).backward()
        outputs.append(out)
        gradients.append({name: p.grad for name, p in shared.named_parameters() if p.grad is not None})
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
    for name, right in gradients[1].items():
        assert (gradients[0][name] - right).norm() <= 1e-5 * right.norm(), name


def test_every_norm_and_mlp_of_a_llama_is_replaced() -> None:
    assert fuse(tiny_llama().requires_grad_(False)) == 2 * (2 + 1) + 1  # two norms and an MLP a layer, the last norm


@for_each("name", sorted(NORMS | GATED_MLPS))
def test_the_listed_classes_exist_and_are_what_the_list_says(name: str) -> None:
    family = name.removesuffix("RMSNorm").removesuffix("MLP").lower().replace("moe", "_moe")
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    if name in NORMS:
        assert fuse(norm(kind)) == 1
    else:
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        module.act_fn = nn.SiLU()
        assert fuse(module) == 1


class Shifted(GemmaRMSNorm):
    """Multiplies by 1 + w, under a name that the list has."""


class OtherOrder(LlamaRMSNorm):
    """Rounds after the product with w."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def test_other_functions_under_a_listed_name_stay() -> None:
    for kind in (Shifted, OtherOrder):
        kind.__name__ = "LlamaRMSNorm"
    shifted: Any = Shifted(16)
    shifted.variance_epsilon = EPS
    others = [shifted, norm(OtherOrder, torch.bfloat16), GemmaRMSNorm(16), nn.LayerNorm(16)]
    for module in others:
        assert fuse(module.requires_grad_(False)) == 0 and "forward" not in vars(module)
    mlp = tiny_llama(hidden_act="gelu").requires_grad_(False).model.layers[0].mlp
    assert isinstance(mlp, LlamaMLP) and fuse(mlp) == 0


def test_a_norm_that_trains_stays() -> None:
    assert fuse(norm(MistralRMSNorm).requires_grad_(True)) == 0


def test_without_gradients_nothing_more_is_made_than_by_transformers() -> None:
    module, x = norm(), numbers(4, 16, dtype=torch.float32)
    counts = []
    for _ in range(2):
        with Allocations() as allocations, torch.no_grad():
            module(x)
        counts.append(len(allocations.seen))
        fused.fuse(module)
    assert counts[1] <= counts[0]
