"""Passes that all ranks run in step, and how a rank that fails in the middle of one leads the others out of it.

ZeRO makes collectives of a forward and backward pass: a rank that raises between two of them leaves the others waiting
in the next. Which collectives there are, and how large they are, follows from the model and not from what it is given.
So the rank that failed puts the engine back to where it stood, and runs a pass over next to nothing in which the
collectives that it has taken part in are left out. What the others compute with its zeros is thrown away. After that
pass all ranks stand at one point, where they tell one another (``together``).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.runtime.zero import parameter_offload
from torch import nn

from rlhf_toolkit.distributed import stopping
from rlhf_toolkit.distributed.collectives import (
    Failure,
    RankFailedError,
    failure_of,
    largest,
    leading_out,
    raise_together,
    repeatable,
)
from rlhf_toolkit.distributed.zero3 import AVAILABLE, GONE, parameter_offload_of
from rlhf_toolkit.errors import OutOfMemoryError

T = TypeVar("T")
FAILED = 1000  # in a vote, above every signal's number
PLAIN = (int, bool, list, dict, tuple, deque)  # what DeepSpeed keeps about where a pass is; the rest are streams, locks
COLLECTIVES = (
    "all_reduce",
    "inference_all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "broadcast",
    "broadcast_object_list",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_base",
    "all_gather_coalesced",
    "all_gather_object",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "all_to_all",
    "barrier",
)
"""Methods of DeepSpeed's backend in which ranks meet."""


class Omitted:
    """Stands for the work of a collective that was left out."""

    def wait(self, *arguments: Any, **options: Any) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


class Issued:
    """The collectives that DeepSpeed has issued on this rank since ``begin``. The first ``leave_out`` of them can be
    left out when they come again."""

    def __init__(self) -> None:
        self.leave_out, self._inside = 0, False
        self._watched: object = None
        self.told: list[torch.Tensor | None] = []

    def begin(self) -> None:
        """Count from here on."""
        self.told = []
        backend = deepspeed_comm.cdb
        if backend is None or backend is self._watched:
            return
        self._watched = backend
        for name in COLLECTIVES:
            method = getattr(backend, name, None)
            if method is not None:
                setattr(backend, name, self._counted(name, method))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._inside:  # one that another is made of
                return method(*arguments, **options)
            if self.leave_out:
                told = self.told[-self.leave_out]
                self.leave_out -= 1
                for found in (options.get("output_tensor"), options.get("output"), *arguments[:1]):
                    if isinstance(found, torch.Tensor):
                        found.zero_()  # where the collective would have written: else there might be NaN
                if told is not None:
                    options["tensor"].copy_(told)
                return Omitted() if options.get("async_op") else None
            self._inside = True
            try:
                result = method(*arguments, **options)
            finally:
                self._inside = False
            # Not of one that raised: it was not issued. Ranks check by broadcasts that their modules are the same.
            self.told.append(options["tensor"].clone() if name == "broadcast" and "tensor" in options else None)
            return result

        return call


issued = Issued()


class Place:
    """Where an engine stands before a pass, so that it can be put back there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.offload = parameter_offload_of(model)
        self.stack = len(parameter_offload.FWD_MODULE_STACK)
        self.here: list[Any] = []
        self.coordinator: dict[str, Any] = {}
        if self.offload is not None:
            self.here = [p for p in self.offload.module.parameters() if p.ds_status is AVAILABLE]
            notes = vars(self.offload.get_param_coordinator())
            stand = {name: note for name, note in notes.items() if isinstance(note, PLAIN) or name.endswith("_mode")}
            self.coordinator = {name: _copied(note) for name, note in stand.items()}

    def put_back(self) -> None:
        """Undo what a pass that was broken off has left in the engine. What was whole and is not is zeros."""
        if self.offload is not None:
            self._put_parameters_back()
        if isinstance(self.model, DeepSpeedEngine):
            _clear_buckets(self.model.optimizer)
        for parameter in self.model.parameters():
            parameter.grad = None

    def settle(self) -> None:
        """On all ranks, after ``put_back``: what was whole is whole again with its own numbers, and the gradients of
        earlier micro-batches are dropped. A collective."""
        drop_gradients(self.model)
        if self.offload is None:
            return
        coordinator = self.offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        if self.here:
            self.here[0].partition(self.here)
            self.here[0].all_gather(self.here)

    def _put_parameters_back(self) -> None:
        assert self.offload is not None
        coordinator, here = self.offload.get_param_coordinator(), {id(p) for p in self.here}
        for module in self.offload.module.modules():  # ZeRO-3's notes in it about the pass that it is in
            for count in ("applied_pre_backward_ref_cnt", "ds_grads_remaining"):
                if count in module.__dict__:
                    setattr(module, count, 0)
            if "ds_recompute_parameters" in module.__dict__:
                module.__dict__["ds_recompute_parameters"].clear()
            if hasattr(module._parameters, "_in_forward"):
                module._parameters._in_forward = False
        for parameter in self.offload.module.parameters():
            parameter.ds_active_sub_modules.clear()
        coordinator._clean_inflight_param_registry()  # the other ranks have issued these too, or will
        for parameter in self.offload.module.parameters():
            if parameter.ds_status is not AVAILABLE:
                parameter.ds_status = GONE  # it failed on its way, before it was gathered
            if parameter.ds_status is AVAILABLE and id(parameter) not in here:
                parameter.partition()
            elif parameter.ds_status is not AVAILABLE and id(parameter) in here:
                parameter.data = torch.zeros(parameter.ds_shape, dtype=parameter.dtype, device=parameter.device)
                parameter.ds_status = AVAILABLE
        vars(coordinator).update({name: _copied(value) for name, value in self.coordinator.items()})
        del parameter_offload.FWD_MODULE_STACK[self.stack :]


def _copied(value: Any) -> Any:
    """A copy of a container, and of the queues in it, but of nothing else that is in it."""
    found = copy.copy(value)
    for key in found if isinstance(found, dict) else ():
        if isinstance(found[key], deque):
            found[key] = copy.copy(found[key])
    return found


def _clear_buckets(optimizer: Any) -> None:
    """Forget gradients that wait to be reduced, and how far a backward pass had come."""
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        clear = getattr(bucket, "clear_params", bucket.clear)  # under ZeRO-3 the buffer stays
        clear()
    reduced = getattr(optimizer, "params_already_reduced", {})
    for key in reduced if isinstance(reduced, dict) else range(len(reduced)):
        reduced[key] = False
    if hasattr(optimizer, "ready_for_gradients"):
        optimizer.ready_for_gradients = False  # ZeRO-2 takes new buffers in its next backward pass
    state = optimizer._backward_hook_state
    state.backward_active_depth = 0
    state.remaining_grad_acc_hooks = 0
    state.reset_for_new_step()


def drop_gradients(model: nn.Module) -> None:
    """Forget the gradients of the micro-batches so far, as if the optimizer had just stepped."""
    for parameter in model.parameters():
        parameter.grad = None
    if not isinstance(model, DeepSpeedEngine):
        return
    optimizer = model.optimizer
    _clear_buckets(optimizer)
    optimizer.zero_grad()
    if model.zero_optimization_stage() == 3:
        return  # its first micro-batch writes gradients instead of adding them
    optimizer.micro_step_id = -1
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids = set()
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None
    for group in optimizer.all_grad_tensors:
        optimizer.all_grad_tensors[group] = None


class Attempt:
    """A pass of this rank that may fail: begun when it is made."""

    def __init__(self, model: nn.Module) -> None:
        issued.begin()
        self.place = Place(model)

    def lead_out(self, idle: Callable[[], object], failure: Failure) -> None:
        """After a failure: go through the rest of the collectives that the other ranks wait in, by ``idle``."""
        self.place.put_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        issued.leave_out = len(issued.told)
        try:
            with leading_out(failure):
                idle()
        except RankFailedError:
            pass  # at an exchange within the pass, which all ranks leave there
        finally:
            issued.leave_out = 0


def together(
    model: nn.Module, run: Callable[[], T], idle: Callable[[], object], phase: str, *, may_stop: bool = True
) -> T:
    """Run ``run``, whose collectives are the same on all ranks; what it raises on any rank, all raise.

    ``idle`` is a pass with the same collectives over as little as possible. After a failure the engine stands where it
    stood before, without the gradients of any micro-batch. So it does after a pass that ``may_stop`` where a rank was
    asked to stop: all raise StopAskedError. A collective.
    """
    with repeatable():
        attempt, error, failure = Attempt(model), None, None
        try:
            result = run()
        except RankFailedError:
            pass
        except Exception as caught:
            failure = failure_of(caught)
            error = caught if failure.kind is not OutOfMemoryError else OutOfMemoryError(failure.message)
        if failure is not None:  # not above: there the traceback would keep the memory of the pass
            attempt.lead_out(idle, failure)
    most = largest(FAILED if failure is not None else stopping.asked() if may_stop else 0)
    if most:
        attempt.place.put_back()
        attempt.place.settle()
        raise_together(phase, error if most == FAILED else stopping.request(most))
    return result
