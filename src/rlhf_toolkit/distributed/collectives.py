"""The few collectives the toolkit needs. With one process each is the identity, so callers never ask how many there
are."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from rlhf_toolkit.errors import RLHFError, described

T = TypeVar("T")
CHUNK = 2**24
"""Elements of a tensor that travel at a time: 64 MiB."""


def world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 to ``world_size() - 1``."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(value: T) -> list[T]:
    """Every rank's ``value`` in rank order, on every rank. Any picklable object; tensors come back on their own
    device."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Rank 0's ``value`` on every rank."""
    return all_gather(value)[0]


def flats_on_main(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Rank 0: for each rank its ``tensors``, flat and one after another, in float32 on the CPU. Other ranks: nothing.

    Ranks may bring different numbers of elements, which travel ``CHUNK`` at a time. A collective.
    """
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors]) if tensors else torch.zeros(0)
    if world_size() == 1:
        return [flat.cpu()]
    lengths = all_gather(len(flat))
    found = [torch.empty(length) for length in lengths] if rank() == 0 else []
    for begin in range(0, max(lengths), CHUNK):
        width = min(CHUNK, max(lengths) - begin)
        chunk = torch.zeros(width, device=_device())
        mine = flat[begin : begin + width]
        chunk[: len(mine)] = mine
        everyone = [torch.empty_like(chunk) for _ in lengths] if rank() == 0 else None
        dist.gather(chunk, everyone, dst=0)
        for whole, part in zip(found, everyone or [], strict=True):
            place = whole[begin : begin + width]
            place.copy_(part[: len(place)])
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
    """Raise this rank's ``error``; without one, what another rank failed with in ``phase``. A collective."""
    failures = all_gather(None if error is None else _failure(error))
    if error is not None:
        raise error
    for other, failure in enumerate(failures):
        if failure is not None:
            kind, message, trace = failure
            told = kind(f"rank {other} failed in {phase}: {message}")
            told.add_note(f"--- traceback of rank {other} ---\n{trace.rstrip()}")
            raise told


def _failure(error: Exception) -> tuple[type[RLHFError], str, str]:
    """Class, message and traceback for the other ranks. A class that is not ours might not be known there."""
    trace = "".join(traceback.format_exception(error))
    return (type(error), str(error), trace) if isinstance(error, RLHFError) else (RLHFError, described(error), trace)
