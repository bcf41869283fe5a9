"""What supervised trainers minimise: SFT, reward model and DPO, each from one forward of its roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from rlhf_toolkit.algorithms.preference_losses import DPO_LOSSES, bradley_terry, implicit_rewards, share_above
from rlhf_toolkit.data.items import Batch
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import POLICY, REFERENCE, REWARD
from rlhf_toolkit.reporting.meters import Number


class Terms(NamedTuple):
    """A micro-batch's share of the mini-batch's loss, and sums with counts for the meter."""

    loss: Tensor
    metrics: dict[str, tuple[Number, Number]]


class Objective(Protocol):
    """A loss with the roles it needs."""

    @property
    def prefix(self) -> str:
        """What the names of its metrics begin with."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its forward pass."""

    def terms(self, outputs: RoleOutputs, batch: Batch) -> Terms:
        """The loss of a micro-batch, divided by the counts of the whole mini-batch, from what ``SharedBase.forward``
        gives for ``roles``. An empty micro-batch gives 0 with a gradient of zeros."""


@dataclass(frozen=True)
class SFT:
    """``- sum log pi(token) / tokens`` over the tokens that are trained."""

    prefix: str = "sft"
    roles: tuple[str, ...] = (POLICY,)

    def terms(self, outputs: RoleOutputs, batch: Batch) -> Terms:
        """See ``Objective``."""
        trained = batch["trained"]
        rows = outputs.as_rows(batch["response_lengths"], trained.shape[1])
        logprobs, entropies = rows.policy_logprobs, rows.policy_entropies
        loss = -(logprobs * trained).sum()
        tokens = trained.sum()
        return Terms(
            loss / batch["token_count"], {"loss": (loss, tokens), "entropy": ((entropies * trained).sum(), tokens)}
        )


@dataclass(frozen=True)
class BradleyTerry:
    """``- log sigmoid(chosen - rejected - margin) + centring (chosen + rejected)^2``, mean over pairs."""

    centring: float
    prefix: str = "reward_model"
    roles: tuple[str, ...] = (REWARD,)

    def terms(self, outputs: RoleOutputs, batch: Batch) -> Terms:
        """See ``Objective``."""
        chosen, rejected = _pairs(outputs.reward_scores, batch)
        losses = bradley_terry(chosen, rejected, batch["margins"], centring=self.centring)
        loss = losses.sum() + 0.0 * outputs.reward_scores.sum()
        of_pairs = {
            "loss": losses,
            "accuracy": share_above(chosen, rejected),
            "margin": chosen - rejected,
            "chosen": chosen,
            "rejected": rejected,
        }
        return Terms(loss / batch["items"], _metered(of_pairs))


@dataclass(frozen=True)
class DPO:
    """DPO's loss of ``kind``, mean over pairs; the reference's log-probs come from the policy's own forward."""

    beta: float
    label_smoothing: float = 0.0
    kind: str = "sigmoid"
    prefix: str = "dpo"
    roles: tuple[str, ...] = (POLICY, REFERENCE)

    def terms(self, outputs: RoleOutputs, batch: Batch) -> Terms:
        """See ``Objective``."""
        trained = batch["trained"]
        rows = outputs.as_rows(batch["response_lengths"], trained.shape[1])
        policy = (rows.policy_logprobs * trained).sum(1)
        reference = (rows.reference_logprobs.detach() * trained).sum(1)
        (chosen, rejected), (ref_chosen, ref_rejected) = _pairs(policy, batch), _pairs(reference, batch)
        difference = (chosen - ref_chosen) - (rejected - ref_rejected)
        losses = DPO_LOSSES[self.kind](difference, beta=self.beta, label_smoothing=self.label_smoothing)
        of_chosen = implicit_rewards(chosen, ref_chosen, beta=self.beta)
        of_rejected = implicit_rewards(rejected, ref_rejected, beta=self.beta)
        of_pairs = {
            "loss": losses,
            "accuracy": share_above(of_chosen, of_rejected),
            "margin": of_chosen - of_rejected,
            "chosen": of_chosen,
            "rejected": of_rejected,
        }
        return Terms((losses.sum() + 0.0 * policy.sum()) / batch["items"], _metered(of_pairs))


def _pairs(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Chosen and rejected (P,) of values (2 P,); an empty micro-batch has one row that belongs to none."""
    pairs = values[: 2 * len(batch["margins"])].view(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _metered(of_pairs: Mapping[str, Tensor]) -> dict[str, tuple[Number, Number]]:
    return {name: (values.detach().sum(), float(len(values))) for name, values in of_pairs.items()}
