"""One adapted layer of two roles: the hand-written function (models/role_slices.py) against separate autograd
operations.

    python bench/role_lora.py        # result in bench/results/role_lora.json

Shapes: SmolLM2-135M's layers, 16 rows a role x 77 tokens, a bfloat16 base with float32 adapters of rank 16.
"""

from __future__ import annotations

from typing import Any

import torch
from common import SMOKE, arguments, keep, paired_medians
from torch.nn.functional import linear

from rlhf_toolkit.models.quantised import as_stored
from rlhf_toolkit.models.role_slices import RoleLora

ROWS, LENGTH, RANK, SCALE = 2 if SMOKE else 16, 77, 16, 2.0


def main() -> None:
    arguments(__doc__).parse_args()
    keep("role_lora", [compare(*shape) for shape in ((576, 576), (576, 1536), (1536, 576))])


def compare(inputs: int, outputs: int) -> dict[str, Any]:
    """Median milliseconds of forward and backward, both ways, and their ratio."""
    x = torch.randn(2 * ROWS, LENGTH, inputs, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    adapters = [torch.randn(shape, requires_grad=True) for shape in ((RANK, inputs), (outputs, RANK)) * 2]
    slices = [(0, ROWS, SCALE), (ROWS, 2 * ROWS, SCALE)]

    def one_function() -> None:
        RoleLora.apply(x, weight, None, as_stored, slices, *adapters).sum().backward()

    def separate_operations() -> None:
        y, parts = linear(x, weight), []
        for (start, stop, scale), a, b in zip(slices, adapters[::2], adapters[1::2], strict=True):
            delta = linear(linear(x[start:stop].float(), a), b) * scale
            parts.append(y[start:stop] + delta.to(y.dtype))
        torch.cat(parts).sum().backward()

    separate, together = paired_medians(separate_operations, one_function)
    return {
        "shape": [inputs, outputs],
        "separate_ms": separate,
        "one_function_ms": together,
        "ratio": together / separate,
    }


if __name__ == "__main__":
    main()
