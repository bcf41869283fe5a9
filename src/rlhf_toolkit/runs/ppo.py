"""A run of PPO from one experiment: its parts of what ``start.prepare_run`` does, and the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, TrainerCallback

from rlhf_toolkit.checkpoints import base_fingerprint, fingerprint, folder_fingerprint
from rlhf_toolkit.distributed.collectives import agreement, on_main
from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.models.loading import build_ppo_roles
from rlhf_toolkit.models.roles import POLICY, VALUE
from rlhf_toolkit.models.shared_base import NOWHERE, ON_ADAPTER, SharedBase
from rlhf_toolkit.reporting.alarms import Alarms, Notify
from rlhf_toolkit.reporting.progress import Progress
from rlhf_toolkit.reporting.records import Record, write_summary
from rlhf_toolkit.reporting.sample_rows import with_columns
from rlhf_toolkit.rollout.model_rewards import TextReward
from rlhf_toolkit.runs.algorithm import idle_numbers, resolve
from rlhf_toolkit.runs.assembly import Setup, make_ppo_trainer
from rlhf_toolkit.runs.opening import Opening, adapters_text
from rlhf_toolkit.runs.run import Run
from rlhf_toolkit.runs.start import Kind, prepare_run
from rlhf_toolkit.runs.start_check import StartCheck
from rlhf_toolkit.runs.task import load_task
from rlhf_toolkit.runs.weights import load_adapted_base
from rlhf_toolkit.seeding import derive_seed
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.texts import say
from rlhf_toolkit.trainers.ppo import PPOTrainer


class PPORun(Run[Experiment, PPOTrainer]):
    """A prepared run of PPO. ``train`` runs it to its end and leaves adapters and ``summary.json`` in the folder."""

    def train(self) -> dict[str, Any]:
        """Evaluate, train, evaluate again, save; return the summary (an empty one on ranks other than 0)."""
        began, ended = time.perf_counter(), self.ended()
        try:
            if ended is None:
                self.fit()
        finally:
            self.trainer.maker.scored_sampler.scorer.close()
        if ended is not None:
            return self.finished(ended)
        self.trainer.save_model()
        if not self.topology.is_main:
            return {}
        seconds = time.perf_counter() - began
        summary = write_summary(
            self.folder, seconds=seconds, world_size=self.topology.world_size, device=str(self.topology.device)
        )
        return self.finished(summary)


def prepare(experiment: Experiment, *, resume: bool = False, overwrite: bool = False) -> PPORun:
    """Build the run on every rank. Raises a subclass of RLHFError for everything the user can mend."""
    return prepare_run(PPOKind, PPORun, experiment, resume=resume, overwrite=overwrite)


def load_ppo_roles(experiment: Experiment, config: PretrainedConfig, topology: Topology, *, value: bool) -> SharedBase:
    """The base with its adapters, one for a ``value`` where that is trained. They start from a derived seed, the same
    on every rank."""
    model = experiment.model
    base, adapter = load_adapted_base(model, config, topology)
    torch.manual_seed(derive_seed(experiment.run.seed, "adapters"))
    return build_ppo_roles(
        base,
        adapter,
        policy_adapter=model.policy_adapter,
        reference_adapter=model.policy_adapter,
        value_adapter=model.value_adapter,
        reward_adapter=experiment.reward.adapter,
        value_on=model.value_on if value else NOWHERE,
        gradient_checkpointing=model.gradient_checkpointing,
        value_head_std=model.value_head_std,
    )


class PPOKind(Kind[Experiment, Setup, SharedBase, PPOTrainer]):
    """PPO, whose records count rollouts."""

    def __init__(self, experiment: Experiment, topology: Topology) -> None:
        """Settle sizes and the algorithm. Raises ConfigError."""
        super().__init__(experiment, topology)
        experiment.check_processes(topology.world_size)
        with agreement("loading"):
            self.algorithm = resolve(experiment)
        idle = idle_numbers(experiment, trains_value=self.algorithm.trains_value)
        if idle:
            on_main(lambda: say("\n".join(idle)))

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps for each rollout."""
        return self.experiment.updates_per_rollout

    def load_data(self, config: PretrainedConfig) -> Setup:
        """Prompts, tokenizer and rewards."""
        task = load_task(self.experiment, config, self.topology)
        return Setup(self.experiment, self.algorithm, self.topology, task)

    def load_model(self, config: PretrainedConfig) -> SharedBase:
        """The base with its adapters."""
        return load_ppo_roles(self.experiment, config, self.topology, value=self.algorithm.trains_value)

    def opening(self, data: Setup) -> Opening:
        """The first prompt, and the adapters that are trained."""
        model, task = self.experiment.model, data.task
        adapters = (model.policy_adapter, model.value_adapter, self.experiment.reward.adapter)
        trained = [adapters_text(model, POLICY, model.policy_adapter)]
        if self.algorithm.trains_value:
            adapter = adapters_text(model, VALUE, model.value_adapter)
            trained.append(f"{adapter} and its head" if model.value_on == ON_ADAPTER else "the value's head")
        return Opening(
            task.tokenizer,
            task.sampling.stop_ids,
            task.prompts[0],
            self.experiment.data.chat_template_kwargs,
            ", ".join(trained),
            task.sampling.stop_strings,
            [*dict.fromkeys(folder for folder in adapters if folder is not None)],
        )

    def rounds(self, data: Setup) -> int:
        """The rollouts of the run."""
        return self.experiment.ppo.num_rollouts

    def make_trainer(self, data: Setup, model: SharedBase, progress: Progress) -> PPOTrainer:
        """The trainer with its experience maker."""
        return make_ppo_trainer(data, model, progress)

    def engine_check(self, trainer: PPOTrainer) -> StartCheck:
        """It also says what runs where."""
        return StartCheck(trainer, self.topology)

    def identity(self, data: Setup, model: SharedBase) -> dict[str, str]:
        """Also of the prompts, as rows and as tokens, and of the frozen adapters."""
        prompts, settings = data.task.prompts, self.experiment
        adapters = {"reference": settings.model.policy_adapter, "reward_adapter": settings.reward.adapter}
        return {
            **super().identity(data, model),
            "rows": fingerprint([each.index, each.messages or each.text, each.columns] for each in prompts),
            "tokens": fingerprint(each.token_ids for each in prompts),
            **on_main(lambda: {name: folder_fingerprint(path) for name, path in adapters.items() if path is not None}),
        }

    def alarms(self, notify: Notify) -> Sequence[TrainerCallback]:
        """Those of the section alarms."""
        alarms = self.experiment.alarms
        return [Alarms(alarms.limits, stop=alarms.stop, notify=notify)]

    def identity_of_rewards(self, trainer: PPOTrainer) -> dict[str, str]:
        """Of the reward model that has a base of its own."""
        rewards = trainer.maker.scored_sampler.model_rewards
        models = [reward.model.model for reward in rewards if isinstance(reward, TextReward)]
        weights = [each for model in models for each in model.named_parameters()]
        return {"reward_model": base_fingerprint("", weights)} if weights else {}

    def samples(self, trainer: PPOTrainer, kind: str) -> Sequence[Record]:
        """The first responses of the newest rollout or evaluation, with the columns of their prompts."""
        of_evaluation = kind == "eval"
        newest = trainer.evaluated_samples if of_evaluation else trainer.rollouts.newest.samples
        prompts = trainer.held_out.prompts if of_evaluation else trainer.maker.source.prompts
        chosen = newest[: self.experiment.run.samples]
        rows = {sample.get("row") for sample in chosen}
        return with_columns(chosen, {each.index: each.columns for each in prompts if each.index in rows})
