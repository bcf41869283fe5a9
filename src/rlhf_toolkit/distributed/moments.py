"""Weights and AdamW's moments, whole: from whatever holds parts of them to rank 0, and from rank 0 back.

Under ZeRO-3 a rank holds a part of every parameter, under ZeRO-2 a part of a flat vector of all of them, and without
DeepSpeed everything. What is whole fits all of these, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from rlhf_toolkit.distributed.collectives import all_gather, broadcast, flats_on_main, rank
from rlhf_toolkit.distributed.zero3 import element_count, full_shape, is_partitioned, own_part, whole
from rlhf_toolkit.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
"""AdamW's count of steps, by which it corrects its moments."""
Named = Sequence[tuple[str, nn.Parameter]]


class Part(NamedTuple):
    """Elements ``start`` and on of a flattened tensor, as many as ``values`` (n,) has."""

    values: Tensor
    start: int


class Gathered(NamedTuple):
    """Rank 0: the parts of all ranks, copied, of tensors that ``put_together`` makes whole: a copy of everything once
    more, which the run need not wait for. Other ranks: nothing."""

    flats: list[Tensor]
    """Of each rank its parts, flat and one after another, in float32 on the CPU."""
    layouts: list[list[tuple[str, int, int]]]
    """Of each rank and part the tensor's name, the part's first element in it, and its elements."""
    shapes: dict[str, tuple[int, ...]]

    def put_together(self) -> dict[str, Tensor]:
        """The whole tensors, in float32 on the CPU, by name."""
        found = {name: torch.empty(math.prod(shape)) for name, shape in self.shapes.items()}
        for layout, flat in zip(self.layouts, self.flats, strict=True):
            pieces: Iterable[Tensor] = flat.split([length for _, _, length in layout])
            for (name, start, length), piece in zip(layout, pieces, strict=True):
                found[name][start : start + length] = piece
        return {name: tensor.view(self.shapes[name]) for name, tensor in found.items()}


class _Holding(NamedTuple):
    """Where a parameter's moments lie on this rank: ``length`` elements from ``offset`` on of those of ``owner``, a
    parameter of AdamW's own, which are elements ``start`` and on of the parameter."""

    owner: Tensor
    offset: int
    length: int
    start: int


def weights_on_main(parameters: Named) -> Gathered:
    """Each parameter by name. A collective."""
    parts = {}
    for name, parameter in parameters:
        if is_partitioned(parameter):
            parts[name] = Part(*own_part(parameter))
        elif rank() == 0:
            parts[name] = Part(parameter.detach().flatten(), 0)
    return _gathered(parts, {name: full_shape(parameter) for name, parameter in parameters})


def moments_on_main(
    model: nn.Module, optimizer: torch.optim.Optimizer, parameters: Named
) -> tuple[Gathered, dict[str, float]]:
    """Each moment, under ``exp_avg.<name>`` and ``exp_avg_sq.<name>``; and on every rank the steps that AdamW has made
    for each parameter. Both are empty before the first step. A collective."""
    adamw, parts, steps = _adamw(model, optimizer), dict[str, Part](), dict[str, float]()
    for name, parameter in parameters:
        held = _holding(model, parameter)
        state = {} if held is None else adamw.state.get(held.owner, {})
        if held is None or STEP not in state:
            continue
        steps[name] = float(state[STEP])
        if rank() == 0 or isinstance(model, DeepSpeedEngine):
            for moment in MOMENTS:
                values = state[moment].detach().flatten()[held.offset : held.offset + held.length]
                parts[f"{moment}.{name}"] = Part(values, held.start)
    everyone = all_gather(steps)
    steps = {name: count for each in everyone for name, count in each.items()}
    shapes = {f"{moment}.{name}": full_shape(p) for moment in MOMENTS for name, p in parameters if name in steps}
    return _gathered(parts, shapes), steps


def require_moments(parameters: Named, steps: Mapping[str, float], moments: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a moment is missing or of another shape: to be asked by rank 0, before the others
    wait for what it reads."""
    known = {name: full_shape(parameter) for name, parameter in parameters}
    stranger = next((name for name in steps if name not in known), None)
    if stranger is not None:
        raise CheckpointError(f"the checkpoint's optimizer knows {stranger}, which is not trained here")
    for moment in MOMENTS:
        for name in steps:
            found = moments.get(f"{moment}.{name}")
            if found is None or tuple(found.shape) != known[name]:
                there = None if found is None else tuple(found.shape)
                raise CheckpointError(f"the checkpoint's {moment} of {name} has shape {there}, expected {known[name]}")


def restore_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Named,
    steps: Mapping[str, float],
    read: Callable[[str], Tensor],
) -> None:
    """Give AdamW the moments and ``steps`` that ``moments_on_main`` found; only rank 0 asks ``read`` for a moment.
    Nothing happens to parameters without steps. A collective."""
    adamw = _adamw(model, optimizer)
    for name, parameter in parameters:
        if name not in steps:
            continue
        held = _holding(model, parameter)
        state: dict[str, Tensor] | None = None
        if held is not None:
            state = cast(dict[str, Tensor], adamw.state[held.owner])
            if STEP not in state:  # as AdamW makes it
                state[STEP] = torch.tensor(0.0)
                state |= {name: torch.zeros_like(held.owner, memory_format=torch.preserve_format) for name in MOMENTS}
            state[STEP].fill_(steps[name])
        for moment in MOMENTS:
            value = broadcast(read(f"{moment}.{name}") if rank() == 0 else None, full_shape(parameter))
            if held is not None and state is not None:
                part = value.flatten()[held.start : held.start + held.length]
                state[moment].view(-1)[held.offset : held.offset + held.length].copy_(part)
    if isinstance(model, DeepSpeedEngine) and model.zero_optimization_stage() != 3 and steps:
        # ZeRO-2 looks for moments that are there already only at its first step, and would look no more.
        model.optimizer._lazy_init_hp_params_optimizer_state()


def restore_weights(parameters: Named, read: Callable[[str], Tensor]) -> None:
    """Set each parameter to what rank 0, and only rank 0, reads. Before there is an engine, which takes its own copies
    of what it then finds. A collective."""
    for name, parameter in parameters:
        value = broadcast(read(name) if rank() == 0 else None, full_shape(parameter))
        with whole([parameter], write=True), torch.no_grad():
            parameter.copy_(value)


def _adamw(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside of what accelerate and DeepSpeed have wrapped around it."""
    inner = model.optimizer if isinstance(model, DeepSpeedEngine) else optimizer
    return cast(torch.optim.Optimizer, getattr(inner, "optimizer", inner))


def _holding(model: nn.Module, parameter: nn.Parameter) -> _Holding | None:
    """Where this rank has moments of ``parameter``; None where it has none."""
    if not isinstance(model, DeepSpeedEngine):
        return _Holding(parameter, 0, parameter.numel(), 0)
    engine = model.optimizer
    if model.zero_optimization_stage() == 3:
        group, offset, length = engine.grad_position[engine.get_param_id(parameter)]
        start = rank() * int(length)
        used = min(int(length), max(0, element_count(parameter) - start))  # the last shard may be padded
        return _Holding(engine.fp32_partitioned_groups_flat[group], int(offset), used, start)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    owner = engine.single_partition_of_fp32_groups[mapping.param_group_index]
    return _Holding(owner, here.start, here.numel, there.start)


def _gathered(parts: Mapping[str, Part], shapes: dict[str, tuple[int, ...]]) -> Gathered:
    """The ``parts`` of all ranks, on rank 0. A collective."""
    layouts = all_gather([(name, part.start, len(part.values)) for name, part in parts.items()])
    flats = flats_on_main([part.values for part in parts.values()])
    return Gathered(flats, layouts, shapes) if rank() == 0 else Gathered([], [], {})
