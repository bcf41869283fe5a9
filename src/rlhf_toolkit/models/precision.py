"""Which dtype a device computes in its own units, and which kernels its processor has.

What a kernel needs is asked for here and never assumed: oneDNN's packed bfloat16 products raise on a processor without
AVX-512, and bfloat16 without units of its own is computed by conversion, at a fraction of float32's speed.
"""

from __future__ import annotations

import os
import platform
from functools import cache

import torch

AUTO = "auto"
WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""oneDNN's names of instruction sets that have no bfloat16 products; a user may cap it to one of them."""
SM_WITH_BFLOAT16 = 8


def why_no_bfloat16(device: torch.device) -> str | None:
    """Why ``device`` does not compute bfloat16 in units of its own, or None where it does."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= SM_WITH_BFLOAT16 else f"this GPU (sm{major}{minor}) has none before sm80"
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if cap in WITHOUT_BFLOAT16:
        return f"oneDNN is held to {cap}"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None if packs_bfloat16() else "this processor has none"
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return None if has and packs_bfloat16() else "this processor has neither AMX nor AVX512_BF16"


@cache
def packs_bfloat16() -> bool:
    """Whether oneDNN can bring a bfloat16 weight into its kernel's own order on this processor."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolved_dtype(wanted: str, device: torch.device) -> tuple[str, str]:
    """The dtype that ``model.dtype`` means on ``device``, and a sentence for the start of the run.

    ``auto`` is bfloat16 where the device computes it and float32 elsewhere. A dtype that is named is kept: bfloat16
    without units of its own is slow and right.
    """
    obstacle = why_no_bfloat16(device)
    if wanted == AUTO:
        chosen = "bfloat16" if obstacle is None else "float32"
        reason = f"{device.type} computes bfloat16" if obstacle is None else f"no bfloat16 units: {obstacle}"
        return chosen, f"model.dtype auto: {chosen} ({reason})"
    if wanted == "bfloat16" and obstacle is not None:
        return wanted, f"model.dtype bfloat16 is slow here: {obstacle}; float32 takes a fraction of the time"
    return wanted, f"model.dtype {wanted}"
