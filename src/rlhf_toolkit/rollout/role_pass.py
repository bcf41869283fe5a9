"""The role pass: the forward passes, without gradient, in which roles say their numbers about a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_toolkit.data.layout import Layout
from rlhf_toolkit.data.packing import Rows
from rlhf_toolkit.distributed.collectives import agreement, all_gather, rank
from rlhf_toolkit.distributed.streaming import in_step
from rlhf_toolkit.errors import NotFiniteError, shortened
from rlhf_toolkit.models.finite import WAYS_OUT, first_not_finite
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import POLICY, REFERENCE, REWARD, VALUE
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.rollout.cutting import Plan
from rlhf_toolkit.rollout.sampled import Sampled

PHASE = "the role pass"
ROLES = (POLICY, VALUE, REFERENCE)
"""The roles from whose numbers an experience is made."""


@dataclass(frozen=True)
class Needs:
    """What decides which roles must run before a rollout's first update.

    ``kl_asked``: the coefficient of the KL is not 0, or a controller may move it; ``kl_in_reward``: rewards need it;
    ``value``: advantages need it; ``old_logprobs``: the loss needs them before its own forward pass.
    """

    updates_per_rollout: int = 2
    kl_in_reward: bool = True
    kl_asked: bool = True
    value: bool = True
    old_logprobs: bool = False

    def roles(self, *, rollout: int, one_forward: bool) -> tuple[str, ...]:
        """The roles of rollout number ``rollout``'s role pass: those whose numbers its update does not make itself.

        In the first rollout all run, since ``PathChecks`` compares them. Later the reference runs where a KL is asked
        for, the value where advantages need it. The update, where it is the rollout's only one, makes the old log-probs
        itself, detached, unless rewards need their KL before it. Where it is also ``one_forward`` pass on each rank,
        the experience is deferred to it, and neither policy nor value runs before.
        """
        if rollout == 0:
            return tuple(role for role in ROLES if role != VALUE or self.value)
        only_one = self._only_update and one_forward
        own_logprobs = only_one or (self._only_update and not self._kl_shapes)
        needed = {
            POLICY: not own_logprobs,
            VALUE: self.value and not only_one,
            REFERENCE: self.kl_asked,
        }
        return tuple(role for role in ROLES if needed[role])

    def defers(self, *, rollout: int, one_forward: bool) -> bool:
        """Whether rewards and advantages of rollout number ``rollout`` wait for the update's forward pass."""
        return rollout > 0 and self._only_update and one_forward and (self.value or self._kl_shapes)

    @property
    def _only_update(self) -> bool:
        return self.updates_per_rollout == 1 and not self.old_logprobs

    @property
    def _kl_shapes(self) -> bool:
        return self.kl_in_reward and self.kl_asked


def run_role_pass(
    shared: SharedBase,
    sampled: Sampled,
    plan: Plan,
    layout: Layout,
    *,
    temperature: float,
    roles: Sequence[str],
) -> RoleOutputs:
    """What ``roles`` say about the rollout, in rows (B, R), the same on every rank, each of which runs its share of
    ``plan``. A collective. Without roles no pass runs. What one rank fails with, all raise.

    Raises NotFiniteError, on all ranks, where a role says NaN or infinity; not of the reward role, whose scores are
    rewards like others (``Sampled.plus``).
    """
    if not roles:
        return RoleOutputs()

    pace = in_step()  # while streaming every pass is a collective, in the window none is
    one = torch.ones(1, dtype=torch.long)

    def forward(sequences: Tensor, starts: Tensor, lengths: Tensor, asked: Sequence[str]) -> RoleOutputs:
        laid_out = layout(sequences, starts, lengths).to(next(shared.parameters()).device)
        found: RoleOutputs = shared(laid_out, roles=asked, temperature=temperature)
        return found

    def say(rows: Rows, asked: Sequence[str]) -> RoleOutputs:
        lengths, width = sampled.response_lengths[rows], sampled.rollout_logprobs.shape[1]
        outputs = RoleOutputs()
        for group in separate_passes(asked):
            idle = partial(forward, sampled.sequences[:1, :2], one, one, group)
            with nullcontext() if pace is None else pace.forward_pass(idle, from_root=True):
                outputs |= forward(sampled.sequences[rows], sampled.prompt_lengths[rows], lengths, group)
        return outputs.each(torch.Tensor.cpu).as_rows(lengths, width)

    with agreement(PHASE) if pace is None else pace.together(PHASE):
        mine = [(rows, say(rows, roles)) for part in plan.of_rank(rank()) for rows in part]
        if pace is not None:
            pace.until_others_finish(lambda: None)  # ranks run equally many: they only hear of a failure in the last
    outputs = gathered_outputs(mine)
    if REWARD not in roles and (fault := outputs.not_finite()) is not None:
        role, row = fault
        # All ranks know the row, so each runs the pass: that is right in the window and through a sharded model.
        place = first_not_finite(shared, lambda: say([row], (role,)))
        raise NotFiniteError(f"{described_fault(role, row, sampled)}: {place}; {WAYS_OUT}")
    return outputs


def separate_passes(roles: Sequence[str]) -> list[tuple[str, ...]]:
    """``roles`` in the forward passes that they share: those that an update trains in one, the reference in its own.

    A product's last bits depend on its number of rows. So the role pass has the rows of the update's own pass, which
    makes the first ratio exactly 1 also in bfloat16, wherever one product of one size always gives the same bits.
    """
    groups = (tuple(role for role in roles if role != REFERENCE), tuple(role for role in roles if role == REFERENCE))
    return [group for group in groups if group]


def gathered_outputs(mine: Sequence[tuple[Rows, RoleOutputs]]) -> RoleOutputs:
    """What roles say about the whole rollout, from what each rank knows about its rows. A collective."""
    shares = [share for of_rank in all_gather(mine) for share in of_rank]
    place = torch.tensor([row for rows, _ in shares for row in rows]).argsort()
    return RoleOutputs({name: torch.cat([outputs[name] for _, outputs in shares])[place] for name in shares[0][1]})


def described_fault(role: str, row: int, sampled: Sampled) -> str:
    """Which role's numbers are not finite, about which prompt and response."""
    numbers = "values" if role == VALUE else "log-probs"
    return (
        f"the {role}'s {numbers} are NaN or infinite for a response to prompt {int(sampled.groups[row])}, "
        f"{shortened(sampled.responses[row])}"
    )
