"""The few collectives the toolkit needs. With one process each is the identity, so callers never ask how many there
are."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlhf_toolkit.errors import RLHFError, described

T = TypeVar("T")


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


def largest(value: int) -> int:
    """The largest ``value`` of any rank; cheap enough to be asked before every forward pass."""
    if world_size() == 1:
        return value
    votes = torch.tensor([value], device="cuda" if dist.get_backend() == "nccl" else "cpu")
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
