"""The head of a trained output layer: log-probs, entropies and three gradients against full logits and autograd."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from rlhf_toolkit.models import heads
from rlhf_toolkit.models.heads import Tile
from rlhf_toolkit.models.trained_head import TrainedHead
from tests.models.test_heads import BIAS, BOUND, HIDDEN, MODELS, SETTINGS, VOCABULARY, naive, states, weighted
from tests.support.allocations import Allocations
from tests.support.offenders import for_each


def trained_layer(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    layer.weight.data.mul_(4)
    return layer.to(dtype)


def head_of(layer: nn.Linear, config: dict[str, Any]) -> TrainedHead:
    base: Any = SimpleNamespace(get_output_embeddings=lambda: layer, config=PretrainedConfig(**config))
    return TrainedHead(base)


def gradients(loss: Tensor, hidden: Tensor, layer: nn.Linear) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [hidden, *layer.parameters()])]


def compare(config: dict[str, Any], *, bias: bool, temperature: float, with_entropy: bool) -> None:
    layer, (hidden, targets) = trained_layer(bias=bias), states()
    exact_layer, exact = trained_layer(bias=bias, dtype=torch.float64), hidden.detach().double().requires_grad_()
    logprobs, entropies = head_of(layer, config)(hidden, targets, temperature, with_entropy)
    expected = naive(exact, targets, exact_layer, config, temperature)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=1e-5, atol=1e-5)
    assert entropies.requires_grad == with_entropy
    found = gradients(weighted(logprobs, entropies if with_entropy else None), hidden, layer)
    right = gradients(weighted(expected[0], expected[1] if with_entropy else None), exact, exact_layer)
    assert len(found) == 2 + bias
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5)


@MODELS
@BIAS
@for_each("with_entropy", [False, True], ids=["", "entropy"])
@for_each("tile", [2, 3 * HIDDEN, BOUND, 2**20])
def test_values_and_gradients_are_those_of_full_logits(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], bias: bool, with_entropy: bool, tile: int
) -> None:
    monkeypatch.setattr(heads, "CPU_TILE", Tile(tile, 512, 1024))
    compare(config, bias=bias, temperature=0.7, with_entropy=with_entropy)


def test_gradcheck_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CPU_TILE", Tile(3 * HIDDEN, 512, 1024))
    layer, (hidden, targets) = trained_layer(dtype=torch.float64), states(torch.float64, 3)
    head = head_of(layer, SETTINGS[-1])

    def outputs(h: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return head(h, targets, 0.8, True)

    assert torch.autograd.gradcheck(outputs, (hidden, *layer.parameters()))


def test_bf16_states_on_fp32_weights_give_fp32_log_probs_and_gradients() -> None:
    layer, (hidden, targets) = trained_layer(), states(torch.bfloat16)
    logprobs, entropies = head_of(layer, {})(hidden, targets, 1.0, False)
    expected = naive(hidden.detach().double(), targets, trained_layer(dtype=torch.float64), {}, 1.0)
    assert logprobs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)
    d_hidden, d_weight, d_bias = gradients(logprobs.sum(), hidden, layer)
    assert (d_hidden.dtype, d_weight.dtype, d_bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("with_entropy", [False, True], ids=["", "entropy"])
def test_nothing_is_larger_than_a_tile_but_the_gradient(monkeypatch: pytest.MonkeyPatch, with_entropy: bool) -> None:
    monkeypatch.setattr(heads, "CPU_TILE", Tile(BOUND, 512, 1024))
    layer, (hidden, targets) = trained_layer(), states()
    with Allocations() as allocations:
        logprobs, entropies = head_of(layer, SETTINGS[-1])(hidden, targets, 0.7, with_entropy)
    assert allocations.largest <= max(BOUND, hidden.numel())
    with Allocations() as allocations:
        weighted(logprobs, entropies if with_entropy else None).backward()
    assert hidden.numel() > BOUND and layer.weight.numel() < hidden.numel() < len(hidden) * VOCABULARY
    assert allocations.largest == hidden.numel()
