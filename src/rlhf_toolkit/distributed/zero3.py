"""ZeRO-3 in one place: how parameters get to where a forward pass needs them.

Two facts shape this file (docs/zero3.md has the measurements):
- ZeRO-3 fetches a module's *own* parameters when that module's ``forward`` is called. Role-sliced linears and the
  language-model head use a parameter of another module inside their own forward, so it is registered with them as an
  external parameter.
- A forward pass with ZeRO's hooks on inside a gather frees the weights again, so the window takes the hooks off first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero import GatheredParameters, register_external_parameter
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from rlhf_toolkit.distributed.collectives import rank, world_size

AVAILABLE, GONE = ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE
Hook = tuple[MutableMapping[int, Callable[..., Any]], int, Callable[..., Any]]
"""A module's hooks of one kind, a number in it, and the hook of that number."""


def share_parameters(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Tell ZeRO-3 that ``module.forward`` uses ``parameters`` although other modules own them. Harmless without
    ZeRO-3."""
    for parameter in parameters:
        register_external_parameter(module, parameter)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 manages this parameter, so that its data may be an empty tensor right now."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape as a whole, whatever part of it lies here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def element_count(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, whatever part of it lies here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def own_part(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """A flat part of the parameter that lies on this rank, and the number of its first element in the whole.

    The parts of all ranks put together are the parameter, each element once: ZeRO-3's shards without their padding, or
    equal shares of what every rank holds whole. Nothing is gathered or copied.
    """
    if is_partitioned(parameter):
        shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        start = rank() * shard.numel()
        return shard[: max(0, element_count(parameter) - start)], start
    share = -(-parameter.numel() // world_size())
    start = min(rank() * share, parameter.numel())
    return parameter.detach().flatten()[start : start + share], start


@contextmanager
def whole(parameters: Iterable[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Inside, ``parameters`` are whole tensors on every rank; with ``write``, what rank 0 wrote is what all keep.

    Parameters that ZeRO-3 does not manage are whole anyway: then every rank must write the same. To read, what lies
    here already (in the window, or because it is persistent) is left alone: gathers must not overlap.
    """
    managed = [p for p in parameters if is_partitioned(p) and (write or not is_here(p))]
    with GatheredParameters(managed, modifier_rank=0 if write else None, enabled=bool(managed)):
        yield


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The window: inside, the engine's whole model lies gathered on every rank and its forward needs no other rank.

    Ranks may run different numbers of forward passes inside. Hooks come off before the gather and go back on exactly
    once, also after an exception. Without ZeRO-3 this does nothing. Memory: one full copy of the model on each rank.
    """
    offload = parameter_offload_of(model)
    if offload is None:
        yield
        return
    hooks = _take_hooks_off(offload)
    try:
        # Persistent parameters (small ones, all adapters among them) are whole between steps. Gathering them would
        # partition them on exit, and the next forward would fetch them back one by one.
        with whole(p for p in offload.module.parameters() if not (p.ds_persist and is_here(p))):
            yield
    finally:
        for own, number, hook in hooks:
            own[number] = hook


def zero_stage(model: nn.Module) -> int:
    """The stage that the engine runs; 0 where it is none."""
    return int(model.zero_optimization_stage()) if isinstance(model, DeepSpeedEngine) else 0


def offloads_optimizer(model: nn.Module) -> bool:
    """Whether the optimizer's copies, gradients and moments lie in the machine's memory."""
    return isinstance(model, DeepSpeedEngine) and bool(model.zero_cpu_offload())


def is_sharded(model: nn.Module) -> bool:
    """Whether the engine runs ZeRO-3, so that a forward pass has to fetch parameters."""
    return parameter_offload_of(model) is not None


def is_here(parameter: nn.Parameter) -> bool:
    """Whether the parameter lies whole on this rank right now."""
    return not is_partitioned(parameter) or parameter.ds_status is AVAILABLE  # type: ignore[attr-defined]


def parameter_offload_of(model: nn.Module) -> DeepSpeedZeRoOffload | None:
    """What fetches the parameters of an engine that runs ZeRO-3; None of any other model."""
    if not isinstance(model, DeepSpeedEngine) or model.zero_optimization_stage() != 3:
        return None
    return model.optimizer.parameter_offload


def _take_hooks_off(offload: DeepSpeedZeRoOffload) -> list[Hook]:
    """Remove every hook ZeRO-3 has on a module; what is returned puts the very same ones back.

    Registering new ones instead would make ZeRO-3 forget the order in which modules run. It would learn the order again
    in the next micro-batch, and while it learns it frees persistent parameters too and keeps nothing for backward: all
    adapters would be gathered once more, one by one, and the output layer as well (bench/traffic.py).
    """
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    places = [(handle.hooks_dict_ref(), handle.id) for handle in handles]
    return [(hooks, number, hooks.pop(number)) for hooks, number in places]
