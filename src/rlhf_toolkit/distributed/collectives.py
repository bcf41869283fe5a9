"""The few collectives the toolkit needs. With one process each is the identity, so callers never ask how many there
are."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from rlhf_toolkit.distributed import stopping
from rlhf_toolkit.errors import (
    OutOfMemoryError,
    RewardError,
    RLHFError,
    StopAskedError,
    described,
    is_out_of_memory,
    users_stack,
)

T = TypeVar("T")
CHUNK = 2**24
"""Elements of a tensor that travel at a time: 64 MiB."""


class Failure(NamedTuple):
    """What a rank failed with, as the others can be told: a class that they know, message and traceback."""

    kind: type[RLHFError]
    message: str
    trace: str


class RankFailedError(Exception):
    """Ends what this rank does in a pass that another rank has failed in, which tells what has happened."""


class _Pass:
    """What this rank exchanges in a pass that all ranks run in step."""

    failed: Failure | None = None
    """What it has failed with, while it leads the others out."""
    made: list[list[Any]] | None = None
    """What ``all_gather`` has given, inside ``repeatable``."""
    again: ClassVar[deque[list[Any]]] = deque()
    """What it is to give once more, without asking anybody."""


def world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 to ``world_size() - 1``."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(value: T) -> list[T]:
    """Every rank's ``value`` in rank order, on every rank. Any picklable object; tensors come back on their own
    device. Raises RankFailedError, on all ranks, where one of them comes here only to lead the others out of a pass."""
    if world_size() == 1:
        return [value]
    if _Pass.again:
        return _Pass.again.popleft()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, _Pass.failed or value)
    if any(isinstance(found, Failure) for found in values):
        raise RankFailedError
    if _Pass.made is not None:
        _Pass.made.append(values)
    return values


@contextmanager
def repeatable() -> Iterator[None]:
    """A pass whose exchanges ``leading_out`` may have to repeat."""
    _Pass.made = []
    try:
        yield
    finally:
        _Pass.made = None


@contextmanager
def leading_out(failure: Failure) -> Iterator[None]:
    """Inside, the exchanges of ``repeatable`` so far give once more what they gave. Whoever exchanges anything after
    them with this rank leaves its pass with RankFailedError."""
    _Pass.failed, _Pass.again = failure, deque(_Pass.made or ())
    try:
        yield
    finally:
        _Pass.failed, _Pass.again = None, deque()


def from_main(value: T) -> T:
    """Rank 0's ``value`` on every rank."""
    return all_gather(value)[0]


def flats_on_main(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Rank 0: for each rank its ``tensors``, flat and one after another, in float32 on the CPU. Other ranks: nothing.

    Ranks may bring different numbers of elements, which travel ``CHUNK`` at a time, straight to their place. A
    collective.
    """
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors]) if tensors else torch.zeros(0)
    lengths = all_gather(len(flat))
    if rank() != 0:
        for chunk in flat.to(_device()).split(CHUNK):
            dist.send(chunk, dst=0)
        return []
    found = [flat.cpu(), *(torch.empty(length) for length in lengths[1:])]
    for source, whole in enumerate(found[1:], start=1):
        for place in whole.split(CHUNK):
            chunk = place.to(_device())
            dist.recv(chunk, src=source)
            place.copy_(chunk)
    return found


def broadcast(value: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
    """Rank 0's ``value``, in float32, on every rank; the others give None and know its ``shape``. A collective."""
    if world_size() == 1:
        assert value is not None, "rank 0 has the value"
        return value.float()
    tensor = torch.empty(tuple(shape), device=_device()) if value is None else value.float().to(_device()).contiguous()
    dist.broadcast(tensor, src=0)
    return tensor


def _device() -> str:
    """Where tensors lie that the process group moves."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def largest(value: int) -> int:
    """The largest ``value`` of any rank; cheap enough to be asked before every forward pass."""
    if world_size() == 1:
        return value
    votes = torch.tensor([value], device=_device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return int(votes.item())


def stop_together() -> None:
    """Raise StopAskedError, on all ranks, where one was asked to stop. A collective, cheap enough for every update."""
    number = largest(stopping.asked())
    if number:
        raise stopping.request(number)


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is True on any rank."""
    return bool(largest(int(flag)))


def barrier() -> None:
    """Return when every rank has come here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def agreement(phase: str) -> Iterator[None]:
    """Run rank-local work; if it raises on any rank, raise on all of them, with the original traceback.

    Without it the ranks that did not fail wait in the next collective until the process group times out. The block must
    hold no collective of its own: a rank that raised before it would leave the others waiting inside.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # handed on below, on every rank
        error = caught
    raise_together(phase, error)


def on_main(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 only and hand its result, or its error, to every rank."""
    result: T | None = None
    with agreement("the work that only it does"):
        if rank() == 0:
            result = action()
    return cast(T, from_main(result))


def raise_together(phase: str, error: Exception | None) -> None:
    """Raise this rank's ``error``; without one, what another rank failed with in ``phase``. A collective.

    A rank that was asked to stop fails with that. Where ranks fail in several ways, all raise the one that leaves least
    to do: nobody tries again or writes a checkpoint while others end.
    """
    if error is None and stopping.asked():
        error = stopping.request()
    mine = None if error is None else failure_of(error)
    failures = {number: found[0] for number, found in enumerate(all_gather([mine])) if found[0] is not None}
    chosen = min(failures, key=lambda number: (_order(failures[number]), number), default=None)
    if chosen is None:
        return
    first = failures[chosen]
    if first.kind is StopAskedError:
        raise StopAskedError(first.message)
    if error is None or mine is None or _order(mine) > _order(first):
        raise told_by(chosen, phase, first)
    raise OutOfMemoryError(mine.message) if mine.kind is OutOfMemoryError else error


def _order(failure: Failure) -> int:
    return {StopAskedError: 1, OutOfMemoryError: 2}.get(failure.kind, 0)


def told_by(number: int, phase: str, failure: Failure) -> RLHFError:
    """The error of this rank about what rank ``number`` failed with."""
    told = failure.kind(f"rank {number} failed in {phase}: {failure.message}")
    if failure.trace:  # not of a reward that has only returned what cannot be used
        told.add_note(f"--- traceback of rank {number} ---\n{failure.trace.rstrip()}")
    return told


def failure_of(error: Exception) -> Failure:
    """What other ranks are told of ``error``. A class that is not ours might not be known there."""
    trace = users_stack(error) if isinstance(error, RewardError) else "".join(traceback.format_exception(error))
    if isinstance(error, RLHFError):
        return Failure(type(error), str(error), trace)
    return Failure(OutOfMemoryError if is_out_of_memory(error) else RLHFError, described(error), trace)
