"""AdamW with moments in 8 bits against 32, and what DoRA would cost in one layer beside LoRA.

    python bench/adapters.py        # result in bench/results/adapters.json

The optimizers step adapters of rank 16 on all linear layers of SmolLM2-135M's shape. The layer is its MLP's, with
PEFT's own LoRA and DoRA in float32: forward alone, a training step, and the bytes that forward keeps for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from common import SMOKE, arguments, keep, paired_medians
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rlhf_toolkit.trainers.optimizers import make_adamw

LAYERS, HIDDEN, MLP, KEYS, RANK = (1, 64, 96, 32, 16) if SMOKE else (30, 576, 1536, 192, 16)
TOKENS = (4,) if SMOKE else (16, 512, 2976)
WIDTHS = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KEYS)] * 2 + [(HIDDEN, MLP)] * 2 + [(MLP, HIDDEN)]
"""Inputs and outputs of a layer's linear layers."""


class OneLayer(nn.Module):
    """A linear layer that PEFT can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, MLP, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H) to (N, I)."""
        return self.up(x)


def main() -> None:
    arguments(__doc__).parse_args()
    torch.manual_seed(0)
    keep("adapters", [compare_optimizers(), *(compare_layers(tokens) for tokens in TOKENS)])


def compare_optimizers() -> dict[str, Any]:
    """Bytes of the moments, median milliseconds of a step, and their ratios."""
    sides = [Side(name) for name in ("adamw", "adamw_8bit")]
    plain, small = paired_medians(*(side.optimizer.step for side in sides), repeats=9)
    before, after = (side.moment_bytes() for side in sides)
    return {
        "trained": sum(p.numel() for p in sides[0].parameters),
        "adamw_bytes": before,
        "adamw_8bit_bytes": after,
        "bytes_ratio": after / before,
        "adamw_ms": plain,
        "adamw_8bit_ms": small,
        "ms_ratio": small / plain,
    }


class Side:
    """One optimizer over parameters of its own that have gradients."""

    def __init__(self, name: str) -> None:
        shapes = [shape for i, o in WIDTHS * LAYERS for shape in ((RANK, i), (o, RANK))]
        self.parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for parameter in self.parameters:
            parameter.grad = torch.randn_like(parameter)
        self.optimizer = make_adamw(name, [{"params": self.parameters, "lr": 1e-4}], eps=1e-5, weight_decay=0.0)

    def moment_bytes(self) -> int:
        """Of both moments and the magnitudes of their blocks; the code books are the same for all."""
        names = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return sum(state[n].numel() * state[n].element_size() for state in states for n in names if n in state)


def compare_layers(tokens: int) -> dict[str, Any]:
    """DoRA over LoRA with so many rows: forward without gradient, a training step, bytes kept for backward."""
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    lora, dora = (
        get_peft_model(OneLayer(), LoraConfig(r=RANK, target_modules=["up"], use_dora=use)) for use in (False, True)
    )

    def alone(model: Any) -> None:
        with torch.no_grad():
            model(x)

    repeats = 9
    forward = paired_medians(lambda: alone(lora), lambda: alone(dora), repeats=repeats)
    step = paired_medians(lambda: lora(x).sum().backward(), lambda: dora(x).sum().backward(), repeats=repeats)
    kept = [kept_bytes(model, x) for model in (lora, dora)]
    return {
        "tokens": tokens,
        "forward_ratio": forward[1] / forward[0],
        "step_ratio": step[1] / step[0],
        "kept_bytes_lora": kept[0],
        "kept_bytes_dora": kept[1],
        "kept_ratio": kept[1] / kept[0],
    }


def kept_bytes(model: Any, x: Tensor) -> int:
    """Bytes of activations that forward keeps for backward, ``x`` too, parameters not."""
    found: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in weights:
            found[place.data_ptr()] = place.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(found.values())


if __name__ == "__main__":
    main()
