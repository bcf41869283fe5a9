"""How a rollout uses memory, and the choice that follows: window or stream, how many slots, how large a prefill.

A rollout needs, beside what already lies on the device (shards, adapters, optimizer):

    gathered  window: the part of the base that other ranks hold; stream: what streaming keeps gathered
    rollout   max(sampling, gathered + role pass, gathered + reward model)
    sampling  copies of weights + max(entering, choosing)
    entering  gathered + tokens of a prefill x (column_bytes + prefill_bytes) + slots x (slot_bytes + state_bytes)
    choosing  gathered + tokens of a prefill x column_bytes + slots x (slot_bytes + state_bytes + choice_bytes)

Slots are allocated once the first prefill is over: where all rows enter in that one, its activations and the slots are
never there together. While streaming, nothing is gathered when a token is chosen: the last layer has been let go.

The window is faster, since the base is gathered once and not once a token; it is chosen where it fits with as many
slots as there are rows, or at least ``ENOUGH_SLOTS``. Slots come before a large prefill: what is too long for one is
prefilled in several. Numbers of bytes in, a decision out: nothing here measures or allocates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from rlhf_toolkit.errors import ConfigError


class RolloutMode(StrEnum):
    """Whether a rollout gathers the base once (``window``) or decodes through its shards (``stream``); ``auto`` is
    what fits."""

    AUTO = "auto"
    WINDOW = "window"
    STREAM = "stream"


AUTO, WINDOW, STREAM = RolloutMode.AUTO, RolloutMode.WINDOW, RolloutMode.STREAM
USABLE = 0.9  # of the free memory; the rest is for fragmentation and what nobody thought of
ENOUGH_SLOTS = 8  # with fewer slots in the window, streaming with more of them wastes less
TOO_LARGE = "the base alone is too large: take more GPUs with a zero3 launch config, or a smaller model"
SHORTER = "lower data.max_prompt_tokens or rollout.max_new_tokens"
PREFILL_TOKENS = 16384  # of the prompts that enter at once, at most: more is not faster


@dataclass(frozen=True)
class RolloutNeeds:
    """What a rollout and its update need on one rank, in bytes where nothing else is said.

    Args:
        window_bytes: what gathering the base adds.
        live_bytes: the most that streaming keeps gathered.
        slot_bytes: keys and values of one sequence, and its states.
        choice_bytes: logits of one sequence while its next token is chosen.
        column_bytes: keys and values of one token of an entering prompt.
        prefill_bytes: what the pass over entering prompts holds for one token.
        longest_prompt: tokens that a prefill must hold at least.
        state_bytes: states of one sequence, once more: in the prefilled cache that enters, or in what a step makes.
        weights_bytes: copies of adapters that decoding makes.
        copied_bytes: copies of weights that decoding makes, in the window only.
        matrices_bytes: what the matrices of a quantised base take, which the window may keep; 0: it has none to keep.
        role_pass_bytes: a role pass, after sampling and the reward model.
        update_bytes: the update, after the rollout.
        streamed_update_bytes: the same where rollouts stream.
        activation_bytes: the part of ``update_bytes`` that grows with the micro-batch.
        later_bytes: what the first update will leave behind, and is not there yet.
        reward_bytes: a reward model and its pass, after sampling.
        micro_batch: the update.micro_batch_tokens that the update's largest pass comes to; ``activation_bytes`` are
            proportional to it.
        role_pass_batch: the same for the role pass and ``role_pass_bytes``.
        least_batch: the update.micro_batch_tokens that a pass with one row comes to.
        checkpointing: layers are computed again in backward already.
    """

    window_bytes: int
    live_bytes: int
    slot_bytes: int
    choice_bytes: int
    column_bytes: int
    prefill_bytes: int
    longest_prompt: int
    state_bytes: int = 0
    weights_bytes: int = 0
    copied_bytes: int = 0
    matrices_bytes: int = 0
    role_pass_bytes: int = 0
    update_bytes: int = 0
    streamed_update_bytes: int = 0
    activation_bytes: int = 0
    later_bytes: int = 0
    reward_bytes: int = 0
    micro_batch: int = 0
    role_pass_batch: int = 0
    least_batch: int = 0
    checkpointing: bool = False

    @property
    def after_sampling(self) -> int:
        """Bytes of the larger of reward model and role pass, beside the base."""
        return max(self.reward_bytes, self.role_pass_bytes)

    def sampling(self, mode: str, slots: int, prefill: int, rows: int) -> int:
        """Bytes that decoding ``rows`` sequences takes in ``mode``, with what is gathered."""
        held, columns = slots * self.slot_bytes, prefill * self.column_bytes + slots * self.state_bytes
        passing = columns + prefill * self.prefill_bytes
        enter_at_once = slots >= rows and prefill >= rows * self.longest_prompt  # so none is left for a second prefill
        if not enter_at_once:
            passing += held
        choosing = columns + held + slots * self.choice_bytes
        base = self.base(mode)
        return self._copies(mode) + max(base + max(passing, held), self._base_while_choosing(mode) + choosing)

    def base(self, mode: str) -> int:
        """Bytes that a rollout in ``mode`` has gathered or must leave free."""
        return self.later_bytes + (self.window_bytes if mode == WINDOW else self.live_bytes)

    def total(self, mode: str, slots: int, prefill: int, rows: int) -> int:
        """Bytes that a rollout needs."""
        return max(self.sampling(mode, slots, prefill, rows), self.base(mode) + self.after_sampling)

    def update(self, mode: str) -> int:
        """Bytes that an update needs, with what the first one leaves behind."""
        return self.later_bytes + (self.streamed_update_bytes if mode == STREAM else self.update_bytes)

    def most_slots(self, mode: str, free: int) -> int:
        """How many slots fit into ``free`` bytes, with the smallest prefill; below 1 where not even one does."""
        usable = int(free * USABLE)
        if usable < self.base(mode) + self.after_sampling:
            return 0
        usable -= self._copies(mode) + self.longest_prompt * self.column_bytes
        slot = self.slot_bytes + self.state_bytes
        while_entering = (usable - self.base(mode) - self.longest_prompt * self.prefill_bytes) // slot
        while_choosing = (usable - self._base_while_choosing(mode)) // (slot + self.choice_bytes)
        return max(0, min(while_entering, while_choosing))

    def largest_prefill(self, mode: str, slots: int, rows: int, free: int) -> int:
        """The largest prefill of ``rows`` that fits with ``slots``, of ``PREFILL_TOKENS`` halved again and again, and
        never less than the longest prompt."""
        wanted = PREFILL_TOKENS
        while wanted > self.longest_prompt:
            useful = min(wanted, slots * self.longest_prompt)
            if self.total(mode, slots, useful, rows) <= free * USABLE:
                return max(useful, self.longest_prompt)
            wanted //= 2
        return self.longest_prompt

    def _copies(self, mode: str) -> int:
        return self.weights_bytes + (self.copied_bytes if mode == WINDOW else 0)

    def _base_while_choosing(self, mode: str) -> int:
        return self.base(mode) if mode == WINDOW else self.later_bytes


@dataclass(frozen=True)
class Placement:
    """How rollouts run: ``mode`` (window or stream), ``slots`` on each rank, ``prefill_tokens`` of prompts that enter
    at once, and the estimate behind it, in bytes: of sampling, of the role pass, of the update, of what is free.
    ``keeps_matrices``: decoding makes those of a quantised base once, and not anew for every token."""

    mode: RolloutMode
    slots: int
    prefill_tokens: int
    needed: int
    free: int
    sampling: int = 0
    role_pass: int = 0
    update: int = 0
    keeps_matrices: bool = False

    def description(self) -> str:
        """One line for the start of a run."""
        how = "base gathered once a rollout" if self.mode == WINDOW else "base streamed layer by layer"
        how += " and dequantised once" if self.keeps_matrices else ""
        phases = f"sampling {_gib(self.sampling)}, role pass {_gib(self.role_pass)}, update {_gib(self.update)}"
        return (
            f"rollout: {how}, {self.slots} slot(s), {self.prefill_tokens} tokens a prefill; {phases} of "
            f"{_gib(self.free)} GiB free"
        )


def place(
    needs: RolloutNeeds, *, free: int, rows: int, mode: str, slots: int | None, sharded: bool = True
) -> Placement:
    """Choose mode, slots and prefill for ``rows`` sequences a rank with ``free`` bytes.

    A mode or a number of slots that is given is kept, and its estimate reported. Without sharding there is nothing to
    stream. Raises ConfigError where what is given does not fit, or nothing does, with the nearest setting that fits.
    """
    if mode == STREAM and not sharded:
        raise ConfigError(
            "rollout.mode=stream, but nothing is sharded here: streaming needs ZeRO-3; set rollout.mode: auto"
        )
    keeps_matrices = mode != STREAM and _keeps_matrices(needs, free, rows, slots)
    if keeps_matrices:
        needs = replace(needs, copied_bytes=needs.copied_bytes + needs.matrices_bytes)
    enough = min(rows, slots or ENOUGH_SLOTS)
    fits = WINDOW if not sharded or needs.most_slots(WINDOW, free) >= enough else STREAM
    chosen = fits if mode == AUTO else RolloutMode(mode)
    _refuse_update(needs, chosen, free)
    most = needs.most_slots(chosen, free)
    wanted = min(rows, slots or max(most, 1))
    if most < wanted:
        raise ConfigError(
            f"a rollout in mode {chosen} with {wanted} slot(s) needs "
            f"{_gib(needs.total(chosen, wanted, needs.longest_prompt, rows))} GiB, but "
            f"{_gib(int(free * USABLE))} GiB are usable; {_way_out(needs, chosen, free, sharded)}"
        )
    prefill = needs.largest_prefill(chosen, wanted, rows, free)
    return Placement(
        chosen,
        wanted,
        prefill,
        needs.total(chosen, wanted, prefill, rows),
        free,
        sampling=needs.sampling(chosen, wanted, prefill, rows),
        role_pass=needs.base(chosen) + needs.after_sampling,
        update=needs.update(chosen),
        keeps_matrices=keeps_matrices,
    )


def _keeps_matrices(needs: RolloutNeeds, free: int, rows: int, slots: int | None) -> bool:
    """Whether a quantised base becomes matrices once a rollout: where the window then has the slots that are asked for,
    or enough of them, and not less than half as many. To make them anew for every token takes longer than the products
    of few rows, which half the slots outweigh."""
    if not needs.matrices_bytes:
        return False
    wanted = min(rows, slots or rows)
    kept = replace(needs, copied_bytes=needs.copied_bytes + needs.matrices_bytes)
    most, without = (min(wanted, each.most_slots(WINDOW, free)) for each in (kept, needs))
    return most >= (wanted if slots else min(wanted, ENOUGH_SLOTS)) and 2 * most >= without


def _refuse_update(needs: RolloutNeeds, mode: str, free: int) -> None:
    """Raise ConfigError for an update that is larger than all that is free."""
    needed = needs.update(mode)
    if needed <= free:
        return
    room = free - (needed - needs.activation_bytes)
    way_out = TOO_LARGE
    if room > 0:
        fits = _tokens_that_fit(needs, needs.micro_batch, needs.activation_bytes, room)
        ways = [SHORTER if fits is None else f"set update.micro_batch_tokens to {fits} or less"]
        ways += [] if needs.checkpointing else ["set model.gradient_checkpointing: true"]
        way_out = ", or ".join(ways)
    raise ConfigError(
        f"an update with {needs.micro_batch} tokens in a forward pass needs {_gib(needed)} GiB, but {_gib(free)} GiB "
        f"are free; {way_out}"
    )


def _tokens_that_fit(needs: RolloutNeeds, tokens: int, taken: int, usable: int) -> int | None:
    """The update.micro_batch_tokens that fits into ``usable`` bytes, where ``tokens`` take ``taken`` bytes: whole
    hundreds, or what one row needs where that is more. None where one row alone is too large: a pass never has less."""
    fitting = tokens * max(usable, 0) // taken
    if fitting < max(needs.least_batch, 1):
        return None
    return max(needs.least_batch, fitting // 100 * 100 or fitting)


def _way_out(needs: RolloutNeeds, mode: str, free: int, sharded: bool) -> str:
    """The end of a message: the nearest setting that fits."""
    most = needs.most_slots(mode, free)
    if most >= 1:
        return f"set rollout.slots to {most} or less"
    if mode == WINDOW and sharded and needs.most_slots(STREAM, free) >= 1:
        return "set rollout.mode: stream"
    usable = int(free * USABLE) - needs.base(mode)
    if usable <= 0:
        return TOO_LARGE
    if needs.reward_bytes > usable:
        return f"reward.model alone needs {_gib(needs.reward_bytes)} GiB beside the base: take a smaller one"
    if needs.role_pass_bytes > usable:
        fits = _tokens_that_fit(needs, needs.role_pass_batch, needs.role_pass_bytes, usable)
        return SHORTER if fits is None else f"set update.micro_batch_tokens to {fits} or less"
    return f"{SHORTER}, or take a smaller model"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"
