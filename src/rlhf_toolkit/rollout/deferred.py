"""What a rollout's only update says about it, in place of the role pass.

An update that is the rollout's only one, and one forward pass on each rank, has after that pass everything that rewards
and advantages need besides the reference. So neither policy nor value runs in the role pass: the ranks exchange what
the update's pass says, and the backward follows. In the step of bench/versus_trl.py this saves 1.8 of 10 seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rlhf_toolkit.data.layout import stack_rows
from rlhf_toolkit.distributed.collectives import all_gather
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.rollout.role_pass import gathered_outputs
from rlhf_toolkit.rollout.sampled import Sampled
from rlhf_toolkit.types import Experience, RolloutTokens


class DeferredExperience:
    """A rollout that waits for the forward pass of its only update.

    Args:
        sampled: the rollout of all ranks.
        outputs: what the role pass said: the reference's numbers, or nothing.
        finish: makes the experience.

    ``whole`` is the experience once it is complete.
    """

    whole: Experience | None = None

    def __init__(
        self, sampled: Sampled, outputs: RoleOutputs, finish: Callable[[Sampled, RoleOutputs], Experience]
    ) -> None:
        self._open: tuple[Sampled, RoleOutputs, Callable[[Sampled, RoleOutputs], Experience]] | None
        self._open = (sampled, outputs, finish)

    def complete(self, rows: Sequence[int], outputs: RoleOutputs) -> Experience:
        """The experience of the whole rollout, from what this rank's forward pass says about its ``rows``, laid out in
        rows. A collective, once: every rank comes with its own rows, and what was kept for this is let go.

        Where policy or value says NaN or infinity, so do rewards and advantages, and the update is left out. Raises
        RuntimeError, a defect, where the experience is complete already.
        """
        if self._open is None:
            raise RuntimeError("the rollout's experience is complete already")
        sampled, said_before, finish = self._open
        mine = outputs.each(lambda column: column.detach().cpu())
        everyone = said_before.and_of(gathered_outputs([(list(rows), mine)]))  # it is open still where this fails
        self._open = None
        self.whole = finish(sampled, everyone)
        return self.whole


class UpdatePolicyRecord:
    """Collects, micro-batch by micro-batch, what the policy says in the only update on a rollout that it did not see in
    the role pass, for the metrics of that rollout."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def keep(self, outputs: RoleOutputs, tokens: RolloutTokens) -> None:
        """Note a micro-batch's log-probs and entropies (n, R)."""
        columns = {
            "old_logprobs": outputs.policy_logprobs.detach(),
            "entropies": outputs.policy_entropies.detach(),
            "ref_logprobs": tokens.ref_logprobs,
            "rollout_logprobs": tokens.rollout_logprobs,
            "drawn_logprobs": tokens.drawn_logprobs,
            "token_mask": tokens.token_mask,
            "trained": tokens.response_mask,
        }
        self._parts.append({name: column.cpu() for name, column in columns.items() if column is not None})

    def take(self) -> dict[str, Any]:
        """The columns of the whole rollout of all ranks, as ``policy_metrics`` takes them; forgets them. A
        collective."""
        parts = [part for share in all_gather(self._parts) for part in share]
        self._parts = []
        return {name: stack_rows([part[name] for part in parts], fill=0) for name in parts[0]}
