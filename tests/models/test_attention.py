"""The three products against PyTorch's own attention, and when they step aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import MistralConfig, MistralForCausalLM

from rlhf_toolkit.errors import ModelError
from rlhf_toolkit.models import attention
from rlhf_toolkit.models.attention import ROLE_ATTENTION, short_causal_attention

ROWS, HEADS, LENGTH, SIZE = 3, 4, 9, 8
GROUPED = pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["one to one", "grouped", "one for all"])


class Attention(nn.Module):
    """What a transformers model hands its attention function as ``module``."""

    def __init__(self, kv_heads: int, *, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = HEADS // kv_heads, is_causal


Parts = tuple[Tensor, Tensor, Tensor]


def qkv(kv_heads: int, dtype: torch.dtype = torch.bfloat16, length: int = LENGTH) -> Parts:
    generator = torch.Generator().manual_seed(0)

    def part(heads: int) -> Tensor:
        return torch.randn(ROWS, heads, length, SIZE, generator=generator).to(dtype).requires_grad_()

    return part(HEADS), part(kv_heads), part(kv_heads)


def exact(parts: Parts, *, scale: float | None = None, is_causal: bool = True) -> tuple[Tensor, Parts]:
    """Attention in float64 on the same numbers, in transformers' layout."""
    query, key, value = (part.detach().double().requires_grad_() for part in parts)
    output = scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True)
    return output.transpose(1, 2), (query, key, value)


def relative(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one whenever transformers' own function runs."""
    seen: list[str] = []
    own = getattr(attention, "sdpa_attention_forward")  # noqa: B009  imported there

    def watched(*args: Any, **options: Any) -> Any:
        seen.append("sdpa")
        return own(*args, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    return seen


@GROUPED
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_values_and_gradients_are_attentions(kv_heads: int, scaling: float | None, calls: list[str]) -> None:
    parts = qkv(kv_heads)
    expected, doubles = exact(parts, scale=scaling)
    output, weights = short_causal_attention(Attention(kv_heads), *parts, None, scaling=scaling)
    assert calls == [] and weights is None and output.dtype == torch.bfloat16
    assert output.shape == (ROWS, LENGTH, HEADS, SIZE) and relative(output, expected) < 0.01
    seed = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((output.double() * seed).sum(), parts)
    for found, right in zip(gradients, torch.autograd.grad((expected * seed).sum(), doubles), strict=True):
        assert relative(found, right) < 0.015


@GROUPED
def test_the_future_is_invisible(kv_heads: int) -> None:
    query, key, value = (part.detach() for part in qkv(kv_heads))
    parts = query, key, value
    before, _ = short_causal_attention(Attention(kv_heads), *parts, None)
    for part in parts:
        part[:, :, 5:] = 100.0
    after, _ = short_causal_attention(Attention(kv_heads), *parts, None)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"attention_mask": torch.zeros(ROWS, 1, LENGTH, LENGTH).bfloat16()}, torch.bfloat16),
        ({"position_bias": torch.zeros(1, HEADS, LENGTH, LENGTH).bfloat16()}, torch.bfloat16),
        ({"is_causal": False}, torch.bfloat16),
        ({}, torch.float32),
    ],
    ids=["mask", "position bias", "not causal", "float32"],
)
def test_it_steps_aside_for_everything_else(options: dict[str, Any], dtype: torch.dtype, calls: list[str]) -> None:
    mask = options.pop("attention_mask", None)
    short_causal_attention(Attention(2), *qkv(2, dtype), mask, **options)
    assert calls == ["sdpa"]


def test_a_softcap_is_refused_with_a_way_out(calls: list[str]) -> None:
    with pytest.raises(ModelError, match=r"caps attention's scores, .* set model\.attention: eager"):
        short_causal_attention(Attention(2), *qkv(2), None, softcap=5.0)
    assert calls == []


def test_it_steps_aside_for_a_decode_step_and_for_a_module_that_looks_ahead(calls: list[str]) -> None:
    query, key, value = qkv(2)
    short_causal_attention(Attention(2), query[:, :, -1:], key, value, None)
    short_causal_attention(Attention(2), *qkv(2, length=1), None)
    short_causal_attention(Attention(2, is_causal=False), query, key, value, None)
    assert calls == ["sdpa"] * 3


def test_a_mask_is_obeyed() -> None:
    """Left padding: nobody may look at the first two keys."""
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    mask[:, :2] = -torch.inf
    mask[:2, :2] = 0.0
    parts = qkv(2)
    output, _ = short_causal_attention(Attention(2), *parts, mask.bfloat16().expand(ROWS, 1, -1, -1))
    query, key, value = (part[:, :, 2:] for part in parts)
    expected, _ = exact((query, key, value))
    assert relative(output[:, 2:], expected) < 0.01


@GROUPED
def test_a_step_obeys_masks_of_numbers_and_of_heads(kv_heads: int) -> None:
    """One that says how well each head sees each column, and one that hides columns from some heads."""
    query, key, value = qkv(kv_heads, torch.float64)
    query = query[:, :, -1:]
    numbers = torch.randn(ROWS, HEADS, 1, LENGTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for mask in (numbers, numbers > 0, (numbers > 0)[:, :1]):
        found, _ = short_causal_attention(Attention(kv_heads), query, key, value, mask)
        right = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(found, right)


def test_a_long_sequence_goes_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(attention, "LARGEST_ROW", HEADS * LENGTH * LENGTH)
    short_causal_attention(Attention(2), *qkv(2), None)
    assert calls == []
    short_causal_attention(Attention(2), *qkv(2, length=LENGTH + 1), None)
    assert calls == ["sdpa"]


@pytest.mark.parametrize("window", [None, 4])
def test_a_whole_model_says_the_same_with_it(window: int | None, calls: list[str]) -> None:
    """A sliding window shorter than the sequence must reach attention as a mask."""
    config: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": window}
    ids = torch.randint(3, 32, (3, 12), generator=torch.Generator().manual_seed(0))
    logits = {}
    for kind, dtype in ((ROLE_ATTENTION, torch.bfloat16), ("sdpa", torch.bfloat16), ("eager", torch.float32)):
        torch.manual_seed(0)
        model: Any = MistralForCausalLM._from_config(MistralConfig(**config), attn_implementation=kind).to(dtype)
        with torch.no_grad():
            logits[kind] = model(input_ids=ids, use_cache=False).logits
        if kind == ROLE_ATTENTION:
            assert bool(calls) == (window is not None)
    ours, theirs = (relative(logits[kind], logits["eager"].double()) for kind in (ROLE_ATTENTION, "sdpa"))
    assert ours < 0.02 and ours < 1.5 * theirs
