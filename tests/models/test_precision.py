"""Which dtype ``auto`` means, on processors and GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from rlhf_toolkit.models import decoding_weights, precision
from rlhf_toolkit.models.precision import resolved_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An x86 processor with bfloat16 units, which oneDNN uses."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(precision, "packs_bfloat16", lambda: True)
    return monkeypatch


def test_auto_is_bfloat16_where_the_processor_computes_it(processor: pytest.MonkeyPatch) -> None:
    assert resolved_dtype("auto", CPU) == ("bfloat16", "model.dtype auto: bfloat16 (cpu computes bfloat16)")


@pytest.mark.parametrize("cap", ["AVX2", "AVX512_CORE", "SSE41"])
def test_auto_is_float32_where_onednn_is_held_to_less(processor: pytest.MonkeyPatch, cap: str) -> None:
    processor.setenv("ONEDNN_MAX_CPU_ISA", cap)
    dtype, reason = resolved_dtype("auto", CPU)
    assert dtype == "float32" and f"oneDNN is held to {cap}" in reason
    processor.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert resolved_dtype("auto", CPU)[0] == "bfloat16"


def test_auto_is_float32_on_a_processor_without_units(processor: pytest.MonkeyPatch) -> None:
    processor.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    processor.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    dtype, reason = resolved_dtype("auto", CPU)
    assert dtype == "float32" and "neither AMX nor AVX512_BF16" in reason


def test_a_dtype_that_is_named_stays_and_slow_is_said(processor: pytest.MonkeyPatch) -> None:
    processor.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    dtype, reason = resolved_dtype("bfloat16", CPU)
    assert dtype == "bfloat16" and "slow here" in reason
    assert resolved_dtype("float32", CPU) == ("float32", "model.dtype float32")


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_has_bfloat16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolved_dtype("auto", GPU)[0] == dtype


def test_a_product_is_right_where_weights_cannot_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator).bfloat16() for shape in ((24, 16), (4, 16)))
    packed = decoding_weights._product(weight, None)(x)
    monkeypatch.setattr(decoding_weights, "packs_bfloat16", lambda: False)
    assert torch.equal(decoding_weights._product(weight, None)(x), packed)
