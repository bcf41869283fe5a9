"""Sampler, experience maker and trainer from an experiment, its algorithm and its task: which number goes where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rlhf_toolkit.data.response_texts import ends_and_padding
from rlhf_toolkit.distributed.collectives import agreement, world_size
from rlhf_toolkit.distributed.topology import Topology, deepspeed_settings
from rlhf_toolkit.distributed.zero3 import element_count
from rlhf_toolkit.models.reward_model import load_reward_model
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.reporting.progress import Progress
from rlhf_toolkit.rollout.cutting import Cutting
from rlhf_toolkit.rollout.evaluated import HeldOut
from rlhf_toolkit.rollout.experience import ExperienceMaker
from rlhf_toolkit.rollout.loader import Schedule
from rlhf_toolkit.rollout.model_rewards import AdapterReward, ModelReward, TextReward
from rlhf_toolkit.rollout.path_checks import PathChecks
from rlhf_toolkit.rollout.prompt_source import PromptSource
from rlhf_toolkit.rollout.sampler import Sampler
from rlhf_toolkit.rollout.scored_sampler import ScoredSampler
from rlhf_toolkit.rollout.sizes import RolloutSize, reward_bytes
from rlhf_toolkit.runs.algorithm import Algorithm
from rlhf_toolkit.runs.arguments import training_arguments
from rlhf_toolkit.runs.memory import rollout_size
from rlhf_toolkit.runs.packing import packs
from rlhf_toolkit.runs.task import Task
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.trainers.ppo import PPOTrainer


@dataclass(frozen=True)
class Setup:
    """All that is known of a run before its model is loaded. Raises ConfigError where the environment cannot be called
    with the columns of the prompts."""

    experiment: Experiment
    algorithm: Algorithm
    topology: Topology
    task: Task

    def __post_init__(self) -> None:
        if self.algorithm.environment is not None:
            for first in (*self.task.prompts[:1], *self.task.held_out[:1]):
                self.algorithm.environment.require_columns(first.columns)

    def cutting(self, *, packing: bool) -> Cutting:
        """How rollouts are cut."""
        return Cutting(self.experiment.ppo.mini_batches, self.algorithm.role_tokens, packing, self.experiment.run.seed)


def make_ppo_trainer(setup: Setup, shared: SharedBase, progress: Progress) -> PPOTrainer:
    """The trainer of the roles in ``shared``, with an experience maker and Trainer's arguments."""
    experiment, algorithm = setup.experiment, setup.algorithm
    ppo, update, ranks = experiment.ppo, experiment.update, setup.topology.world_size
    sizes = [element_count(p) for group in shared.parameter_groups().values() for p in group]
    deepspeed = deepspeed_settings(
        setup.topology,
        rows_per_rank=experiment.mini_batch_rows // ranks,
        max_grad_norm=update.max_grad_norm,
        largest_adapter=max(sizes),
        trained=sum(sizes),
    )
    packing = packs(update.packing, shared)
    maker = make_experience_maker(setup, packing=packing, on_tokens=progress.on_tokens)
    maker.scored_sampler.clock.onlooker = progress
    return PPOTrainer(
        model=shared,
        args=training_arguments(
            experiment.run,
            update,
            deepspeed,
            rounds=ppo.num_rollouts,
            steps_per_round=experiment.updates_per_rollout,
            rows_per_rank=experiment.mini_batch_rows // ranks,
            learning_rate=update.policy_lr,
        ),
        processing_class=setup.task.tokenizer,
        maker=maker,
        loss=algorithm.loss,
        schedule=Schedule(ppo.num_rollouts, ppo.num_ppo_epochs, ppo.mini_batches),
        over_mini_batch=algorithm.over_mini_batch,
        held_out=HeldOut(setup.task.held_out, experiment.run.evaluation_samples, algorithm.passing),
        learning_rates={"policy": update.policy_lr, "value": update.value_lr, "value_head": update.value_head_lr},
        loraplus_lr_ratio=update.loraplus_lr_ratio,
        most_left_out=experiment.run.most_not_finite,
        callbacks=[progress],
    )


def make_experience_maker(setup: Setup, *, packing: bool, on_tokens: Callable[[int], None]) -> ExperienceMaker:
    """What turns prompts into experience. ``on_tokens`` hears how many tokens each step decodes."""
    rollout, algorithm, task = setup.experiment.rollout, setup.algorithm, setup.task
    return ExperienceMaker(
        make_scored_sampler(setup, packing=packing, on_tokens=on_tokens),
        PromptSource(
            task.prompts,
            task.schedule,
            rollout.responses_per_prompt,
            curriculum=None if algorithm.curriculum is None else algorithm.curriculum(task.prompts),
            replacement_rounds=rollout.replace_uniform_groups,
        ),
        algorithm.shaping,
        algorithm.needs,
        algorithm.new_kl_control(),
        checks=PathChecks(algorithm.first_ratio_tolerance),
        correction=algorithm.correction,
    )


def make_scored_sampler(
    setup: Setup, *, packing: bool, on_tokens: Callable[[int], None], trains: bool = True
) -> ScoredSampler:
    """What samples and scores, for training and for evaluation. Where nothing ``trains``, memory need not hold an
    update."""
    cutting, task = setup.cutting(packing=packing), setup.task
    model_rewards = make_model_rewards(setup, cutting)
    size = sampler_size(setup, model_rewards, packing=packing, trains=trains)
    return ScoredSampler(
        make_sampler(setup, size, on_tokens),
        task.reward,
        task.sampling,
        cutting,
        score_shaping=setup.algorithm.score_shaping,
        model_rewards=model_rewards,
        seed=setup.experiment.run.seed,
    )


def make_model_rewards(setup: Setup, cutting: Cutting) -> list[ModelReward]:
    """The rewards that are models; one with a base of its own is loaded here."""
    reward, model, rewards = setup.experiment.reward, setup.experiment.model, list[ModelReward]()
    if reward.adapter is not None:
        rewards.append(AdapterReward(reward.adapter_weight))
    if reward.model is not None:
        loaded = load_reward_model(
            reward.model,
            setup.topology,
            dtype=getattr(torch, model.dtype),
            trust_remote_code=model.trust_remote_code,
            revision=reward.model_revision,
        )
        with agreement("loading"):
            loaded.check_prompts((*setup.task.prompts, *setup.task.held_out))
        rewards.append(TextReward(loaded, reward.model_weight))
    return rewards


def sampler_size(
    setup: Setup, model_rewards: Sequence[ModelReward], *, packing: bool, trains: bool = True
) -> RolloutSize:
    """What bounds the memory of training and of evaluation: the larger of the two, with the largest reward model."""
    size = rollout_size(
        setup.experiment,
        setup.algorithm,
        setup.task.longest_prompt,
        ranks=world_size(),
        held_out=len(setup.task.held_out),
        packing=packing,
        trains=trains,
    )
    models = [reward.model.model for reward in model_rewards if isinstance(reward, TextReward)]
    on_cpu = setup.topology.device.type == "cpu"
    rewards = [reward_bytes(model, size.columns, on_cpu=on_cpu) for model in models]
    return replace(size, reward_bytes=max(rewards, default=0))


def make_sampler(setup: Setup, size: RolloutSize, on_tokens: Callable[[int], None]) -> Sampler:
    """What decodes, for training and for evaluation."""
    rollout, tokenizer = setup.experiment.rollout, setup.task.tokenizer
    return Sampler(
        tokenizer,
        size,
        mode=rollout.mode,
        slots=rollout.slots,
        weights=rollout.weights,
        on_tokens=on_tokens,
        environment=setup.algorithm.environment,
        left_out=ends_and_padding(tokenizer, setup.task.sampling.stop_ids) if rollout.keep_special_tokens else None,
    )
