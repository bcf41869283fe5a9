"""Settings that another setting leaves without effect are refused, each by its name and with the way out.

A setting counts as set where it is not its default. A weight or coefficient of 0 switches its term off together with
what belongs to that term; that is a choice, and nothing here looks at it. What is idle because of a function that the
settings name, such as an advantage estimator that takes no values, is looked for where functions are found
(``runs/algorithm.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_toolkit.errors import ConfigError, shortened

if TYPE_CHECKING:
    from rlhf_toolkit.settings.experiment import Experiment, FineTuning

Idle = tuple[bool, tuple[str, ...], str]
"""Whether these settings are idle, their names, and why, with the way out."""

ABOUT_NEW_ADAPTERS = tuple(
    f"model.{name}"
    for name in ("lora_rank", "lora_alpha", "rslora", "init_lora_weights", "target_modules", "exclude_modules")
)
ABOUT_VALUES = ("model.value_adapter", "model.value_on", "model.value_head_std")
OF_THE_FOLDER = "has rank, scale and layers of its own; leave this one out, or train a new adapter without that folder"
HAS_NO_REVISIONS = "is a folder on this machine, which has no revisions; leave this one out, or give the hub's name"
NOTHING_HELD_OUT = "data.evaluation names no held-out rows; name some there, or leave this one out"


def idle_in_ppo(experiment: Experiment) -> list[Idle]:
    """What may be idle in an experiment of PPO, whatever its estimator."""
    return [
        idle_revision(experiment),
        idle_mode(experiment),
        *idle_around_responses(experiment),
        *idle_in_the_algorithm(experiment),
    ]


def idle_revision(experiment: Experiment | FineTuning) -> Idle:
    """A revision is one of the hub's."""
    name = experiment.model.name
    return is_folder(name), ("model.revision",), f"model.name={name} {HAS_NO_REVISIONS}"


def idle_mode(experiment: Experiment | FineTuning) -> Idle:
    """Off is no mode of a W&B that nobody has asked for; online is."""
    run = experiment.run
    idle = run.wandb == "online" and "wandb" not in run.watchers
    return idle, ("run.wandb",), f"run.trackers={run.trackers} has no wandb; add it there, or leave this one out"


def is_folder(name: str) -> bool:
    """Whether this machine has a folder of that name, which is then loaded."""
    return bool(name) and Path(name).expanduser().is_dir()


def idle_around_responses(experiment: Experiment) -> list[Idle]:
    """What may be idle of the settings of the value's start, of evaluations, of rewards and of turns."""
    model, reward, evaluates = experiment.model, experiment.reward, bool(experiment.data.evaluation)
    return [
        (
            model.value_adapter is not None,
            ("model.value_head_std",),
            "the head starts as that of model.value_adapter; leave one of them out",
        ),
        (
            not evaluates,
            ("data.evaluation_split", "run.evaluation_samples", "run.keep_best", "reward.passes_at", "reward.answer"),
            NOTHING_HELD_OUT,
        ),
        (
            not (reward.function or reward.functions),
            ("reward.kwargs",),
            "reward.function names no function that would take them; name one, or leave this one out",
        ),
        (reward.adapter is None, ("reward.adapter_weight",), "there is no reward.adapter; name one, or leave this out"),
        (
            reward.model is None,
            ("reward.model_weight", "reward.model_revision"),
            "there is no reward.model; name one, or leave this out",
        ),
        (is_folder(reward.model or ""), ("reward.model_revision",), f"reward.model={reward.model} {HAS_NO_REVISIONS}"),
        (
            not reward.overlong_buffer,
            ("reward.overlong_penalty",),
            "reward.overlong_buffer is 0; set it to the tokens before the budget, or leave this one out",
        ),
        (
            experiment.rollout.environment is None,
            ("rollout.max_turns", "rollout.max_turn_tokens"),
            "without rollout.environment a response has one turn; name an environment, or leave this one out",
        ),
    ]


def idle_in_the_algorithm(experiment: Experiment) -> list[Idle]:
    """What may be idle of the settings of the sampler's correction, of the KL and of alarms."""
    ppo, correction = experiment.ppo, experiment.ppo.importance_correction
    return [
        (
            correction == "none",
            ("ppo.importance_cap", "ppo.importance_floor"),
            "ppo.importance_correction is none; choose one, or leave this one out",
        ),
        (
            correction in ("token", "sequence"),
            ("ppo.importance_floor",),
            f"ppo.importance_correction={correction} masks nothing; choose {correction}_mask, or leave this one out",
        ),
        (
            ppo.kl_target is None,
            ("ppo.kl_horizon",),
            "the coefficient moves under ppo.kl_target only; set that, or leave this one out",
        ),
        (
            ppo.kl_coef == 0,
            ("ppo.kl_target",),
            "it multiplies ppo.kl_coef, and 0 stays 0; start from a small coefficient, such as 0.001",
        ),
        (
            ppo.kl_coef == 0,
            ("alarms.kl_above",),
            "with ppo.kl_coef=0 the KL to the reference is not measured after the first rollout; set a coefficient, "
            "however small, or leave this one out",
        ),
        (not experiment.alarms.limits, ("alarms.stop",), "no alarm has a limit; set one, or leave this one out"),
    ]


def idle_in_fine_tuning(experiment: FineTuning) -> list[Idle]:
    """What may be idle in a supervised run, whatever it trains."""
    start = experiment.model.policy_adapter
    return [
        idle_revision(experiment),
        idle_mode(experiment),
        (True, ABOUT_VALUES, "it is about a value function, which this run does not train; leave it out"),
        (start is not None, ABOUT_NEW_ADAPTERS, f"the adapter of model.policy_adapter={start} {OF_THE_FOLDER}"),
        (not experiment.data.evaluation, ("data.evaluation_split", "run.keep_best"), NOTHING_HELD_OUT),
        (
            True,
            ("run.evaluation_samples", "run.samples"),
            "a supervised run samples no responses; leave it out",
        ),
        (
            not experiment.data.chat_template,
            ("data.system_prompt",),
            "data.chat_template is false; set it to true, or leave the system prompt out",
        ),
        (
            not experiment.trains_head,
            ("update.head_lr",),
            "only a reward model has a head; leave it out",
        ),
    ]


def refuse_idle(experiment: Experiment | FineTuning, found: Iterable[Idle]) -> None:
    """Raise ConfigError for the first setting that is idle and set."""
    for is_idle, names, why in found:
        for name in names if is_idle else ():
            value = value_of(experiment, name)
            if value != default_value(experiment, name):
                raise ConfigError(f"{name}={shortened(value)} does nothing: {why}")


def value_of(experiment: Experiment | FineTuning, name: str) -> Any:
    """The value of a setting by its dotted name."""
    section, _, key = name.partition(".")
    return getattr(getattr(experiment, section), key)


def default_value(experiment: Experiment | FineTuning, name: str) -> Any:
    """The default of a setting by its dotted name."""
    section, _, key = name.partition(".")
    setting: Field[Any] = next(each for each in fields(getattr(experiment, section)) if each.name == key)
    return setting.default if setting.default_factory is MISSING else setting.default_factory()
