"""Forward passes through a sharded model layer by layer, for which all ranks have to be in step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from rlhf_toolkit.distributed.attempt import Attempt, Place
from rlhf_toolkit.distributed.collectives import failure_of, largest, raise_together
from rlhf_toolkit.distributed.zero3 import parameter_offload_of

RESTS, GOES_ON, FAILED = range(3)
"""What a rank votes before a forward pass of a sharded model."""


class InStep:
    """All ranks run equally many forward passes through the sharded model: each pass is a collective of every layer.

    Ranks with work run theirs inside ``forward_pass``; a rank without calls ``until_others_finish`` once: it goes on
    with ``idle`` passes as long as any rank has work. So the end is a decision of all, and so is an end before its
    time: what one rank raises inside ``together``, all raise, also what it raises within a forward pass: ``idle``
    passes lead the others out of it. Without an ``engine`` nobody can be led.
    """

    def __init__(self, new_pass: Callable[[], None], engine: nn.Module | None = None) -> None:
        self._new_pass, self._engine, self._in_pass = new_pass, engine, False

    @contextmanager
    def together(self, phase: str = "sampling") -> Iterator[None]:
        """Work with forward passes in it. A failure is voted before the next pass, and all raise it."""
        error: Exception | None = None
        begin = None if self._engine is None else Place(self._engine)
        try:
            yield
        except _OtherRankFailedError:
            pass
        except Exception as caught:
            if self._in_pass:
                raise
            error = caught
            largest(FAILED)
        else:
            return raise_together(phase, None)
        if begin is not None:
            begin.put_back()
            begin.settle()
        raise_together(phase, error)

    @contextmanager
    def forward_pass(self, idle: Callable[[], object] | None = None, *, from_root: bool = False) -> Iterator[None]:
        """Around a forward pass of a rank that has work: its vote makes every other rank run one too. One that begins
        ``from_root`` of the engine's model announces itself to ZeRO.

        ``idle`` is a pass like it over as little as possible. Without one, what fails in the pass is raised at once,
        and the others wait in the middle of a layer, where only the end of this process reaches them.
        """
        self._vote(GOES_ON)
        if not from_root:
            self._new_pass()
        with self._passing(idle):
            yield

    def until_others_finish(self, idle: Callable[[], object]) -> None:
        """Run ``idle`` as the partner of the other ranks' passes, for as long as any of them has work."""
        while self._vote(RESTS) == GOES_ON:
            self._new_pass()
            with self._passing(idle):
                idle()

    @contextmanager
    def _passing(self, idle: Callable[[], object] | None) -> Iterator[None]:
        """Within a pass, and out of it again where ``idle`` leads the others to its end."""
        self._in_pass = True
        if self._engine is None or idle is None:
            yield
        else:
            attempt, failure = Attempt(self._engine), None
            try:
                yield
            except Exception as error:
                failure = failure_of(error)
                raise
            finally:
                if failure is not None:
                    attempt.lead_out(idle, failure)
                    self._in_pass = False
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
    new_pass = (lambda: None) if offload is None else offload.get_param_coordinator().reset_step
    pace = InStep(new_pass, None if offload is None else model)
    _open.append(pace)
    try:
        yield pace
    finally:
        _open.remove(pace)


_open: list[InStep] = []


def in_step() -> InStep | None:
    """How passes are run inside ``streamed``; None outside, where a pass needs no other rank."""
    return _open[-1] if _open else None
