"""Which roles score a rollout, the pass in which they do, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_toolkit.data.layout import unpack
from rlhf_toolkit.data.packing import Rows
from rlhf_toolkit.distributed.collectives import all_gather, rank
from rlhf_toolkit.errors import NotFiniteError, shortened
from rlhf_toolkit.models.finite import WAYS_OUT, first_not_finite
from rlhf_toolkit.models.shared_base import POLICY, REFERENCE, REWARD, VALUE, SharedBase
from rlhf_toolkit.rollout.cutting import Layout, Plan
from rlhf_toolkit.rollout.sampled import Sampled

SCORED_ROLES = (POLICY, VALUE, REFERENCE)
"""Those that the role pass may ask."""


@dataclass(frozen=True)
class Passes:
    """What the roles say about a rollout, all (B, R) fp32 but ``final_values`` (B,), the value after the last token,
    and ``reward_scores`` (B,).

    None: the role did not run.
    """

    old_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    final_values: Tensor | None = None
    reward_scores: Tensor | None = None


@dataclass(frozen=True)
class Needs:
    """What decides which roles must score a rollout before its update.

    ``kl_asked``: the coefficient of the KL is not 0, or a controller may move it; ``kl_in_reward``: rewards need it;
    ``value``: advantages need it; ``old_logprobs``: the loss needs them before its own forward pass.
    """

    updates_per_rollout: int = 2
    kl_in_reward: bool = True
    kl_asked: bool = True
    value: bool = True
    old_logprobs: bool = False

    def roles(self, *, one_forward: bool) -> tuple[str, ...]:
        """The roles whose numbers the rollout's update does not make itself.

        The reference scores where a KL is asked for, the value where advantages need it. The update, where it is the
        rollout's only one, makes the old log-probs itself, detached, unless rewards need their KL before it. Where it
        is also ``one_forward`` pass on each rank, its log-probs and values become rewards and advantages between that
        pass and its backward (``Collector.complete``), and neither policy nor value scores.
        """
        completes = self._completes(one_forward)
        own_logprobs = completes or (self._only_update and not self._kl_shapes)
        needed = {
            POLICY: not own_logprobs or self.old_logprobs,
            VALUE: self.value and not completes,
            REFERENCE: self.kl_asked,
        }
        return tuple(role for role in SCORED_ROLES if needed[role])

    def incomplete(self, *, one_forward: bool) -> bool:
        """Whether rewards and advantages wait for the update's forward pass."""
        return self._completes(one_forward) and (self.value or self._kl_shapes)

    @property
    def everything(self) -> tuple[str, ...]:
        """All roles that there are."""
        return tuple(role for role in SCORED_ROLES if role != VALUE or self.value)

    @property
    def _only_update(self) -> bool:
        return self.updates_per_rollout == 1 and not self.old_logprobs

    @property
    def _kl_shapes(self) -> bool:
        return self.kl_in_reward and self.kl_asked

    def _completes(self, one_forward: bool) -> bool:
        return self._only_update and one_forward


def score(
    shared: SharedBase,
    sampled: Sampled,
    plan: Plan,
    layout: Layout,
    temperature: float,
    *,
    roles: Sequence[str] = SCORED_ROLES,
) -> Passes:
    """What ``roles`` say about the rollout, each rank about its share of ``plan``, gathered on every rank.

    Without roles no pass runs. Raises NotFiniteError, on all ranks, where a role says NaN or infinity.
    """
    if not roles:
        return Passes()
    mine = [rows for part in plan.of_rank(rank()) for rows in part]
    done = [(rows, _score_rows(shared, sampled, rows, layout, temperature, roles)) for rows in mine]
    passes = Passes(**gather_passes(done))
    fault = not_finite(passes)
    if fault is not None:
        role, row = fault
        # All ranks know the row, so each runs the pass: that is right in the window and through a sharded model.
        place = first_not_finite(shared, lambda: _score_rows(shared, sampled, [row], layout, temperature, (role,)))
        raise NotFiniteError(f"{described_fault(role, row, sampled)}: {place}; {WAYS_OUT}")
    return passes


SAID_BY = {
    "old_logprobs": POLICY,
    "ref_logprobs": REFERENCE,
    "values": VALUE,
    "final_values": VALUE,
    "reward_scores": REWARD,
}
"""The role whose word a column of ``Passes`` is."""


def not_finite(passes: Passes) -> tuple[str, int] | None:
    """The first role to have said NaN or infinity, and the first row about which it did."""
    for name, role in SAID_BY.items():
        column = getattr(passes, name)
        if column is not None and not column.isfinite().all():
            return role, int((~column.isfinite()).flatten(1 if column.ndim > 1 else 0).nonzero()[0, 0])
    return None


def described_fault(role: str, row: int, sampled: Sampled) -> str:
    """What a role said, about which prompt and response."""
    said = {VALUE: "values", REWARD: "scores"}.get(role, "log-probs")
    return (
        f"the {role}'s {said} are NaN or infinite for a response to prompt {int(sampled.groups[row])}, "
        f"{shortened(sampled.responses[row])}"
    )


def separate_passes(roles: Sequence[str]) -> list[tuple[str, ...]]:
    """``roles`` in the forward passes that they share: those that an update trains in one, the reference in its own.

    A product's last bits depend on its number of rows. So the role pass has the rows of the update's own pass, which
    makes the first ratio exactly 1 also in bfloat16, wherever one product of one size always gives the same bits.
    """
    groups = (tuple(role for role in roles if role != REFERENCE), tuple(role for role in roles if role == REFERENCE))
    return [group for group in groups if group]


def gather_passes(done: list[tuple[Rows, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Columns of ``Passes`` for the whole rollout, from what each rank knows about its rows. A collective."""
    items = [item for share in all_gather(done) for item in share]
    place = torch.tensor([row for rows, _ in items for row in rows]).argsort()
    return {name: torch.cat([results[name] for _, results in items])[place] for name in items[0][1]}


PACKED_RESULTS = {
    "policy_logprobs": "old_logprobs",
    "policy_entropies": "entropies",
    "reference_logprobs": "ref_logprobs",
    "values": "values",
}
"""What ``SharedBase.forward`` calls a result, and ``Passes``."""


def _score_rows(
    shared: SharedBase, sampled: Sampled, rows: Rows, layout: Layout, temperature: float, roles: Sequence[str]
) -> dict[str, Tensor]:
    lengths, width = sampled.response_lengths[rows], sampled.rollout_logprobs.shape[1]
    laid_out = layout(sampled.sequences[rows], sampled.prompt_lengths[rows], lengths)
    laid_out, out = laid_out.to(next(shared.parameters()).device), dict[str, Tensor]()
    for together in separate_passes(roles):
        out |= shared(laid_out, roles=together, temperature=temperature)
    results = {ours: unpack(out[name].cpu(), lengths, width) for name, ours in PACKED_RESULTS.items() if name in out}
    return results | {name: out[name].cpu() for name in ("final_values", "reward_scores") if name in out}
