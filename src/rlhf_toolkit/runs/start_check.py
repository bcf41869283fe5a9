"""A look at the engine of PPO before the first step, and a line about what runs where."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from rlhf_toolkit.distributed.topology import Topology, check_engine
from rlhf_toolkit.distributed.zero3 import element_count
from rlhf_toolkit.models.quantised import weight_count
from rlhf_toolkit.reporting.panel import end_panel
from rlhf_toolkit.rollout.role_pass import Needs
from rlhf_toolkit.texts import say
from rlhf_toolkit.trainers.ppo import PPOTrainer


class StartCheck(TrainerCallback):
    """Looks at the engine once it exists, and says on rank 0 what runs where."""

    def __init__(self, trainer: PPOTrainer, topology: Topology) -> None:
        self.trainer, self.topology = trainer, topology

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises TopologyError where the engine is not what was asked for."""
        check_engine(self.topology, self.trainer.model_wrapped)
        placement = self.trainer.maker.scored_sampler.sampler.place(self.trainer.model_wrapped)
        if self.topology.is_main:
            say(f"ranks: {self.description()}\n{placement.description()}")
            end_panel()

    def description(self) -> str:
        """One line: processes, sharding, sizes and cuts."""
        topology, cutting = self.topology, self.trainer.maker.scored_sampler.cutting
        stage = topology.launch.zero_stage
        trained = sum(element_count(p) for group in self.trainer.model.parameter_groups().values() for p in group)
        total = weight_count(self.trainer.model)
        sharding = f"ZeRO-{stage}" if stage else "no DeepSpeed"
        shared = self.trainer.model
        value = "the value head reads the policy's states; " if shared.value_borrows else ""
        return (
            f"{topology.world_size} process(es) on {topology.device.type}, {sharding}; "
            f"{total / 1e6:.1f}M parameters, {trained / 1e6:.2f}M trained; "
            f"{cutting.mini_batches} mini-batch(es) a pass, "
            f"micro-batches of at most {cutting.role_tokens} tokens a role; {value}"
            f"the role pass asks {role_pass_roles(self.trainer.maker.needs)}"
        )


def role_pass_roles(needs: Needs) -> str:
    """Which roles run in the role pass, in words."""
    usually, at_least = (", ".join(needs.roles(rollout=1, one_forward=alone)) or "nobody" for alone in (False, True))
    return usually if at_least == usually else f"{usually}; where an update is one pass, {at_least}"
