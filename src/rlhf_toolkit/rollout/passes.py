"""Which roles score a rollout, and what they say about it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf_toolkit.models.shared_base import POLICY, REFERENCE, VALUE

SCORED_ROLES = (POLICY, VALUE, REFERENCE)
"""The order of their rows in a scoring pass."""


@dataclass(frozen=True)
class Passes:
    """What the roles say about a rollout, all (B, R) fp32 but ``final_values`` (B,), the value after the last token.

    None: the role did not run.
    """

    old_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    final_values: Tensor | None = None


def needed_roles(*, updates_per_rollout: int, kl_in_reward: bool, kl_asked: bool) -> tuple[str, ...]:
    """The roles that must score a rollout: value always; reference where a KL is asked for; policy unless its first
    update is its only one and no reward needs its KL: then the update's own log-probs, detached, are the old ones.

    ``kl_asked``: the coefficient is not 0, or a controller may move it.
    """
    policy = updates_per_rollout > 1 or (kl_in_reward and kl_asked)
    needed = {POLICY: policy, VALUE: True, REFERENCE: kl_asked}
    return tuple(role for role in SCORED_ROLES if needed[role])


def present(result: Tensor | None) -> Tensor:
    """What a role said that was asked for. Raises RuntimeError, a defect, where it did not run."""
    if result is None:
        raise RuntimeError("a pass is needed that the collector's roles leave out")
    return result
