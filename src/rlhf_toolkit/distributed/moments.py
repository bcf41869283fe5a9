"""Weights and AdamW's moments, whole: from whatever holds parts of them to rank 0, and from rank 0 back.

Under ZeRO-3 a rank holds a part of every parameter, under ZeRO-2 a part of a flat vector of all of them, and without
DeepSpeed everything. What is whole fits all of these, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from rlhf_toolkit.distributed.collectives import all_gather, broadcast, flats_on_main, rank, world_size
from rlhf_toolkit.distributed.eight_bit import (
    MOMENTS,
    elements,
    in_eight_bits,
    magnitude_names,
    magnitudes,
    new_state,
    stored,
    write_elements,
)
from rlhf_toolkit.distributed.zero3 import element_count, full_shape, is_partitioned, own_part, whole
from rlhf_toolkit.errors import CheckpointError

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
    for each parameter. Both are empty before the first step. Of moments in 8 bits also the magnitudes of the blocks. A
    collective."""
    adamw, parts, steps = _adamw(model, optimizer), dict[str, Part](), dict[str, float]()
    for name, parameter in parameters:
        held = _holding(model, parameter)
        state = {} if held is None else adamw.state.get(held.owner, {})
        if held is None or STEP not in state:
            continue
        steps[name] = float(state[STEP])
        if rank() == 0 or isinstance(model, DeepSpeedEngine):
            for moment in MOMENTS:
                values = elements(state, moment, held.offset, held.length)
                parts[f"{moment}.{name}"] = Part(values, held.start)
    everyone = all_gather(steps)
    steps = {name: count for each in everyone for name, count in each.items()}
    shapes = {f"{moment}.{name}": full_shape(p) for moment in MOMENTS for name, p in parameters if name in steps}
    scales = {
        scale_name: magnitudes(adamw.state[owner], moment)
        for owner, names in _magnitude_names(model, adamw, parameters, steps)
        for moment, scale_name in names.items()
    }
    for found in all_gather({name: tuple(scale.shape) for name, scale in scales.items()}):
        shapes |= found
    if rank() == 0 or isinstance(model, DeepSpeedEngine):
        parts |= {name: Part(scale, 0) for name, scale in scales.items()}
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
    moments: Mapping[str, Tensor],
) -> bool:
    """Give AdamW the ``moments`` and ``steps`` that ``moments_on_main`` found; only rank 0 needs to have the moments.
    Nothing happens to parameters without steps. Returns whether all is as it was: moments in 8 bits are cut into blocks
    anew where ranks hold other parts than those that they came from. A collective."""
    adamw, wholes = _adamw(model, optimizer), dict[tuple[Tensor, str], Tensor]()
    for name, parameter in parameters:
        if name not in steps:
            continue
        held = _holding(model, parameter)
        if held is not None:
            _set_step(adamw, held.owner, steps[name])
        for moment in MOMENTS:
            value = broadcast(moments[f"{moment}.{name}"] if rank() == 0 else None, full_shape(parameter))
            if held is None:
                continue
            into, key = stored(adamw.state[held.owner], moment), (held.owner, moment)
            if in_eight_bits(adamw.state[held.owner]):  # their blocks go over the bounds of parameters
                into = wholes[key] if key in wholes else torch.zeros(into.numel())
                wholes[key] = into
            part = value.flatten()[held.start : held.start + held.length]
            into.view(-1)[held.offset : held.offset + held.length].copy_(part)
    as_it_was = _write_eight_bits(wholes, adamw, _magnitude_names(model, adamw, parameters, steps), moments)
    if isinstance(model, DeepSpeedEngine) and model.zero_optimization_stage() != 3 and steps:
        # ZeRO-2 looks for moments that are there already only at its first step, and would look no more.
        model.optimizer._lazy_init_hp_params_optimizer_state()
    return as_it_was


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


def _set_step(adamw: torch.optim.Optimizer, owner: Tensor, step: float) -> None:
    """The steps of one of the optimizer's parameters, whose moments are made where it has none."""
    state: dict[str, Any] = adamw.state[owner]
    if STEP not in state and hasattr(adamw, "init_state"):
        new_state(adamw, owner)
    elif STEP not in state:  # as AdamW makes it
        state[STEP] = torch.tensor(0.0)
        state |= {name: torch.zeros_like(owner, memory_format=torch.preserve_format) for name in MOMENTS}
    state[STEP] = state[STEP].fill_(step) if isinstance(state[STEP], Tensor) else int(step)


def _magnitude_names(
    model: nn.Module, adamw: torch.optim.Optimizer, parameters: Named, steps: Mapping[str, float]
) -> list[tuple[Tensor, dict[str, str]]]:
    """Each parameter of AdamW's own that has steps and moments in 8 bits, with the names of its blocks' magnitudes."""
    layouts: dict[Tensor, list[tuple[Any, ...]]] = {}
    for name, parameter in parameters:
        held = _holding(model, parameter) if name in steps else None
        if held is not None and in_eight_bits(adamw.state[held.owner]):
            layouts.setdefault(held.owner, []).append((name, held.offset, held.length, held.start))
    place = f"{rank()} of {world_size()}" if isinstance(model, DeepSpeedEngine) else "any rank"
    return [(owner, magnitude_names(place, layout)) for owner, layout in layouts.items()]


def _write_eight_bits(
    wholes: Mapping[tuple[Tensor, str], Tensor],
    adamw: torch.optim.Optimizer,
    found: Sequence[tuple[Tensor, dict[str, str]]],
    moments: Mapping[str, Tensor],
) -> bool:
    """Write the elements in ``wholes`` with the magnitudes in rank 0's ``moments``, or, where it lacks those of any
    rank, in blocks cut anew. Returns whether it has them all. A collective."""
    here = {names[moment]: (owner, moment) for owner, names in found for moment in MOMENTS}
    shapes: dict[str, tuple[int, ...]] = {}
    for each in all_gather({name: tuple(magnitudes(adamw.state[o], m).shape) for name, (o, m) in here.items()}):
        shapes |= each
    exact = bool(all_gather(all(name in moments for name in shapes))[0])
    scales = {}
    for name, shape in shapes.items() if exact else ():
        scale = broadcast(moments[name] if rank() == 0 else None, shape)
        if name in here:
            scales[name] = scale
    for name, (owner, moment) in here.items():
        write_elements(adamw.state[owner], moment, wholes[owner, moment], scales.get(name))
    return exact


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
