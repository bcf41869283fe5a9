"""What ``rlhf inspect`` replays: the forward pass and the loss of each kind of run, on micro-batches that were kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rlhf_toolkit.data.layout import Layout, packed_layout, padded_layout
from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.models.attention import packing_obstacle
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import POLICY, VALUE
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.runs.algorithm import loss_of, policy_loss_of
from rlhf_toolkit.runs.fine_tuning import load_trained_model, objective_of
from rlhf_toolkit.runs.ppo import load_ppo_roles
from rlhf_toolkit.settings.experiment import Experiment, FineTuning
from rlhf_toolkit.trainers.kept_batches import KeptBatch, Part
from rlhf_toolkit.trainers.objectives import Objective
from rlhf_toolkit.trainers.ppo_loss import PPOLoss
from rlhf_toolkit.types import Experience

SEQUENCES = ("sequences", "prompt_lengths", "response_lengths")
"""The columns that a forward pass reads."""
OF_PAIRS = ("reward_model", "dpo")


class Replay(Protocol):
    """The forward pass and the loss of a kind of run."""

    @property
    def model(self) -> SharedBase | WholeModel:
        """The base with what is trained on it."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its forward pass."""

    def say(self, part: Part, roles: tuple[str, ...]) -> RoleOutputs:
        """What ``roles`` say about a micro-batch, in a layout of its own rows."""

    def loss(self, part: Part) -> Tensor:
        """The micro-batch's share of the mini-batch's loss, as the run computed it."""

    def some_rows(self, part: Part, row: int) -> Part:
        """The micro-batch of ``row`` alone, and of what belongs to it, with the counts of the whole mini-batch."""


@dataclass
class PPOReplay:
    """PPO's; see ``Replay``."""

    model: SharedBase
    ppo_loss: PPOLoss
    layout: Layout
    device: torch.device
    roles: tuple[str, ...]
    details: Mapping[str, Any]

    def say(self, part: Part, roles: tuple[str, ...]) -> RoleOutputs:
        """See ``Replay``."""
        return said(self.model, part, padded_layout, roles, self.device, temperature=self.ppo_loss.temperature)

    def loss(self, part: Part) -> Tensor:
        """See ``Replay``. Old log-probs that the update made itself are its own, detached."""
        value, loss = VALUE in self.roles, self.ppo_loss
        outputs = loss.outputs(self.model, part, self.layout, value=value, device=self.device)
        batch = Experience.of({name: column.to(self.device) for name, column in part.items()})
        selected = part.get("selected")
        return loss.terms(
            batch,
            outputs,
            outputs.policy_logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs,
            selected=None if selected is None else selected.to(self.device),
            reduce=loss.reduction(part, batch.response_mask),
            kl_coef=float(self.details.get("kl_coef", 0.0)),
            policy_weight=float(self.details.get("policy_weight", 1.0)),
        ).loss

    def some_rows(self, part: Part, row: int) -> Part:
        """See ``Replay``."""
        count = len(part["sequences"])
        return {n: c[row : row + 1] if c.dim() and len(c) == count else c for n, c in part.items()}


@dataclass
class SupervisedReplay:
    """That of SFT, reward models and DPO; see ``Replay``."""

    model: SharedBase | WholeModel
    objective: Objective
    layout: Layout
    device: torch.device
    rows_of_item: int

    @property
    def roles(self) -> tuple[str, ...]:
        """See ``Replay``."""
        return self.objective.roles

    def say(self, part: Part, roles: tuple[str, ...]) -> RoleOutputs:
        """See ``Replay``."""
        return said(self.model, part, padded_layout, roles, self.device)

    def loss(self, part: Part) -> Tensor:
        """See ``Replay``."""
        outputs = said(self.model, part, self.layout, self.objective.roles, self.device)
        return self.objective.terms(outputs, {name: column.to(self.device) for name, column in part.items()}).loss

    def some_rows(self, part: Part, row: int) -> Part:
        """See ``Replay``. Both rows of a pair stay together."""
        item, size = row // self.rows_of_item, self.rows_of_item
        rows = slice(item * size, (item + 1) * size)
        of_rows = {name: part[name][rows] for name in (*SEQUENCES, "trained")}
        return {**part, **of_rows, "margins": part["margins"][item : item + 1]}


def replay_of(
    experiment: Experiment | FineTuning, batch: KeptBatch, config: PretrainedConfig, topology: Topology
) -> Replay:
    """The replay of the run's kind, on its base; what it has trained is not loaded yet."""
    if isinstance(experiment, Experiment):
        value = any("values" in part for part in batch.parts)
        model = load_ppo_roles(experiment, config, topology, value=value)
        loss = loss_of(experiment.ppo, experiment.rollout, policy_loss_of(experiment.ppo))
        roles = (POLICY, VALUE) if value else (POLICY,)
        return PPOReplay(model, loss, layout_of(experiment, model), topology.device, roles, batch.details)
    trained = load_trained_model(experiment, config, topology)
    size = 2 if batch.kind in OF_PAIRS else 1
    return SupervisedReplay(trained, objective_of(experiment), layout_of(experiment, trained), topology.device, size)


def layout_of(experiment: Experiment | FineTuning, model: SharedBase | WholeModel) -> Layout:
    """The layout of the run's own micro-batches."""
    packs = experiment.update.packing != "off" and packing_obstacle(model.causal_lm) is None
    return packed_layout if packs else padded_layout


def said(
    model: SharedBase | WholeModel,
    part: Part,
    layout: Layout,
    roles: tuple[str, ...],
    device: torch.device,
    **options: Any,
) -> RoleOutputs:
    """What ``roles`` say about a micro-batch, in one forward."""
    found: RoleOutputs = model(layout(*(part[name] for name in SEQUENCES)).to(device), roles=roles, **options)
    return found
