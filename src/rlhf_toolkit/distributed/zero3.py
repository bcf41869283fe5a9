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

from rlhf_toolkit.distributed.collectives import largest, raise_together, rank, world_size

AVAILABLE, GONE = ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE
RESTS, GOES_ON, FAILED = range(3)
"""What a rank votes before a forward pass of a sharded model."""
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


class InStep:
    """All ranks run equally many forward passes through the sharded model: each pass is a collective of every layer.

    Ranks with work run theirs inside ``forward_pass``; a rank without calls ``until_others_finish`` once: it goes on
    with ``idle`` passes as long as any rank has work. So the end is a decision of all, and so is an end before its
    time: what one rank raises inside ``together``, all raise.
    """

    def __init__(self, new_pass: Callable[[], None]) -> None:
        self._new_pass, self._in_pass = new_pass, False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work with forward passes in it. A failure between two passes is voted; what fails within one, as memory does,
        is raised at once: the others wait in the middle of a layer, where only the end of this process reaches them."""
        error: Exception | None = None
        try:
            yield
        except _OtherRankFailedError:
            pass
        except Exception as caught:
            if self._in_pass:
                raise
            error = caught
            largest(FAILED)
        raise_together("sampling", error)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Around a forward pass of a rank that has work: its vote makes every other rank run one too."""
        self._vote(GOES_ON)
        self._new_pass()
        self._in_pass = True
        yield
        self._in_pass = False

    def until_others_finish(self, idle: Callable[[], object]) -> None:
        """Run ``idle`` as the partner of the other ranks' passes, for as long as any of them has work."""
        while self._vote(RESTS) == GOES_ON:
            self._new_pass()
            self._in_pass = True
            idle()
            self._in_pass = False

    def _vote(self, mine: int) -> int:
        most = largest(mine)
        if most == FAILED:
            raise _OtherRankFailedError
        return most


class _OtherRankFailedError(Exception):
    """Ends this rank's passes. The rank that failed tells what has happened."""


@contextmanager
def streamed(model: nn.Module) -> Iterator[InStep]:
    """For decoding through the sharded model, layer by layer, where the gathered base does not fit.

    ZeRO's hooks stay on. A pass that does not begin at the engine's root must be announced to ZeRO's coordinator, which
    counts modules from there.
    """
    offload = parameter_offload_of(model)
    yield InStep(lambda: None if offload is None else offload.get_param_coordinator().reset_step())


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
