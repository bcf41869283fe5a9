"""Numbers on their way to a log record: weighted means over micro-batches and ranks, and wall-clock times of phases."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

Number = float | Tensor
"""A float, or a tensor of one element on whatever device."""


class Meter:
    """Sums and counts by name. The mean is over everything added on every rank, weighted by count.

    What is added as a tensor stays on its device until the meter is read: asking a GPU for each number would make the
    CPU wait, metric after metric, while it could be ahead with the next micro-batch.
    """

    def __init__(self, sums: Mapping[str, tuple[Number, Number]] = MappingProxyType({})) -> None:
        self._sums = dict(sums)

    @property
    def sums(self) -> Mapping[str, tuple[Number, Number]]:
        """Sums and counts so far, which what is added later does not change. Nothing is read from a device."""
        return dict(self._sums)

    def add(self, name: str, total: Number, count: Number) -> None:
        """Add ``total``, a sum over ``count`` things; both float or a tensor of one element. Sums are in float64."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + _wide(total), old_count + _wide(count))

    def absorb(self, other: Meter) -> None:
        """Add everything that ``other`` has."""
        for name, (total, count) in other._sums.items():
            self.add(name, total, count)

    def take(self) -> dict[str, tuple[float, float]]:
        """This rank's sums and counts, in one transfer; the meter is empty afterwards."""
        sums, self._sums = self._sums, {}
        return plain(sums)


def plain(sums: Mapping[str, tuple[Number, Number]]) -> dict[str, tuple[float, float]]:
    """A meter's sums and counts as floats, read from their device in one transfer."""
    numbers = [number for pair in sums.values() for number in pair]
    tensors = [number for number in numbers if isinstance(number, Tensor)]  # which lie on one device
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    floats = [next(read) if isinstance(number, Tensor) else number for number in numbers]
    return dict(zip(sums, zip(floats[::2], floats[1::2], strict=True), strict=True))


def shared_out(
    meters: Sequence[Mapping[str, Sequence[float]]], *, rank: int, ranks: int
) -> dict[str, tuple[float, float]]:
    """Of the sums of all ranks of a run that wrote a checkpoint those of ``rank`` of the ``ranks`` that go on: the very
    same where there are as many, otherwise all of them on rank 0."""
    if len(meters) == ranks:
        return {name: (float(total), float(count)) for name, (total, count) in meters[rank].items()}
    found: dict[str, tuple[float, float]] = {}
    for meter in meters if rank == 0 else ():
        for name, (total, count) in meter.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + total, before[1] + count)
    return found


def _wide(number: Number) -> Number:
    return number.detach().double() if isinstance(number, Tensor) else number


def combined(meters: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Means over the sums and counts of all ranks, by sorted name; a name that only some ranks saw is fine."""
    names = sorted({name for meter in meters for name in meter})
    means = {}
    for name in names:
        totals = [meter[name] for meter in meters if name in meter]
        count = sum(c for _, c in totals)
        means[name] = sum(t for t, _ in totals) / count if count else 0.0
    return means


class Onlooker(Protocol):
    """Who hears of a clock's phases."""

    def begins(self, phase: str, count: int) -> None:
        """A phase has begun that is about ``count`` things; 0: nobody counts them."""

    def advances(self) -> None:
        """One of them is done."""

    def ends(self, phase: str) -> None:
        """The phase has ended, well or not."""


class Clock:
    """Wall-clock seconds of named phases, added up until they are taken. ``onlooker`` hears of each."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()
        self.onlooker: Onlooker | None = None

    @contextmanager
    def phase(self, name: str, count: int = 0) -> Iterator[None]:
        """Time the block under ``name``; it is about ``count`` things, 0 where nobody counts them."""
        start = time.perf_counter()
        if self.onlooker is not None:
            self.onlooker.begins(name, count)
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            if self.onlooker is not None:
                self.onlooker.ends(name)

    @contextmanager
    def apart(self, name: str) -> Iterator[dict[str, float]]:
        """Time the block, which belongs to no step: neither the step around it nor the step's phases count it. At
        the end of the block the dict that it gives holds its seconds, under ``name``."""
        found: dict[str, float] = {}
        before, start = dict(self._seconds), time.perf_counter()
        try:
            with self.phase(name):
                yield found
        finally:
            found[name] = time.perf_counter() - start
            self._seconds, self._started = before, self._started + found[name]

    def advance(self) -> None:
        """One of the things is done that the phase is about."""
        if self.onlooker is not None:
            self.onlooker.advances()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, and ``step``, all the time between the two calls."""
        now = time.perf_counter()
        seconds, self._seconds = {**self._seconds, "step": now - self._started}, {}
        self._started = now
        return seconds


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory of this process so far: what was allocated on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
