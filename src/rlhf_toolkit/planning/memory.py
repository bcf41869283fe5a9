"""How a rollout uses memory, and the choice that follows: window or stream, and how many slots.

A rollout needs, beside what already lies on the device (shards, adapters, optimizer):

    window    the part of the base that other ranks hold  +  slots x slot_bytes  +  scratch_bytes
    stream    what streaming keeps gathered               +  slots x slot_bytes  +  scratch_bytes

The window is faster, since the base is gathered once and not once a token; it is chosen where it fits with as many
slots as there are rows, or at least ``ENOUGH_SLOTS``. Numbers of bytes in, a decision out: nothing here measures or
allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_toolkit.errors import ConfigError

AUTO, WINDOW, STREAM = "auto", "window", "stream"
MODES = (AUTO, WINDOW, STREAM)
USABLE = 0.9  # of the free memory; the rest is for fragmentation and what nobody thought of
ENOUGH_SLOTS = 8  # with fewer slots in the window, streaming with more of them wastes less


@dataclass(frozen=True)
class RolloutNeeds:
    """Bytes on one rank. ``window_bytes``: what gathering the base adds; ``live_bytes``: what streaming keeps gathered
    at most; ``slot_bytes``: keys, values and logits of one sequence; ``scratch_bytes``: activations of a prefill or of
    a scoring pass."""

    window_bytes: int
    live_bytes: int
    slot_bytes: int
    scratch_bytes: int

    def total(self, mode: str, slots: int) -> int:
        """Bytes that a rollout in ``mode`` with ``slots`` needs."""
        base = self.window_bytes if mode == WINDOW else self.live_bytes
        return base + self.scratch_bytes + slots * self.slot_bytes

    def most_slots(self, mode: str, free: int) -> int:
        """How many slots fit into ``free`` bytes; below 1 where not even one does."""
        return int(free * USABLE - self.total(mode, 0)) // self.slot_bytes


@dataclass(frozen=True)
class Placement:
    """How rollouts run: ``mode`` (window or stream), ``slots`` on each rank, and the estimate behind it, in bytes."""

    mode: str
    slots: int
    needed: int
    free: int

    def description(self) -> str:
        """One line for the start of a run."""
        how = "base gathered once a rollout" if self.mode == WINDOW else "base streamed layer by layer"
        return f"rollout: {how}, {self.slots} slot(s), {_gib(self.needed)} GiB of {_gib(self.free)} free"


def place(
    needs: RolloutNeeds, *, free: int, rows: int, mode: str, slots: int | None, sharded: bool = True
) -> Placement:
    """Choose mode and slots for ``rows`` sequences a rank with ``free`` bytes.

    A mode or a number of slots that is given is kept, and its estimate reported. Without sharding there is nothing to
    stream. Raises ConfigError where what is given does not fit, or nothing does.
    """
    if mode == STREAM and not sharded:
        raise ConfigError(
            "rollout.mode=stream, but nothing is sharded here: streaming needs ZeRO-3; set rollout.mode: auto"
        )
    if mode == AUTO:
        enough = min(rows, slots or ENOUGH_SLOTS)
        mode = WINDOW if not sharded or needs.most_slots(WINDOW, free) >= enough else STREAM
    most = needs.most_slots(mode, free)
    wanted = min(rows, slots or max(most, 1))
    if most < wanted:
        raise ConfigError(
            f"a rollout in mode {mode} with {wanted} slot(s) needs {_gib(needs.total(mode, wanted))} GiB, but "
            f"{_gib(int(free * USABLE))} GiB are usable; {_way_out(needs, mode, free)}"
        )
    return Placement(mode, wanted, needs.total(mode, wanted), free)


def _way_out(needs: RolloutNeeds, mode: str, free: int) -> str:
    most = needs.most_slots(mode, free)
    if most >= 1:
        return f"set rollout.slots to {most} or less"
    if mode == WINDOW and needs.most_slots(STREAM, free) >= 1:
        return "set rollout.mode: stream"
    return "lower rollout.max_new_tokens or update.micro_batch_tokens, or take a smaller model"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"
