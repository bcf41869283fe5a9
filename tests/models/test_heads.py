"""Log-probs, entropies and their gradients against full logits and autograd in float64, and what the heads allocate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from rlhf_toolkit.models import heads
from rlhf_toolkit.models.heads import LanguageModelHead, ScalarHead, Tile
from tests.support.allocations import Allocations
from tests.support.offenders import for_each

HIDDEN, VOCABULARY, POSITIONS = 4, 50, 64

SETTINGS: list[dict[str, Any]] = [
    {},
    {"logit_scale": 0.3},
    {"logits_scaling": 4.0, "logit_scale": None},
    {"final_logit_softcapping": 3.0},
    {"final_logit_softcapping": 3.0, "logit_scale": 2.5, "logits_scaling": 2.0},
]
MODELS = pytest.mark.parametrize("config", SETTINGS, ids=["plain", "scale", "scaling", "softcap", "all"])
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


def head_of(layer: nn.Linear, config: dict[str, Any]) -> LanguageModelHead:
    """The head of a model whose output layer is ``layer``."""
    base: Any = SimpleNamespace(get_output_embeddings=lambda: layer, config=PretrainedConfig(**config))
    return LanguageModelHead(base)


def output_layer(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=bias).requires_grad_(False)
    layer.weight.mul_(4)
    return layer.to(dtype)


def states(dtype: torch.dtype = torch.float32, positions: int = POSITIONS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(positions, HIDDEN, generator=generator).to(dtype)
    return hidden.requires_grad_(), torch.randint(VOCABULARY, (positions,), generator=generator)


def naive(
    hidden: Tensor, targets: Tensor, layer: nn.Linear, config: dict[str, Any], temperature: float
) -> tuple[Tensor, Tensor]:
    """Full logits in float64: softcap(scale (h W^T + b)) / temperature."""
    z = hidden @ layer.weight.double().t() + (0 if layer.bias is None else layer.bias.double())
    z = z * (config.get("logit_scale") or 1.0) / config.get("logits_scaling", 1.0)
    cap = config.get("final_logit_softcapping")
    z = (z if cap is None else cap * torch.tanh(z / cap)) / temperature
    logp = z.log_softmax(-1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


def weighted(logprobs: Tensor, entropies: Tensor | None) -> Tensor:
    """A loss in which every position has a weight of its own."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    return (weights * logprobs).sum() + (0 if entropies is None else (weights.flip(0) * entropies).sum())


@MODELS
@BIAS
@TEMPERATURES
def test_values_and_gradients_are_those_of_full_logits(config: dict[str, Any], bias: bool, temperature: float) -> None:
    layer = output_layer(bias=bias)
    hidden, targets = states()
    exact = hidden.detach().double().requires_grad_()
    expected = naive(exact, targets, layer, config, temperature)
    logprobs, entropies = head_of(layer, config)(hidden, targets, temperature, True)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(weighted(logprobs, entropies), hidden)
    (right,) = torch.autograd.grad(weighted(*expected), exact)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5)


@MODELS
def test_each_output_has_its_own_gradient(config: dict[str, Any]) -> None:
    """The joint loss above would hide a swap of the two."""
    layer, (hidden, targets) = output_layer(bias=True), states()
    exact = hidden.detach().double().requires_grad_()
    outputs, expected = (
        head_of(layer, config)(hidden, targets, 0.8, True),
        naive(exact, targets, layer, config, 0.8),
    )
    for found, right in zip(outputs, expected, strict=True):
        (gradient,) = torch.autograd.grad(found.square().sum(), hidden, retain_graph=True)
        (wanted,) = torch.autograd.grad(right.square().sum(), exact, retain_graph=True)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)


def test_gradients_against_finite_differences() -> None:
    """Autograd of the naive formula and the hand-written one could share a wrong formula; slopes cannot."""
    config = {"final_logit_softcapping": 3.0, "logit_scale": 2.5}
    layer, (hidden, targets) = output_layer(bias=True, dtype=torch.float64), states(torch.float64, 3)
    head = head_of(layer, config)
    (gradient,) = torch.autograd.grad(weighted(*head(hidden, targets, 0.8, True)), hidden)
    step = 1e-2
    for row in range(3):
        for column in range(HIDDEN):
            nudge = torch.zeros_like(hidden)
            nudge[row, column] = step
            with torch.no_grad():
                ahead, behind = (weighted(*head(hidden + s * nudge, targets, 0.8, True)).item() for s in (1, -1))
            assert gradient[row, column].item() == pytest.approx((ahead - behind) / (2 * step), rel=2e-2, abs=2e-3)


@MODELS
def test_without_entropy_gradient_entropies_are_only_numbers(config: dict[str, Any]) -> None:
    head, (hidden, targets) = head_of(output_layer(), config), states()
    with_gradient, without = (head(hidden, targets, 0.7, flag) for flag in (True, False))
    assert torch.equal(with_gradient[0], without[0]) and torch.equal(with_gradient[1], without[1])
    assert without[0].requires_grad and not without[1].requires_grad
    (one,) = torch.autograd.grad(weighted(with_gradient[0], None), hidden)
    (other,) = torch.autograd.grad(weighted(without[0], None), hidden)
    assert torch.equal(one, other)


def test_no_gradient_wanted_none_computed() -> None:
    head, (hidden, targets) = head_of(output_layer(), {}), states()
    logprobs, entropies = head(hidden.detach(), targets, 1.0, True)
    assert not logprobs.requires_grad and not entropies.requires_grad


def test_a_bf16_layer_gives_fp32_log_probs() -> None:
    """bf16 logits would be off by more than 0.01 here."""
    layer, (hidden, targets) = output_layer(bias=True, dtype=torch.bfloat16), states(torch.bfloat16)
    layer.weight.mul_(4)
    exact = hidden.detach().double().requires_grad_()
    expected = naive(exact, targets, layer, {}, 1.0)
    logprobs, entropies = head_of(layer, {})(hidden, targets, 1.0, True)
    assert logprobs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=1e-5, atol=1e-4)
    (gradient,) = torch.autograd.grad(weighted(logprobs, entropies), hidden)
    (right,) = torch.autograd.grad(weighted(*expected), exact)
    assert gradient.dtype == torch.bfloat16
    assert (gradient.double() - right).norm() < 0.01 * right.norm()


def test_a_certain_token_and_an_impossible_one_stay_finite() -> None:
    layer = nn.Linear(1, 3, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1000.0], [0.0], [-1000.0]]))
    hidden = torch.ones(2, 1, requires_grad=True)
    logprobs, entropies = head_of(layer, {})(hidden, torch.tensor([0, 2]), 1.0, True)
    assert logprobs.tolist() == [0.0, -2000.0] and entropies.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropies.sum(), hidden)
    assert gradient.tolist() == [[0.0], [-2000.0]]


def test_no_positions() -> None:
    hidden, targets = states(positions=0)
    logprobs, entropies = head_of(output_layer(), {})(hidden, targets, 1.0, True)
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, HIDDEN)


def test_the_output_layer_stays_the_bases_own() -> None:
    assert not list(head_of(output_layer(bias=True), {}).parameters())


# ---- memory ----------------------------------------------------------------------------------------------------------


BOUND = 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_nothing_is_larger_than_a_tile(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, entropy_gradient: bool
) -> None:
    """But what is as large as ``hidden`` itself, which is smaller here than any two columns of logits."""
    monkeypatch.setattr(heads, "CPU_TILE", Tile(BOUND, 512, 1024))
    config = {"final_logit_softcapping": 3.0, "logit_scale": 2.5}
    layer, (hidden, targets) = output_layer(bias=True, dtype=dtype), states(dtype, BOUND // HIDDEN)
    head, kept = head_of(layer, config), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with Allocations() as allocations, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, entropies = head(hidden, targets, 0.7, entropy_gradient)
        weighted(logprobs, entropies if entropy_gradient else None).backward()
    assert allocations.largest == BOUND < len(hidden) * VOCABULARY
    matrices = [tensor for tensor in kept if tensor.dim() == 2]
    assert [tuple(tensor.shape) for tensor in matrices] == [tuple(hidden.shape)] * (1 + entropy_gradient)
    of_the_layer = {tensor.untyped_storage().data_ptr() for tensor in layer.parameters()}
    assert not any(tensor.untyped_storage().data_ptr() in of_the_layer for tensor in kept)


TILES = [1, HIDDEN, 3 * HIDDEN, BOUND, POSITIONS * VOCABULARY - 1, POSITIONS * VOCABULARY, 2**20]


@MODELS
@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Rows and tokens are cut where it falls, the target lies in any tile, and the largest logit moves along."""
    layer, (hidden, targets) = output_layer(bias=True, dtype=dtype), states(dtype)
    expected = head_of(layer, config)(hidden, targets, 0.7, True)
    (right,) = torch.autograd.grad(weighted(*expected), hidden)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for tile in TILES:
        monkeypatch.setattr(heads, "CPU_TILE", Tile(tile, 512, 1024))
        outputs = head_of(layer, config)(hidden, targets, 0.7, True)
        torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(weighted(*outputs), hidden)
        assert (gradient - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_running_maximum_may_move_in_every_tile_or_never(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Logits from -600 to 600: without the rescaling one of the two would overflow, or lose the sum."""
    monkeypatch.setattr(heads, "CPU_TILE", Tile(2, 512, 1024))
    layer = nn.Linear(1, VOCABULARY, bias=False).requires_grad_(False)
    ramp = torch.linspace(-600, 600, VOCABULARY)[:, None]
    layer.weight.copy_(ramp if order == "rising" else ramp.flip(0))
    hidden = torch.linspace(-1, 1, 9)[:, None].requires_grad_()
    targets = torch.arange(9) * 5
    exact = hidden.detach().double().requires_grad_()
    outputs, expected = head_of(layer, {})(hidden, targets, 1.0, True), naive(exact, targets, layer, {}, 1.0)
    for found, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-4)
    (gradient,) = torch.autograd.grad(weighted(*outputs), hidden)
    (right,) = torch.autograd.grad(weighted(*expected), exact)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-3)


def test_gradcheck_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CPU_TILE", Tile(3 * HIDDEN, 512, 1024))
    head = head_of(output_layer(bias=True, dtype=torch.float64), SETTINGS[-1])
    hidden, targets = states(torch.float64, 5)
    assert torch.autograd.gradcheck(lambda h: head(h, targets, 0.8, True), hidden)


def test_the_gradient_of_a_nearly_certain_token_is_right_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """p = 0.9999: as the difference of the target's row and the expected row it would be rounding error alone."""
    monkeypatch.setattr(heads, "CPU_TILE", Tile(BOUND, 512, 1024))
    layer, (hidden, _) = output_layer(dtype=torch.bfloat16), states(torch.bfloat16)
    layer.weight.mul_(4)
    targets = (hidden @ layer.weight.t()).argmax(-1)
    exact = hidden.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(naive(exact, targets, layer, {}, 1.0)[0].sum(), exact)
    (gradient,) = torch.autograd.grad(head_of(layer, {})(hidden, targets, 1.0, False)[0].sum(), hidden)
    sure = (naive(exact, targets, layer, {}, 1.0)[0] > -1e-2) & (right.norm(dim=-1) > 1e-9)
    assert sure.sum() > 5
    assert ((gradient.double() - right).norm(dim=-1) < 0.02 * right.norm(dim=-1))[sure].all()


# ---- scalar head -----------------------------------------------------------------------------------------------------


def test_a_scalar_head_is_w_h_plus_b_in_fp32() -> None:
    head = ScalarHead(3)
    head.weight.data = torch.tensor([1.0, -2.0, 0.5])
    head.bias.data = torch.tensor([0.25])
    hidden = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -4.0]], dtype=torch.bfloat16, requires_grad=True)
    values = head(hidden)
    assert values.dtype == torch.float32 and values.tolist() == [1 - 4 + 1.5 + 0.25, -2 - 2 + 0.25]
    (values * torch.tensor([1.0, 10.0])).sum().backward()
    assert head.weight.grad is not None and head.weight.grad.tolist() == [1.0, 12.0, -37.0]
    assert head.bias.grad is not None and head.bias.grad.tolist() == [11.0]
    assert hidden.grad is not None and hidden.grad.tolist() == [[1.0, -2.0, 0.5], [10.0, -20.0, 5.0]]


def test_a_scalar_head_starts_at_zero() -> None:
    assert ScalarHead(5)(torch.randn(3, 5)).tolist() == [0.0, 0.0, 0.0]


def test_or_with_the_standard_deviation_asked_for() -> None:
    torch.manual_seed(0)
    head = ScalarHead(10_000, initial_std=0.02)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head.bias.tolist() == [0.0]
    assert {tuple(p.shape) for p in head.parameters()} == {(10_000,), (1,)}
