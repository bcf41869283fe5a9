"""Whether sampling, role pass, update and reference see one policy, judged by what rounding does on this machine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from rlhf_toolkit.algorithms.deviation import Deviation
from rlhf_toolkit.distributed.collectives import rank
from rlhf_toolkit.errors import RunWarning, TrainingPathError
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import POLICY, REFERENCE, VALUE
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.rollout.cutting import Plan
from rlhf_toolkit.rollout.sampled import Sampled

NUDGED = 8  # one column of the embeddings in so many; from one in 1 to one in 576 the deviation is the same

WAY_OUT = "if rounding makes more of it here than was measured, set ppo.first_ratio_tolerance above"


class RolePass(Protocol):
    """The role pass over a rollout that is given already."""

    def __call__(self, plan: Plan, *, roles: Sequence[str]) -> RoleOutputs:
        """What ``roles`` say about the rows of ``plan``."""


@dataclass
class PathChecks:
    """The checks of a run. They stop it in its first rollout; later a difference is a warning, said once, and a metric.

    ``tolerance`` bounds the mean of abs(d) in place of what is measured, where the user has set it. ``rounding`` is
    what the first rollout of this process has shown in whose role pass the policy ran.
    """

    tolerance: float | None = None
    rounding: Deviation | None = None
    _warned: bool = field(default=False, init=False)

    def look(
        self, shared: SharedBase, sampled: Sampled, outputs: RoleOutputs, plan: Plan, role_pass: RolePass, rollout: int
    ) -> None:
        """Measure rounding, once and where the policy ran; ``role_pass`` repeats the role pass. A collective, inside
        the sampler's window.

        Raises TrainingPathError in rollout 0 where the model computes something else while it trains.
        """
        if self.rounding is not None or not outputs.says(POLICY):
            return
        mask, old = sampled.token_mask, outputs.policy_logprobs
        with nudged(shared.causal_lm.get_input_embeddings()):
            again = role_pass(plan, roles=(POLICY,))
        self.rounding = Deviation.between(again.policy_logprobs[mask], old[mask])
        # The ranks' first micro-batches again, once as they were and once in training mode: the same rows give the same
        # bits, or what this hardware makes of them, so that even little dropout shows.
        first = plan.first
        rows = sorted(row for share in first.batches[0] for micro in share for row in micro)
        roles = (POLICY, VALUE) if outputs.says(VALUE) else (POLICY,)
        mask, old = mask[rows], old[rows]
        repeated, training = [], shared.training
        try:
            for mode in (False, True):
                shared.train(mode)
                repeated.append(Deviation.between(role_pass(first, roles=roles).policy_logprobs[mask], old[mask]))
        finally:
            shared.train(training)
        unexplained = repeated[1].beyond(repeated[0])
        with self._stops_only_the_first(rollout):
            if unexplained is not None and self.tolerance is None:
                raise TrainingPathError(
                    f"the same rows give other log-probs while the model trains, by {unexplained}; it has dropout or "
                    "another noise that its config does not name: switch it off there, or set ppo.first_ratio_tolerance"
                )

    def check_role_pass(self, sampled: Sampled, outputs: RoleOutputs, rollout: int) -> None:
        """Sampling and training see one policy; before the first update the policy is the reference.

        Raises TrainingPathError in rollout 0.
        """
        if not outputs.says(POLICY):
            return
        mask = sampled.token_mask
        old = outputs.policy_logprobs[mask]
        gap = Deviation.between(sampled.rollout_logprobs[mask], old)
        with self._stops_only_the_first(rollout):
            if (unexplained := self._unexplained(gap)) is not None:
                raise TrainingPathError(
                    f"between sampling and the training pass the policy's log-probs differ by {unexplained}; likeliest "
                    "are dropout, a temperature on one side only, or an output layer that the toolkit does not know; "
                    f"{WAY_OUT} {gap.mean:.2g}"
                )
        if rollout == 0 and outputs.says(REFERENCE):
            found = Deviation.between(outputs.reference_logprobs[mask], old)
            if (unexplained := self._unexplained(found)) is not None:
                raise TrainingPathError(
                    f"before the first update the log-probs of policy and reference differ by {unexplained}; likeliest "
                    "are a policy that starts from an adapter which the reference lacks (set model.policy_adapter to "
                    f"it), another adapter, or dropout; {WAY_OUT} {found.mean:.2g}"
                )

    def check_first_ratio(self, logprobs: Tensor, old_logprobs: Tensor, rollout: int) -> Deviation:
        """The update's first log-probs (K,) are those of the role pass. Raises TrainingPathError in rollout 0."""
        found = Deviation.between(logprobs, old_logprobs)
        with self._stops_only_the_first(rollout):
            if (unexplained := self._unexplained(found)) is not None:
                raise TrainingPathError(
                    f"before any update the policy's log-probs differ from those at the rollout by {unexplained}, so "
                    "that the ratio is not 1; likeliest are dropout, a temperature on one side only, or an adapter "
                    f"that is missing or another one; {WAY_OUT} {found.mean:.2g}"
                )
        return found

    @contextmanager
    def _stops_only_the_first(self, rollout: int) -> Iterator[None]:
        """What is raised inside stops rollout 0. A run of days goes on: later it is a warning, said once."""
        try:
            yield
        except TrainingPathError as error:
            if rollout == 0:
                raise
            if not self._warned and rank() == 0:
                warnings.warn(f"rollout {rollout}: {error}", RunWarning, stacklevel=2)
            self._warned = True

    def _unexplained(self, found: Deviation) -> str | None:
        if self.tolerance is not None:
            return found.above(self.tolerance)
        return None if self.rounding is None else found.beyond(self.rounding)


@contextmanager
def nudged(embedding: nn.Module) -> Iterator[None]:
    """Inside, some numbers that ``embedding`` gives are off by one unit in the last place.

    All that follows is then rounded anew, as another kernel or another processor would, and the number of rows differs
    from that of an update's pass: what comes out differs from it as two right computations do.
    """

    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        factor = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
        factor[::NUDGED] += torch.finfo(output.dtype).eps
        factor[:: 2 * NUDGED] -= 2 * torch.finfo(output.dtype).eps
        return output * factor

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
