"""Moments that an optimizer keeps in 8 bits, as float32 and back.

bitsandbytes keeps, of each block of 256 elements as its optimizer sees them, the largest magnitude, and of each element
the number of an entry of a code book of 256: element = entry x magnitude. The largest entry below zero is not -1, so
that the magnitudes do not follow from the elements; with them and the same blocks the way back is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
PER_MAGNITUDE = 256
NUMBERS = {"exp_avg": "1", "exp_avg_sq": "2"}
"""bitsandbytes' names of the moments end with these."""


def stored(state: dict[str, Any], moment: str) -> Tensor:
    """Where ``moment`` lies: float32, or the codes."""
    found: Tensor = state[moment] if moment in state else state[f"state{NUMBERS[moment]}"]
    return found


def in_eight_bits(state: dict[str, Any]) -> bool:
    """Whether the moments are codes: bitsandbytes leaves small tensors in float32."""
    return stored(state, MOMENTS[0]).dtype == torch.uint8


def magnitudes(state: dict[str, Any], moment: str) -> Tensor:
    """Those of the blocks, (blocks,) in float32."""
    found: Tensor = state[f"absmax{NUMBERS[moment]}"]
    return found


def elements(state: dict[str, Any], moment: str, offset: int, length: int) -> Tensor:
    """``length`` elements from ``offset`` on of the flattened moment, in float32: a view where they are kept so."""
    part = stored(state, moment).detach().flatten()[offset : offset + length]
    if part.dtype != torch.uint8:
        return part
    scale = magnitudes(state, moment)
    blocks = torch.arange(offset, offset + length, device=scale.device) // PER_MAGNITUDE
    codes = part.to(scale.device).int()  # pages count as memory of the CPU
    return state[f"qmap{NUMBERS[moment]}"].to(scale.device)[codes] * scale[blocks]


def write_elements(state: dict[str, Any], moment: str, values: Tensor, scale: Tensor | None) -> None:
    """Make all of a moment that is kept in 8 bits ``values`` (n,), in blocks of the magnitudes ``scale`` (blocks,):
    exact for what ``elements`` gave. Without it each block is cut anew, by its largest element."""
    if scale is None:
        padded = torch.nn.functional.pad(values.abs(), (0, -len(values) % PER_MAGNITUDE))
        scale = padded.view(-1, PER_MAGNITUDE).amax(dim=1)
    each = scale.to(values.device).repeat_interleave(PER_MAGNITUDE)[: len(values)]
    book = state[f"qmap{NUMBERS[moment]}"].to(values.device)
    between = (book[1:] + book[:-1]) / 2
    codes = torch.bucketize(torch.where(each > 0, values / each, 0.0), between, out_int32=True)
    stored(state, moment).view(-1).copy_(codes)
    magnitudes(state, moment).copy_(scale)


def new_state(optimizer: Any, owner: Tensor) -> None:
    """Have bitsandbytes make the state of ``owner``, one of its parameters, before its first step. It asks only the
    group's settings that all groups share; under ZeRO-3 the groups are empty between steps."""
    group = optimizer.param_groups[0]
    before, group["params"] = group["params"], [owner]
    optimizer.init_state(group, owner, 0, 0)
    group["params"] = before


def magnitude_names(place: str, layout: Iterable[tuple[Any, ...]]) -> dict[str, str]:
    """Of each moment the name under which a checkpoint has the magnitudes of blocks that hold ``layout`` in this
    ``place``: another name for other blocks."""
    digest = hashlib.sha256(repr((place, *layout)).encode()).hexdigest()[:32]
    return {moment: f"absmax.{moment}.{digest}" for moment in MOMENTS}
