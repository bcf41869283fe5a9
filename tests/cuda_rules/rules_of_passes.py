"""Role pass and update say on the pretended GPU what they say on the CPU, packed and padded, in both precisions, with
the kernels that a GPU has and without them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_toolkit.data.layout import Layout, packed_layout, padded_layout
from rlhf_toolkit.models.heads import widens
from rlhf_toolkit.models.segment_attention import flash_works
from rlhf_toolkit.models.shared_base import SharedBase
from tests.cuda_rules import gpu_kernels
from tests.cuda_rules.device import GPU, Rules, numbers, to_gpu
from tests.cuda_rules.subjects import gradients, sequences, shared_base

LAYOUTS: dict[str, Layout] = {"packed": packed_layout, "padded": padded_layout}
DTYPES = (torch.float32, torch.bfloat16)
FLASH = "torch_attn._varlen_attn.default"
BOUNDS = {"packed": (96, 304, 399, 10), "padded": (113, 325, 437, 5)}
"""Upper bounds, which may only fall: launches a layer of a role pass of three roles, of an update of two, and of one
with checkpointing; and the waits of any of them, which are copies of tokens and indices to the GPU and, for padded
rows, transformers' own question whether they are packed."""
CPU = torch.device("cpu")


@contextmanager
def watched(*without: str) -> Iterator[dict[str, int]]:
    """How often each of the GPU's own kernels ran; those in ``without`` are refused, as by an old card."""

    def counting(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name in without:
                raise NotImplementedError(f"no kernel {name} on this card")
            ran[name] += 1
            return kernels[name](*args, **kwargs)

        return run

    kernels, ran = dict(gpu_kernels.KERNELS), dict.fromkeys(gpu_kernels.KERNELS, 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in kernels:
            patch.setitem(gpu_kernels.KERNELS, name, counting(name))
        for trial in (flash_works, widens):
            trial.cache_clear()
        yield ran
    for trial in (flash_works, widens):
        trial.cache_clear()


def scored(model: SharedBase, make: Layout, device: torch.device) -> dict[str, Tensor]:
    """What the roles say about the sequences, as ``rollout.passes`` asks them."""
    with torch.no_grad():
        out = model(make(*sequences()).to(device), roles=("policy", "value", "reference"), temperature=0.8)
    return {name: numbers(tensor).clone() for name, tensor in out.items()}


def updated(model: SharedBase, make: Layout, device: torch.device) -> dict[str, Tensor]:
    """Gradients of a loss of everything said."""
    model.train()
    out = model(make(*sequences()).to(device), roles=("policy", "value"), entropy_gradient=True)
    loss = out.policy_logprobs.mean() + 0.1 * out.policy_entropies.mean() + (out.token_values - 1).square().mean()
    loss.backward()
    return gradients(model)


def off(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The relative distance of all numbers together."""
    assert found.keys() == exact.keys()
    found_flat, exact_flat = (torch.cat([each[name].flatten() for name in sorted(exact)]) for each in (found, exact))
    return float((found_flat - exact_flat).norm() / exact_flat.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("work", [scored, updated])
def test_both_layouts_say_what_they_say_on_the_cpu(work: Any, dtype: torch.dtype) -> None:
    """To rounding: float32's, or what bfloat16 changes on a CPU."""
    wrong, ways = [], list(itertools.product((False, True) if work is updated else (False,), (False, True)))
    with watched() as ran:
        for (name, make), (checkpointing, borrows) in itertools.product(LAYOUTS.items(), ways):
            options: dict[str, Any] = {"gradient_checkpointing": checkpointing}
            if borrows:
                options |= {"roles": ("policy",), "value_on": "policy_trunk"}
            exact = work(shared_base(**options), make, CPU)
            rounding = 1e-5
            if dtype != torch.float32:
                rounding = 2 * off(work(shared_base(dtype=dtype, **options), make, CPU), exact)
            model = to_gpu(shared_base(dtype=dtype, **options))
            with Rules():
                error = off(work(model, make, GPU), exact)
            if not error <= rounding:
                wrong.append((name, checkpointing, borrows, error, rounding))
    assert wrong == []
    half = dtype == torch.bfloat16
    assert (ran[FLASH] > 1) == (ran["aten.mm.dtype"] > 1) == half, ran


@pytest.mark.parametrize("missing", ["aten.mm.dtype", FLASH, "torch_attn._varlen_attn_backward.default"])
def test_a_card_without_a_kernel_is_told_and_works(missing: str) -> None:
    """Also where the layer that asks first is one that is checkpointed."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "gradient_checkpointing": True}
    expected = updated(shared_base(**options), packed_layout, CPU)
    with watched(missing), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = to_gpu(shared_base(**options))
        with Rules():
            found = updated(model, packed_layout, GPU)
    assert off(found, expected) < 0.06
    assert [str(w.message) for w in told if f"no kernel {missing} on this card" in str(w.message)], told


def test_a_kernel_that_gives_wrong_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(query: Tensor, *rest: Any) -> Any:
        return torch.zeros_like(query), torch.zeros(1), torch.zeros(2, dtype=torch.uint64)

    with watched(), Rules(), pytest.warns(RuntimeWarning, match="it gives wrong numbers"):
        assert flash_works(GPU, torch.bfloat16, 16)
        monkeypatch.setitem(gpu_kernels.KERNELS, FLASH, broken)
        flash_works.cache_clear()
        assert not flash_works(GPU, torch.bfloat16, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_launches_and_waits_no_more_than_it_did(layout: str) -> None:
    *launches, waits = BOUNDS[layout]
    wrong = []
    for (work, checkpointing), bound in zip(
        ((scored, False), (updated, False), (updated, True)), launches, strict=True
    ):
        found = []
        for layers in (1, 2):
            model = to_gpu(shared_base(dtype=torch.bfloat16, layers=layers, gradient_checkpointing=checkpointing))
            with watched(), Rules(traced=True) as rules:
                assert flash_works(GPU, torch.bfloat16, 8) and widens(GPU, torch.bfloat16)
                rules.forget()
                work(model, LAYOUTS[layout], GPU)
            found.append(rules)
        of_a_layer = found[1].launches - found[0].launches
        if of_a_layer > bound or found[1].waits.total() > waits:
            wrong.append((work.__name__, checkpointing, of_a_layer, found[1].table()))
    assert wrong == []
