"""From settings to an algorithm: every function and number that they stand for, found once, before a model is loaded.

Settings that would do nothing are refused here, and so are functions that cannot be found or called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS, WHITENED
from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL, FixedKL
from rlhf_toolkit.algorithms.policy_losses import AGGREGATION_OF, POLICY_LOSSES, SELECTORS
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.models.shared_base import ON_ADAPTER
from rlhf_toolkit.plugins import arguments_for, find, load_function, takes
from rlhf_toolkit.rewards.signatures import asked
from rlhf_toolkit.rollout.curriculum import CURRICULA, Curriculum
from rlhf_toolkit.rollout.curriculum import OFFERED as OFFERED_TO_CURRICULA
from rlhf_toolkit.rollout.evaluated import Passing
from rlhf_toolkit.rollout.loader import OverMiniBatch
from rlhf_toolkit.rollout.role_pass import Needs
from rlhf_toolkit.rollout.shaping import Estimator, ScoreShaping, Shaping
from rlhf_toolkit.rollout.turns import Environment
from rlhf_toolkit.settings.configs import DataConfig, PPOConfig, RewardConfig, RolloutConfig
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.idle import ABOUT_NEW_ADAPTERS, OF_THE_FOLDER, Idle, default_value, refuse_idle, value_of
from rlhf_toolkit.trainers.ppo_loss import PolicyLoss, PPOLoss
from rlhf_toolkit.types import Prompt

TOKEN_MEAN = "token-mean"
OF_ESTIMATORS, OF_LOSSES = ("gamma", "gae_lambda"), ("clip_range_low", "clip_range_high", "dual_clip")
OF_A_VALUE = (
    *("model.value_head_std", "ppo.value_coef", "ppo.value_clip_range", "update.value_lr", "update.value_head_lr"),
)


@dataclass(frozen=True)
class Algorithm:
    """What an experiment's settings stand for.

    Attributes:
        score_shaping: what happens to scores before they count.
        shaping: from scores to rewards and advantages, with the estimator in it.
        loss: the loss of a micro-batch, with the policy loss and the sampler's correction in it.
        over_mini_batch: what needs all rows of a mini-batch.
        needs: which roles must run before a rollout's update.
        update_roles: roles that share the tokens of an update's forward pass. Policy and value do, so that a value
            adapter adds itself to the memory and no activations.
        role_tokens: tokens of one role in a forward pass.
        new_kl_control: makes a controller of the KL's coefficient that has not been moved yet.
        first_ratio_tolerance: the largest mean |log ratio| before an update; None: what rounding explains.
        curriculum: makes of the prompts what chooses among them; None: the schedule does.
        environment: what answers the policy in the middle of a response, if anything does.
        passing: when a response passes, for pass@k and maj@k; None where the experiment does not say.
    """

    score_shaping: ScoreShaping
    shaping: Shaping
    loss: PPOLoss
    over_mini_batch: OverMiniBatch
    needs: Needs
    update_roles: int
    role_tokens: int
    new_kl_control: Callable[[], FixedKL | AdaptiveKL]
    first_ratio_tolerance: float | None
    curriculum: Callable[[Sequence[Prompt]], Curriculum] | None
    environment: Environment | None
    passing: Passing | None

    @property
    def correction(self) -> Correction:
        """Which weights correct for the sampler."""
        return self.loss.correction

    @property
    def trains_value(self) -> bool:
        """Whether a value is trained: where the estimator takes values."""
        return self.needs.value


def resolve(experiment: Experiment) -> Algorithm:
    """The algorithm that the experiment's settings stand for. A start calls this once, and runs a user's file once.

    Raises ConfigError for a function that cannot be found or called, and for a setting that would do nothing.
    """
    ppo, data, seed = experiment.ppo, experiment.data, experiment.run.seed
    estimator, policy_loss = estimator_of(ppo), policy_loss_of(ppo)
    if not (ppo.whiten_over == "rollout" or whitens(ppo)):
        raise ConfigError(
            f"ppo.whiten_over={ppo.whiten_over} does nothing: ppo.advantage={ppo.advantage} is not whitened; set "
            "whiten_advantages: true, or leave it at rollout"
        )
    trains_value = estimator.needs("values")
    refuse_idle(experiment, idle_under(experiment, trains_value=trains_value))
    update_roles = 2 if trains_value and experiment.model.value_on == ON_ADAPTER else 1
    return Algorithm(
        score_shaping=score_shaping_of(experiment.reward),
        shaping=shaping_of(ppo, experiment.reward, estimator),
        loss=loss_of(ppo, experiment.rollout, policy_loss),
        over_mini_batch=OverMiniBatch(whitens(ppo) and not over_rollout(ppo), policy_loss.select, seed),
        needs=Needs(
            updates_per_rollout=experiment.updates_per_rollout,
            kl_in_reward=ppo.kl_in == "reward",
            kl_asked=experiment.kl_asked,
            value=trains_value,
            old_logprobs=policy_loss.select is not None,
        ),
        update_roles=update_roles,
        role_tokens=experiment.update.micro_batch_tokens // update_roles,
        new_kl_control=kl_control_of(ppo),
        first_ratio_tolerance=ppo.first_ratio_tolerance,
        curriculum=curriculum_of(data, count=experiment.rollout.prompts_per_rollout, seed=seed),
        environment=environment_of(experiment.rollout, data.chat_template_kwargs),
        passing=passing_of(experiment.reward),
    )


# ---- the advantage estimator -----------------------------------------------------------------------------------------


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


def idle_under(experiment: Experiment, *, trains_value: bool) -> list[Idle]:
    """Which settings are idle because a value is trained, or because none is."""
    model, estimator = experiment.model, f"ppo.advantage={experiment.ppo.advantage}"
    new_value = trains_value and model.value_on == ON_ADAPTER and model.value_adapter is None
    named = f"model.policy_adapter={model.policy_adapter}"
    return [
        (
            not trains_value,
            ("model.value_adapter", "model.value_on"),
            f"{estimator} trains no value; leave it out, or use advantage: gae",
        ),
        (
            model.policy_adapter is not None and not new_value,
            ABOUT_NEW_ADAPTERS,
            f"no adapter is new, and that of {named} {OF_THE_FOLDER}",
        ),
    ]


def idle_numbers(experiment: Experiment, *, trains_value: bool) -> list[str]:
    """Lines that name numbers which are set and which nothing reads in this run. They are no mistake, since one file is
    run with several estimators, and ``rlhf evaluate`` may ask for samples; but they are to be said."""
    reasons = {
        f"ppo.advantage={experiment.ppo.advantage} trains no value": () if trains_value else OF_A_VALUE,
        f"model.value_on={experiment.model.value_on} gives the value no adapter": ("update.value_lr",)
        if trains_value and experiment.model.value_on != ON_ADAPTER
        else (),
        "evaluations sample nothing (run.evaluation_samples=0)": ()
        if experiment.run.evaluation_samples
        else ("reward.passes_at", "reward.answer"),
    }
    lines = []
    for reason, names in reasons.items():
        idle = [name for name in names if value_of(experiment, name) != default_value(experiment, name)]
        lines += [f"without effect, since {reason}: {', '.join(idle)}"] if idle else []
    return lines


def whitens(ppo: PPOConfig) -> bool:
    """Whether advantages are whitened."""
    return ppo.advantage in WHITENED if ppo.whiten_advantages is None else ppo.whiten_advantages


def over_rollout(ppo: PPOConfig) -> bool:
    """Whether what is whitened is a rollout at a time: a rollout's only mini-batch is the rollout."""
    return ppo.whiten_over == "rollout" or ppo.mini_batches == 1


def shaping_of(ppo: PPOConfig, reward: RewardConfig, estimator: Estimator) -> Shaping:
    """From scores to advantages, as the settings say."""
    return Shaping(
        estimator=estimator,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        kl_in_reward=ppo.kl_in == "reward",
        kl_estimator=ppo.kl_estimator,
        truncated=ppo.truncated,
        reward_scale=reward.scale,
    )


def score_shaping_of(reward: RewardConfig) -> ScoreShaping:
    """What happens to scores before they count, as the settings say."""
    return ScoreShaping(
        missing_eos_penalty=reward.missing_eos_penalty,
        overlong_buffer=reward.overlong_buffer,
        overlong_penalty=reward.overlong_penalty,
        clip=reward.clip,
        scale=reward.scale,
        whiten=reward.whiten,
    )


def kl_control_of(ppo: PPOConfig) -> Callable[[], FixedKL | AdaptiveKL]:
    """What makes a new controller of the KL's coefficient: one that stays, or one that follows ``kl_target``."""
    if ppo.kl_target is None:
        return partial(FixedKL, ppo.kl_coef)
    return partial(AdaptiveKL, ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)


# ---- the loss --------------------------------------------------------------------------------------------------------


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


def loss_of(ppo: PPOConfig, rollout: RolloutConfig, policy_loss: PolicyLoss) -> PPOLoss:
    """The loss of a micro-batch, as the settings say."""
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
        width=rollout.max_new_tokens,
        temperature=rollout.temperature,
        correction=Correction(ppo.importance_correction, cap=ppo.importance_cap, floor=ppo.importance_floor),
        policy_loss=policy_loss,
        kl_stop=ppo.kl_stop,
    )


def _refuse_idle(ppo: PPOConfig, setting: str, function: Any, names: tuple[str, ...]) -> None:
    """Raise ConfigError for a setting that was changed and that the chosen function does not take."""
    defaults = {each.name: each.default for each in fields(PPOConfig) if each.default is not MISSING}
    for name in names:
        if getattr(ppo, name) != defaults[name] and not takes(function, name):
            raise ConfigError(
                f"ppo.{name}={getattr(ppo, name)} does nothing under ppo.{setting}={getattr(ppo, setting)}; "
                f"leave it at {defaults[name]}"
            )


# ---- what is around them ---------------------------------------------------------------------------------------------


def curriculum_of(data: DataConfig, *, count: int, seed: int) -> Callable[[Sequence[Prompt]], Curriculum] | None:
    """What makes a curriculum of the prompts, which chooses ``count`` for each rollout, unless the schedule does."""
    if data.curriculum is None:
        return None
    function = find(data.curriculum, CURRICULA, "data.curriculum")
    arguments_for(function, dict.fromkeys(OFFERED_TO_CURRICULA), data.curriculum_kwargs, setting="data.curriculum")
    return partial(Curriculum, function, count=count, seed=seed, kwargs=data.curriculum_kwargs)


def environment_of(rollout: RolloutConfig, values: Mapping[str, Any]) -> Environment | None:
    """What answers the policy in the middle of a response, if anything does; ``values`` go to the chat template.
    Raises ConfigError where it cannot be called with prompts, responses and the turn."""
    if rollout.environment is None:
        return None
    function = load_function(rollout.environment, "rollout.environment")
    if misfit := asked(function, besides=("turn",)).misfit:
        raise ConfigError(f"rollout.environment: {misfit}")
    name = f"rollout.environment={rollout.environment}"
    return Environment(function, rollout.max_turns, name, rollout.max_turn_tokens, values)


def passing_of(reward: RewardConfig) -> Passing | None:
    """When a response passes, for pass@k and maj@k; None where the settings do not say."""
    if reward.passes_at is None:
        return None
    return Passing(reward.passes_at, load_function(reward.answer, "reward.answer") if reward.answer else None)
