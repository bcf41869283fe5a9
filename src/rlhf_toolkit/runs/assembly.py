"""Collector, loss and Trainer from an experiment: the only place that knows which knob goes where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS, WHITENED
from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL, FixedKL
from rlhf_toolkit.algorithms.policy_losses import AGGREGATION_OF, POLICY_LOSSES, SELECTORS
from rlhf_toolkit.checkpoints import on_main
from rlhf_toolkit.settings.configs import PPOConfig
from rlhf_toolkit.distributed.collectives import world_size
from rlhf_toolkit.distributed.topology import Topology, deepspeed_settings
from rlhf_toolkit.distributed.zero3 import element_count
from rlhf_toolkit.errors import ConfigError, ModelError
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.models.attention import packing_obstacle
from rlhf_toolkit.models.reward_model import load_reward_model
from rlhf_toolkit.models.shared_base import ON_ADAPTER, SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.plugins import arguments_for, find, load_function, takes
from rlhf_toolkit.reporting.run_log import Progress
from rlhf_toolkit.rollout.experience import ExperienceMaker
from rlhf_toolkit.rollout.curriculum import CURRICULA, Curriculum
from rlhf_toolkit.rollout.cutting import Cutting
from rlhf_toolkit.rollout.evaluated import Passing
from rlhf_toolkit.rollout.loader import OverMiniBatch, Schedule
from rlhf_toolkit.rollout.model_rewards import AdapterReward, ModelReward, TextReward
from rlhf_toolkit.rollout.prompt_source import PromptSource
from rlhf_toolkit.rollout.role_pass import Needs
from rlhf_toolkit.rollout.scored_sampler import ScoredSampler
from rlhf_toolkit.rollout.path_checks import PathChecks
from rlhf_toolkit.rollout.sampler import Sampler
from rlhf_toolkit.rollout.shaping import Estimator, ScoreShaping, Shaping
from rlhf_toolkit.rollout.sizes import RolloutSize, reward_bytes
from rlhf_toolkit.rollout.turns import Environment
from rlhf_toolkit.runs.arguments import training_arguments
from rlhf_toolkit.trainers.ppo import HeldOut, PPOTrainer
from rlhf_toolkit.trainers.ppo_loss import PolicyLoss, PPOLoss
from rlhf_toolkit.runs.task import Task

TOKEN_MEAN = "token-mean"
OF_ESTIMATORS, OF_LOSSES = ("gamma", "gae_lambda"), ("clip_range_low", "clip_range_high", "dual_clip")


def estimator_of(ppo: PPOConfig) -> Estimator:
    """The advantage estimator that the settings name. Raises ConfigError where a setting would do nothing."""
    function = find(ppo.advantage, ADVANTAGE_ESTIMATORS, "ppo.advantage")
    estimator = Estimator(function, ppo.advantage_kwargs, whitens(ppo) and over_rollout(ppo))
    _refuse_idle(ppo, "advantage", function, OF_ESTIMATORS)
    if not estimator.needs("values"):
        idle = {"truncated": ppo.truncated == "bootstrap", "value_warmup_rollouts": ppo.value_warmup_rollouts > 0}
        for name, set_ in idle.items():
            if set_:
                raise ConfigError(
                    f"ppo.{name}={getattr(ppo, name)} needs a value function, but ppo.advantage={ppo.advantage} trains "
                    "none; drop it, or use advantage: gae"
                )
    elif ppo.truncated == "bootstrap" and not estimator.needs("bootstrap"):
        raise ConfigError(
            f"ppo.truncated=bootstrap does nothing under ppo.advantage={ppo.advantage}, which takes no bootstrap; use "
            "terminal or mask, or give the function that parameter"
        )
    return estimator


def check_algorithm(ppo: PPOConfig) -> None:
    """Raise ConfigError for an estimator or a loss that cannot be found or called, before anything is loaded."""
    estimator_of(ppo)
    policy_loss_of(ppo)
    if not (ppo.whiten_over == "rollout" or whitens(ppo)):
        raise ConfigError(
            f"ppo.whiten_over={ppo.whiten_over} does nothing: ppo.advantage={ppo.advantage} is not whitened; set "
            "whiten_advantages: true, or leave it at rollout"
        )


def whitens(ppo: PPOConfig) -> bool:
    """Whether advantages are whitened."""
    return ppo.advantage in WHITENED if ppo.whiten_advantages is None else ppo.whiten_advantages


def over_rollout(ppo: PPOConfig) -> bool:
    """Whether what is whitened is a rollout at a time: a rollout's only mini-batch is the rollout."""
    return ppo.whiten_over == "rollout" or ppo.mini_batches == 1


def policy_loss_of(ppo: PPOConfig) -> PolicyLoss:
    """The policy loss that the settings name. Raises ConfigError where a setting would do nothing."""
    function = find(ppo.policy_loss, POLICY_LOSSES, "ppo.policy_loss")
    _refuse_idle(ppo, "policy_loss", function, OF_LOSSES)
    if ppo.importance_correction != "none" and not takes(function, "weights"):
        raise ConfigError(
            f"ppo.importance_correction={ppo.importance_correction} weighs tokens, but ppo.policy_loss="
            f"{ppo.policy_loss} takes no weights; set the correction to none, or give the function that parameter"
        )
    select = SELECTORS.get(ppo.policy_loss)
    if select is None and takes(function, "selected"):
        raise ConfigError(
            f"ppo.policy_loss={ppo.policy_loss} takes selected, but tokens are selected for {', '.join(SELECTORS)} "
            "only; choose them in the function"
        )
    if select is None:
        return PolicyLoss(function, ppo.policy_loss_kwargs)
    own = {name: value for name, value in ppo.policy_loss_kwargs.items() if not takes(select, name)}
    of_selector = {name: value for name, value in ppo.policy_loss_kwargs.items() if takes(select, name)}

    def selected(**offered: Any) -> Tensor:
        return select(**arguments_for(select, offered, of_selector, setting="ppo.policy_loss"))

    return PolicyLoss(function, own, selected)


def _refuse_idle(ppo: PPOConfig, setting: str, function: Any, names: tuple[str, ...]) -> None:
    """Raise ConfigError for a setting that was changed and that the chosen function does not take."""
    defaults = {each.name: each.default for each in fields(PPOConfig) if each.default is not MISSING}
    for name in names:
        if getattr(ppo, name) != defaults[name] and not takes(function, name):
            raise ConfigError(
                f"ppo.{name}={getattr(ppo, name)} does nothing under ppo.{setting}={getattr(ppo, setting)}; "
                f"leave it at {defaults[name]}"
            )


def make_trainer(
    experiment: Experiment, topology: Topology, task: Task, shared: SharedBase, progress: Progress
) -> PPOTrainer:
    """Collector, loss and Trainer arguments from the experiment, tied together."""
    ppo, update = experiment.ppo, experiment.update
    rates = {"policy": update.policy_lr, "value": update.value_lr, "value_head": update.value_head_lr}
    sizes = [element_count(p) for group in shared.parameter_groups().values() for p in group]
    deepspeed = deepspeed_settings(
        topology,
        rows_per_rank=experiment.mini_batch_rows // topology.world_size,
        max_grad_norm=update.max_grad_norm,
        largest_adapter=max(sizes),
        trained=sum(sizes),
    )
    packing = packs(experiment.update.packing, shared)
    return PPOTrainer(
        model=shared,
        args=training_arguments(
            experiment.run,
            update,
            deepspeed,
            rounds=ppo.num_rollouts,
            steps_per_round=experiment.updates_per_rollout,
            rows_per_rank=experiment.mini_batch_rows // topology.world_size,
            learning_rate=update.policy_lr,
        ),
        processing_class=task.tokenizer,
        maker=make_maker(experiment, topology, task, progress, packing=packing),
        loss=make_loss(experiment),
        schedule=Schedule(ppo.num_rollouts, ppo.num_ppo_epochs, ppo.mini_batches),
        over_mini_batch=over_mini_batch(experiment),
        held_out=HeldOut(task.held_out, experiment.run.evaluation_samples, passing_of(experiment)),
        learning_rates=rates,
        callbacks=[progress],
    )


def packs(wanted: str, model: SharedBase | WholeModel) -> bool:
    """Whether micro-batches are packed: as ``update.packing``, ``wanted``, says, and only where the model can. Prints
    what was chosen."""
    obstacle = packing_obstacle(model.causal_lm)
    if wanted == "on" and obstacle is not None:
        raise ModelError(f"update.packing=on, but {obstacle}; set it to auto or off")
    chosen = wanted != "off" and obstacle is None
    reason = f" ({obstacle})" if wanted == "auto" and obstacle is not None else ""
    words = "packed, shared prefixes once" if chosen else f"padded rows{reason}"
    on_main(lambda: print(f"micro-batches: {words}", flush=True))
    return chosen


def make_maker(
    experiment: Experiment, topology: Topology, task: Task, progress: Progress, *, packing: bool
) -> ExperienceMaker:
    """What turns prompts into experience."""
    ppo, rollout = experiment.ppo, experiment.rollout
    source = PromptSource(
        task.prompts,
        task.schedule,
        rollout.responses_per_prompt,
        curriculum_of(experiment, task),
        rollout.replace_uniform_groups,
    )
    return ExperienceMaker(
        make_responder(experiment, topology, task, progress, packing=packing),
        source,
        make_shaping(experiment),
        Needs(
            updates_per_rollout=experiment.updates_per_rollout,
            kl_in_reward=ppo.kl_in == "reward",
            kl_asked=experiment.kl_asked,
            value=estimator_of(ppo).needs("values"),
            old_logprobs=policy_loss_of(ppo).select is not None,
        ),
        FixedKL(ppo.kl_coef) if ppo.kl_target is None else AdaptiveKL(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon),
        checks=PathChecks(ppo.first_ratio_tolerance),
        correction=correction_of(ppo),
    )


def make_responder(
    experiment: Experiment, topology: Topology, task: Task, progress: Progress, *, packing: bool, trains: bool = True
) -> ScoredSampler:
    """What samples and scores, for training and for evaluation."""
    model_rewards = make_model_rewards(experiment, topology, packing=packing)
    return ScoredSampler(
        make_sampler(experiment, topology, task, progress, model_rewards, packing=packing, trains=trains),
        task.reward,
        task.sampling,
        make_cutting(experiment, packing=packing),
        score_shaping=make_score_shaping(experiment),
        model_rewards=model_rewards,
        seed=experiment.run.seed,
    )


def curriculum_of(experiment: Experiment, task: Task) -> Curriculum | None:
    """What chooses the prompts, unless the schedule does."""
    data, setting = experiment.data, "data.curriculum"
    if data.curriculum is None:
        return None
    function, count = find(data.curriculum, CURRICULA, setting), experiment.rollout.prompts_per_rollout
    return Curriculum(function, task.prompts, count, experiment.run.seed, data.curriculum_kwargs)


def make_cutting(experiment: Experiment, *, packing: bool) -> Cutting:
    """How rollouts are cut."""
    ppo, seed = experiment.ppo, experiment.run.seed
    return Cutting(ppo.mini_batches, tokens_of_a_role(experiment), packing, seed)


def tokens_of_a_role(experiment: Experiment) -> int:
    """Policy and value share the tokens of an update's forward pass, so that a value adapter adds itself to the memory
    and no activations."""
    trained = 2 if experiment.model.value_on == ON_ADAPTER and estimator_of(experiment.ppo).needs("values") else 1
    return experiment.update.micro_batch_tokens // trained


def make_model_rewards(experiment: Experiment, topology: Topology, *, packing: bool) -> list[ModelReward]:
    """The rewards that are models; one with a base of its own is loaded here."""
    reward, rewards = experiment.reward, list[ModelReward]()
    if reward.adapter is not None:
        rewards.append(AdapterReward(make_cutting(experiment, packing=packing), reward.adapter_weight))
    if reward.model is not None:
        model = load_reward_model(
            reward.model,
            topology,
            dtype=getattr(torch, experiment.model.dtype),
            trust_remote_code=experiment.model.trust_remote_code,
        )
        rewards.append(TextReward(model, reward.model_weight))
    return rewards


def make_shaping(experiment: Experiment) -> Shaping:
    """From scores to advantages, as the experiment says."""
    ppo = experiment.ppo
    return Shaping(
        estimator=estimator_of(ppo),
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        kl_in_reward=ppo.kl_in == "reward",
        kl_estimator=ppo.kl_estimator,
        truncated=ppo.truncated,
        reward_scale=experiment.reward.scale,
    )


def make_score_shaping(experiment: Experiment) -> ScoreShaping:
    """What happens to scores before they count."""
    reward = experiment.reward
    return ScoreShaping(
        missing_eos_penalty=reward.missing_eos_penalty,
        overlong_buffer=reward.overlong_buffer,
        overlong_penalty=reward.overlong_penalty,
        clip=reward.clip,
        scale=reward.scale,
        whiten=reward.whiten,
    )


def over_mini_batch(experiment: Experiment) -> OverMiniBatch:
    """What is done over all rows of a mini-batch."""
    ppo = experiment.ppo
    return OverMiniBatch(whitens(ppo) and not over_rollout(ppo), policy_loss_of(ppo).select, experiment.run.seed)


def passing_of(experiment: Experiment) -> Passing | None:
    """When a response passes, for pass@k and maj@k; None where the experiment does not say."""
    reward = experiment.reward
    if reward.passes_at is None:
        return None
    return Passing(reward.passes_at, load_function(reward.answer, "reward.answer") if reward.answer else None)


def correction_of(ppo: PPOConfig) -> Correction:
    """Which weights correct for the sampler."""
    return Correction(ppo.importance_correction, cap=ppo.importance_cap, floor=ppo.importance_floor)


def make_sampler(
    experiment: Experiment,
    topology: Topology,
    task: Task,
    progress: Progress,
    model_rewards: Sequence[ModelReward],
    *,
    packing: bool,
    trains: bool = True,
) -> Sampler:
    """What decodes, for training and for evaluation: as large as the larger of the two. Where nothing ``trains``,
    memory need not hold an update."""
    rollout = experiment.rollout
    longest = max(len(p.token_ids) for p in (*task.prompts, *task.held_out))
    size = rollout_size(
        experiment, longest, ranks=world_size(), held_out=len(task.held_out), packing=packing, trains=trains
    )
    models = [reward.model.model for reward in model_rewards if isinstance(reward, TextReward)]
    rewards = [reward_bytes(model, size.columns, on_cpu=topology.device.type == "cpu") for model in models]
    size = replace(size, reward_bytes=max(rewards, default=0))
    return Sampler(
        task.tokenizer,
        size,
        mode=rollout.mode,
        slots=rollout.slots,
        weights=rollout.weights,
        on_tokens=progress.on_tokens,
        environment=environment_of(experiment),
    )


def rollout_size(
    experiment: Experiment, longest: int, *, ranks: int, held_out: int, packing: bool, trains: bool = True
) -> RolloutSize:
    """The sizes that bound memory on one of ``ranks``, with prompts of at most ``longest`` tokens and ``held_out`` of
    them for evaluation."""
    rollout, budget = experiment.rollout, tokens_of_a_role(experiment)
    with_value = estimator_of(experiment.ppo).needs("values") and experiment.model.value_on == ON_ADAPTER
    roles = 2 if with_value else 1  # of an update's pass and of the largest role pass: the reference has one of its own
    columns, rows = longest + rollout.max_new_tokens, rollout.sequences // ranks
    evaluated = -(-held_out * max(1, experiment.run.evaluation_samples) // ranks)
    update = roles * tokens_of_a_pass(experiment.mini_batch_rows // ranks, columns, budget) if trains else 0
    # Evaluation and a reward adapter score with one role, and are not cut into mini-batches.
    whole = tokens_of_a_pass(max(evaluated, 0 if experiment.reward.adapter is None else rows), columns, budget)
    role_pass_tokens, role_pass_roles = max((update, roles), (whole, 1))
    return RolloutSize(
        rows=max(rows, evaluated),
        columns=columns,
        role_pass_tokens=role_pass_tokens,
        longest_prompt=longest,
        later_turns=rollout.environment is not None and rollout.max_turns > 1,
        role_pass_roles=role_pass_roles,
        update_tokens=update,
        update_roles=roles,
        checkpointing=experiment.model.gradient_checkpointing,
        packing=packing,
        responses=rollout.responses_per_prompt,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
    )


def tokens_of_a_pass(rows: int, columns: int, budget: int) -> int:
    """The most tokens of a role in one of the forward passes into which ``rows`` of at most ``columns`` tokens are cut:
    never more than all of them, nor less than one row, be the ``budget`` as it may."""
    return max(columns, min(budget, rows * columns))


def environment_of(experiment: Experiment) -> Environment | None:
    """What answers the policy in the middle of a response, if anything does."""
    rollout, setting = experiment.rollout, "rollout.environment"
    if rollout.environment is None:
        return None
    name = f"{setting}={rollout.environment}"
    return Environment(load_function(rollout.environment, setting), rollout.max_turns, name)


def make_loss(experiment: Experiment) -> PPOLoss:
    """The loss's knobs from the experiment."""
    ppo = experiment.ppo
    return PPOLoss(
        clip_range_low=ppo.clip_range_low,
        clip_range_high=ppo.clip_range_high,
        dual_clip=ppo.dual_clip,
        value_clip_range=ppo.value_clip_range,
        value_coef=ppo.value_coef,
        entropy_coef=ppo.entropy_coef,
        loss_aggregation=ppo.loss_aggregation or AGGREGATION_OF.get(ppo.policy_loss, TOKEN_MEAN),
        kl_in_loss=ppo.kl_in == "loss",
        kl_estimator=ppo.kl_estimator,
        value_warmup_rollouts=ppo.value_warmup_rollouts,
        width=experiment.rollout.max_new_tokens,
        temperature=experiment.rollout.temperature,
        correction=correction_of(ppo),
        policy_loss=policy_loss_of(ppo),
        kl_stop=ppo.kl_stop,
    )
