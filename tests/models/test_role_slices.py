"""One forward for several roles, against autograd, against plain PEFT, and against its own errors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models.quantised import as_stored, turned
from rlhf_toolkit.models.role_slices import RoleLora, RoleRows, RoleSlices
from rlhf_toolkit.models.shared_base import SharedBase
from tests.support.offenders import for_each
from tests.support.roles import lora, plain_peft, rows_of, sequences_and_mask, tiny_shared
from tests.support.tiny import tiny_llama
from tests.support.values import there

IN, OUT, ROWS = 5, 4, 7
KEPT = {False: as_stored, True: turned}
SLICES = ((0, 2, 0.5), (3, 7, -2.0))  # row 2 plays a role without an adapter


def parts(
    shape: tuple[int, ...], *, bias: bool, transposed: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """x, W and b of the base, and A, B of two roles of different ranks."""
    torch.manual_seed(0)
    weight = torch.randn((IN, OUT) if transposed else (OUT, IN), dtype=dtype)
    adapters = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((3, IN), (OUT, 3), (2, IN), (OUT, 2))]
    x = torch.randn(*shape, IN, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(OUT, dtype=dtype) if bias else None, adapters


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, adapters: list[Tensor]) -> Tensor:
    """The equation of the module's docstring, row by row, out of ordinary operations."""
    rows = []
    for i, row in enumerate(x):
        y = row @ (weight if transposed else weight.t())
        y = y if bias is None else y + bias
        for (start, stop, scale), a, b in zip(SLICES, adapters[::2], adapters[1::2], strict=True):
            if start <= i < stop:
                y = y + scale * (row @ a.t()) @ b.t()
        rows.append(y)
    return torch.stack(rows)


CASES = for_each("shape", [(ROWS,), (ROWS, 3), (ROWS, 2, 3)], ids=["2d", "3d", "4d"])
BIAS = for_each("bias", [False, True], ids=["", "bias"])
TRANSPOSED = for_each("transposed", [False, True], ids=["linear", "conv1d"])


@CASES
@BIAS
@TRANSPOSED
def test_forward_is_the_equation(shape: tuple[int, ...], bias: bool, transposed: bool) -> None:
    x, weight, b, adapters = parts(shape, bias=bias, transposed=transposed)
    expected = by_rows(x, weight, b, transposed, adapters)
    torch.testing.assert_close(RoleLora.apply(x, weight, b, KEPT[transposed], SLICES, *adapters), expected)


@CASES
@BIAS
@TRANSPOSED
def test_backward_is_the_derivative(shape: tuple[int, ...], bias: bool, transposed: bool) -> None:
    x, weight, b, adapters = parts(shape, bias=bias, transposed=transposed)

    def function(x: Tensor, *adapters: Tensor) -> Tensor:
        return RoleLora.apply(x, weight, b, KEPT[transposed], SLICES, *adapters)

    assert torch.autograd.gradcheck(function, (x, *adapters))


@TRANSPOSED
def test_gradients_of_a_sum_over_a_strided_input(transposed: bool) -> None:
    """``sum`` sends back an expanded gradient without strides, and attention hands on transposed activations."""
    x, weight, b, adapters = parts((3, ROWS), bias=True, transposed=transposed)
    expected = torch.autograd.grad(by_rows(x.transpose(0, 1), weight, b, transposed, adapters).sum(), [x, *adapters])
    y = RoleLora.apply(x.transpose(0, 1), weight, b, KEPT[transposed], SLICES, *adapters)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), [x, *adapters]), expected)


def test_an_input_without_gradient_still_trains_the_adapters() -> None:
    """The first layer of a frozen base: nothing before it needs a gradient."""
    x, weight, b, adapters = parts((ROWS, 3), bias=False, transposed=False)
    expected = torch.autograd.grad(by_rows(x, weight, b, False, adapters).square().sum(), adapters)
    y = RoleLora.apply(x.detach(), weight, b, as_stored, SLICES, *adapters)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), adapters), expected)


def test_no_adapter_at_all_is_the_base() -> None:
    x, weight, b, _ = parts((ROWS, 3), bias=True, transposed=False)
    torch.testing.assert_close(RoleLora.apply(x, weight, b, as_stored, ()), x @ weight.t() + there(b))


def test_the_base_gets_no_gradient() -> None:
    x, weight, b, adapters = parts((ROWS,), bias=True, transposed=False)
    weight.requires_grad_()
    RoleLora.apply(x, weight, b, as_stored, SLICES, *adapters).sum().backward()
    assert weight.grad is None


def test_bf16_base_with_fp32_adapters() -> None:
    """Products in the base's dtype, gradients in the adapter's."""
    exact = parts((ROWS, 3), bias=True, transposed=False)
    x, weight, b, adapters = parts((ROWS, 3), bias=True, transposed=False)
    half = [t.detach().bfloat16() for t in (x, weight, there(b))]
    single = [a.detach().float().requires_grad_() for a in adapters]
    y = RoleLora.apply(half[0].requires_grad_(), half[1], half[2], as_stored, SLICES, *single)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), single)
    assert {g.dtype for g in gradients} == {torch.float32}
    x, weight, b, adapters = exact
    expected = torch.autograd.grad(by_rows(x, weight, b, False, adapters).square().sum(), adapters)
    for found, right in zip(gradients, expected, strict=True):
        assert (found.double() - right).norm() < 0.03 * right.norm()


# ---- against plain PEFT ----------------------------------------------------------------------------------------------

ADAPTERS = {
    "policy": lora(r=2, lora_alpha=7),
    "value": lora(r=5, lora_alpha=3, use_rslora=True),
    "reward": lora(target_modules=["q_proj", "down_proj"]),
}
ORDER = ("value", "reference", "policy", "reward")


def three_roles() -> SharedBase:
    base = tiny_llama()
    torch.manual_seed(1)
    return SharedBase(base, ADAPTERS)


def trunk_states(shared: SharedBase, ids: Tensor) -> dict[str, Tensor]:
    """The trunk's last states of all roles from one forward."""
    with torch.no_grad(), shared.slices.layout(ORDER, len(ids)):
        states = shared.causal_lm.base_model(ids.repeat(len(ORDER), 1), use_cache=False).last_hidden_state
    return dict(zip(ORDER, states.split(len(ids)), strict=True))


@pytest.mark.parametrize("role", ["policy", "value", "reward"])
def test_a_role_is_plain_peft_with_that_adapter_alone(role: str) -> None:
    shared, (ids, _) = three_roles(), sequences_and_mask((2, 4, 3), (5, 3, 2))
    model = plain_peft(shared, role, tiny_llama())
    with torch.no_grad():
        expected = model.base_model.model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(trunk_states(shared, ids)[role], expected, rtol=1e-5, atol=1e-5)


def test_every_role_is_peft_after_set_adapter() -> None:
    """The same with all adapters on one model, switched as PEFT switches them."""
    shared, (ids, _) = three_roles(), sequences_and_mask((2, 4, 3), (5, 3, 2))
    switching: Any = get_peft_model(tiny_llama(), ADAPTERS["policy"], adapter_name="policy")
    for role in ("value", "reward"):
        switching.add_adapter(role, ADAPTERS[role])
    assert not switching.load_state_dict(shared.state_dict(), strict=False).missing_keys
    states = trunk_states(shared, ids)
    for role in ADAPTERS:
        switching.set_adapter(role)
        with torch.no_grad():
            expected = switching.base_model.model.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(states[role], expected, rtol=1e-5, atol=1e-5)


def test_the_reference_is_the_base_and_every_role_differs() -> None:
    shared, (ids, _) = three_roles(), sequences_and_mask((2, 4, 3), (5, 3, 2))
    states = trunk_states(shared, ids)
    with torch.no_grad():
        base = tiny_llama().model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states["reference"], base, rtol=1e-5, atol=1e-5)
    for one, other in pairwise(ORDER):
        assert (states[one] - states[other]).abs().mean() > 0.05


# ---- the layout ------------------------------------------------------------------------------------------------------


def test_a_module_that_flattens_rows_and_tokens_is_understood() -> None:
    slices = RoleSlices()
    with slices.layout(("policy", "value"), 2):
        assert slices.of(torch.zeros(4, 9)) == (RoleRows("policy", 0, 2), RoleRows("value", 2, 4))
        assert slices.of(torch.zeros(12, 9)) == (RoleRows("policy", 0, 6), RoleRows("value", 6, 12))


def test_rows_that_do_not_divide_are_an_error() -> None:
    slices = RoleSlices()
    with slices.layout(("policy", "value"), 2), pytest.raises(ModelError, match=r"got 6 rows for a batch of 4"):
        slices.of(torch.zeros(6, 9))


def test_a_layer_called_outside_forward_is_an_error() -> None:
    shared, (ids, mask) = tiny_shared(), sequences_and_mask((2,), (3,))
    with pytest.raises(ModelError, match=r"outside SharedBase\.forward"):
        shared.causal_lm(input_ids=ids)
    shared(rows_of(ids, mask), roles=("policy",))
    with pytest.raises(ModelError, match=r"outside SharedBase\.forward"):
        shared.causal_lm(input_ids=ids)


def test_a_layout_ends_with_its_block_even_after_an_error() -> None:
    slices = RoleSlices()
    with pytest.raises(ZeroDivisionError), slices.layout(("policy",), 1):
        1 / 0  # noqa: B018
    with pytest.raises(ModelError, match="outside"):
        slices.of(torch.zeros(1, 1))


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


def gradients(*, checkpointing: bool, between: Any = None) -> dict[str, Tensor]:
    """Of a loss of policy and value; ``between`` runs after forward and before backward."""
    shared, (ids, mask) = (
        tiny_shared(gradient_checkpointing=checkpointing).train(),
        sequences_and_mask((2, 4, 3), (5, 3, 2)),
    )
    out = shared(rows_of(ids, mask), roles=("policy", "value"), entropy_gradient=True)
    loss = out.policy_logprobs.sum() + out.policy_entropies.sum() + out.token_values.square().sum()
    if between is not None:
        between(shared, ids, mask)
    loss.backward()
    return {name: p.grad for name, p in shared.named_parameters() if p.grad is not None}


def forward_without_gradient(shared: SharedBase, ids: Tensor, mask: Tensor) -> None:
    with torch.no_grad():
        shared(rows_of(ids[:1], mask[:1]), roles=("reference", "value"))


def forward_and_backward_of_another_batch(shared: SharedBase, ids: Tensor, mask: Tensor) -> None:
    shared(rows_of(ids[1:], mask[1:]), roles=("value", "policy")).token_values.sum().backward()
    shared.zero_grad()


def test_checkpointing_really_recomputes() -> None:
    """Otherwise the next test would compare a thing with itself."""
    counts = {}
    for checkpointing in (False, True):
        shared, (ids, mask) = (
            tiny_shared(gradient_checkpointing=checkpointing).train(),
            sequences_and_mask((2,), (3,)),
        )
        calls: list[int] = []
        shared.causal_lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        shared(rows_of(ids, mask), roles=("policy", "value")).token_values.sum().backward()
        counts[checkpointing] = len(calls)
    assert counts == {False: 1, True: 2}


@pytest.mark.parametrize("between", [None, forward_without_gradient, forward_and_backward_of_another_batch])
def test_checkpointing_gives_the_same_gradients(between: Any) -> None:
    expected = gradients(checkpointing=False)
    found = gradients(checkpointing=True, between=between)
    assert expected.keys() == found.keys() and len(found) == 2 * 2 * 2 * 7 + 2  # A, B; roles; layers; linears; head
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
