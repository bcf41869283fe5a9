"""Where NaN and infinity come from: the first layer whose output has one, the weights that hold one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_toolkit.distributed.zero3 import is_here

WAYS_OUT = (
    "likeliest are a broken checkpoint or adapter (take an earlier one), numbers beyond what the dtype holds (set "
    "model.dtype to bfloat16 or float32) or an update that went too far (lower update.policy_lr, update.max_grad_norm)"
)


@dataclass(frozen=True)
class Place:
    """The first layer whose output is not finite, ``why``, and where in its output: the index of the first number."""

    layer: str
    why: str
    index: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.layer} is the first layer whose output is not finite, {self.why}"


def first_not_finite(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run ``forward``, a pass of ``model``, and say which layer's output is the first that is not finite, and why.

    One more pass, looked at layer by layer: only for an error's message.
    """
    place = find_not_finite(model, forward)
    if place is not None:
        return str(place)
    return "no layer's output is when these tokens run alone, so that only their company or the output layer makes it"


def find_not_finite(model: nn.Module, forward: Callable[[], object]) -> Place | None:
    """The same as a record; None where every layer's output is finite."""
    found: list[Place] = []

    def looking_at(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            spoiled = [] if found else [tensor for tensor in _floats(output) if not bool(tensor.isfinite().all())]
            if spoiled:
                index = (~spoiled[0].isfinite()).nonzero()[0].tolist()
                found.append(Place(_plain(name), _why(module, (args, kwargs)), tuple(index)))

        return hook

    # Before ZeRO's own hooks, which let the layer's weights go.
    handles = [
        module.register_forward_hook(looking_at(name), prepend=True, with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def broken_weights(model: nn.Module) -> str | None:
    """The first of the weights that lie here to hold NaN or infinity, and how many do; None where none does."""
    names = [name for name, p in model.named_parameters() if is_here(p) and not bool(p.detach().isfinite().all())]
    return f"{_plain(names[0])} holds NaN or infinity, one of {len(names)} such weights" if names else None


def _why(module: nn.Module, inputs: Any) -> str:
    weights = broken_weights(module)
    if weights is not None:
        return f"whose weight {weights}"
    if not all(bool(tensor.isfinite().all()) for tensor in _floats(inputs)):
        return "from an input that an operation between two layers, such as attention, has spoiled"
    parameters = list(module.parameters())
    return (
        "though its input and its weights are"
        if parameters and all(map(is_here, parameters))
        else ("though its input is")
    )


def _floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in an output or in the inputs of a layer."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in _floats(each)] if isinstance(value, list | tuple) else []


def _plain(name: str) -> str:
    """``name`` without the prefixes that PEFT puts before the model's own names."""
    return name.removeprefix("base_model.").removeprefix("model.")
