"""Causal attention on a CPU: three products (models/attention.py) against PyTorch's fused kernel, forward and backward.

    python bench/cpu_attention.py        # result in bench/results/cpu_attention.json

Shapes: SmolLM2-135M's heads, 32 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from common import SMOKE, arguments, keep, paired_medians
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_toolkit.models.attention import short_causal_attention

ROWS, HEADS, KEY_HEADS, DIMENSION = 2 if SMOKE else 32, 9, 3, 64


def main() -> None:
    arguments(__doc__).parse_args()
    keep("cpu_attention", [compare(length, dtype) for length in (77, 256) for dtype in (torch.bfloat16, torch.float32)])


def compare(length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Median milliseconds of forward and backward, both ways, and their ratio."""
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True)
    shapes = [(ROWS, length, heads, DIMENSION) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes)

    def run(attention: Callable[..., Any]) -> Callable[[], object]:
        return lambda: attention(module, q, k, v, None, scaling=DIMENSION**-0.5)[0].float().sum().backward()

    fused, products = paired_medians(run(sdpa_attention_forward), run(short_causal_attention))
    name = str(dtype).removeprefix("torch.")
    return {"length": length, "dtype": name, "fused_ms": fused, "products_ms": products, "ratio": products / fused}


if __name__ == "__main__":
    main()
