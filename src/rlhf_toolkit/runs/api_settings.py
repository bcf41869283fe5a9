"""Settings in Python: the knobs of a YAML file by their own names, as keyword arguments.

    PPOConfig(output_dir="runs/short", num_rollouts=20, max_new_tokens=32)

is the file with ``run.output_dir``, ``ppo.num_rollouts`` and ``rollout.max_new_tokens``. A name that two sections have
is written within its section, as in ``run={"name": "first try"}``; a whole section may be.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar

from rlhf_toolkit.errors import ConfigError, nearest, shortened
from rlhf_toolkit.given import FUNCTION, What
from rlhf_toolkit.rewards.signatures import asked
from rlhf_toolkit.runs.api_functions import found_by_name, function_name, metric_name
from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, FineTuning, RewardExperiment, SFTExperiment
from rlhf_toolkit.settings.loading import section_from_dict, section_types
from rlhf_toolkit.settings.names import elsewhere

Sections = dict[str, dict[str, Any]]
"""Settings by section and name, as they would stand in YAML."""
OF_FUNCTIONS = (
    *("reward.function", "reward.answer", "rollout.environment"),
    *("data.curriculum", "ppo.advantage", "ppo.policy_loss"),
)
"""Settings that name a function, and may be one."""
IN_PYTHON = {
    "learning_rate": "policy_lr, value_lr and value_head_lr in PPO, lr in the others",
    "per_device_train_batch_size": "prompts_per_rollout and mini_batches in PPO, batch_size in the others, over all "
    "ranks",
    "gradient_accumulation_steps": "micro_batch_tokens, which cuts a mini-batch by tokens",
    "per_device_eval_batch_size": "nothing: sizes are found",
    "eval_strategy": "evaluate_every",
    "save_strategy": "save_every",
    "tokenizer": "the trainer's argument processing_class",
    "peft_config": "lora_rank, lora_alpha and target_modules",
    "reward_weights": 'reward_funcs=[{"function": f, "weight": 0.5}]',
    "ref_model": "nothing: the reference is the base, or the adapter of policy_adapter",
    "value_model": "nothing: the value is an adapter on the base",
}
"""What other trainers call what is more, or less, than one setting here; others stand in ``settings/names.py``."""


def places_of(experiment: type[Any]) -> dict[str, list[str]]:
    """For each setting the sections that have one of its name."""
    places: dict[str, list[str]] = {}
    for section, kind in section_types(experiment).items():
        for setting in fields(kind):
            places.setdefault(setting.name, []).append(section)
    return places


def unknown(name: str, known: Mapping[str, list[str]]) -> ConfigError:
    """Why ``name`` is no setting by itself, and what is meant."""
    if name in known:
        several = " or ".join(f'{section}={{"{name}": ...}}' for section in known[name])
        return ConfigError(f"{name} is a setting of {' and '.join(known[name])}; write {several}")
    sections: dict[str, list[str]] = {}
    for setting, places in known.items():
        for section in places:
            sections.setdefault(section, []).append(setting)
    place = IN_PYTHON.get(name)
    if place is None and (found := elsewhere(name, sections)) is not None:
        section, _, setting = found.partition(":")[0].partition(".")
        place = setting if len(known[setting]) == 1 else f'{section}={{"{setting}": ...}}'
    if place is not None:
        return ConfigError(f"unknown setting {name}; here it is {place}")
    return ConfigError(f"unknown setting {shortened(name, 80)[1:-1]}{nearest(name, known) or '; see docs/python.md'}")


def _default(experiment: type[Any], section: str, name: str) -> Any:
    setting = next(each for each in fields(section_types(experiment)[section]) if each.name == name)
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


# ---- the settings of a run -------------------------------------------------------------------------------------------


class Settings:
    """Settings of one kind of run. ``sections`` holds them as a YAML file would, ``functions`` what of them are
    functions, by the names that stand in their places.

    Raises ConfigError for a name that is none, with the nearest known one, and for a value that cannot work.
    """

    EXPERIMENT: ClassVar[type[Experiment | FineTuning]]

    def __init__(self, **settings: Any) -> None:
        self.functions: dict[tuple[What, str], Any] = {}
        self.sections: Sections = {}
        self._take(settings)

    def __init_subclass__(cls) -> None:
        """What ``help()`` and an editor show: every knob that has a name of its own, with its default."""
        known = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(cls.EXPERIMENT, places[0], name))
            for name, places in places_of(cls.EXPERIMENT).items()
            if len(places) == 1
        ]
        cls.__signature__ = inspect.Signature(known)  # type: ignore[attr-defined]

    def with_settings(self, settings: Mapping[str, Any]) -> Settings:
        """A copy with ``settings`` in the place of those that it has."""
        other = type(self)()
        other.functions = dict(self.functions)
        other.sections = {name: dict(section) for name, section in self.sections.items()}
        other._take(settings)
        return other

    def _take(self, settings: Mapping[str, Any]) -> None:
        kinds = section_types(self.EXPERIMENT)
        for name, section in self._placed(settings).items():
            self.sections[name] = {**self.sections.get(name, {}), **section}
            section_from_dict(name, self.sections[name], kinds)

    def named(self, function: Any) -> str:
        """The name that stands for ``function`` in a setting: where Python finds it under that name, too, a YAML file
        could have said so; otherwise the object is kept beside it."""
        name = function_name(function)
        if found_by_name(function, name):
            return name
        number = 1
        while self.functions.get((FUNCTION, name), function) is not function:
            number += 1
            name = f"{function_name(function)}#{number}"
        self.functions[FUNCTION, name] = function
        return name

    def entry(self, reward: Any) -> dict[str, Any]:
        """An entry of ``reward.functions`` from a function, an import path, or such an entry whose function is one."""
        entry = dict(reward) if isinstance(reward, Mapping) else {"function": reward}
        function = entry.get("function")
        if callable(function):
            if misfit := asked(function).misfit:
                raise ConfigError(f"the reward {misfit}")
            entry = {"name": metric_name(function), **entry, "function": self.named(function)}
        elif isinstance(function, str) and ":" not in function:
            raise ConfigError(
                f"the reward {shortened(function)} is no function; write path/to/file.py:name, or for a reward model "
                'reward={"model": ...}'
            )
        return entry

    def _placed(self, settings: Mapping[str, Any]) -> Sections:
        sections, known = dict[str, dict[str, Any]](), places_of(self.EXPERIMENT)
        for name, value in settings.items():
            if name in section_types(self.EXPERIMENT):
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{name} is a section; write {name}={{...}} with settings by name")
                sections.setdefault(name, {}).update(value)
            elif len(known.get(name, ())) == 1:
                sections.setdefault(known[name][0], {})[name] = value
            else:
                raise unknown(name, known)
        for section, values in sections.items():
            for name, value in values.items():
                if callable(value) and f"{section}.{name}" in OF_FUNCTIONS:
                    values[name] = self.named(value)
            if section == "reward" and isinstance(values.get("functions"), (list, tuple)):
                values["functions"] = [self.entry(each) for each in values["functions"]]
        return sections


class PPOConfig(Settings):
    """Settings of PPO, GRPO and the other methods with rollouts: the sections of ``rlhf_toolkit.settings.configs``."""

    EXPERIMENT = Experiment


class SFTConfig(Settings):
    """Settings of supervised fine-tuning."""

    EXPERIMENT = SFTExperiment


class RewardConfig(Settings):
    """Settings of a reward model."""

    EXPERIMENT = RewardExperiment


class DPOConfig(Settings):
    """Settings of direct preference optimisation."""

    EXPERIMENT = DPOExperiment
