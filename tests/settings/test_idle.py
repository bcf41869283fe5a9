"""A setting that another one leaves without effect is refused by its name, and is taken where it has one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.runs.algorithm import idle_numbers, resolve
from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, FineTuning, RewardExperiment, SFTExperiment
from rlhf_toolkit.settings.idle import Idle, default_value, idle_in_fine_tuning, idle_in_ppo
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.offenders import for_each
from tests.support.tiny import merged

PPO: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": "t"}, "reward": {"functions": [{"function": "f:f"}]}}
SUPERVISED: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": "t"}}
ADAPTER_ONLY = {"reward.functions": [], "reward.adapter": "a"}
NO_ALARM = {"alarms.kl_above": None, "alarms.entropy_below": None, "alarms.repetition_above": None}
NEW_ADAPTER = {
    "model.lora_rank": 8,
    "model.lora_alpha": 8,
    "model.rslora": True,
    "model.init_lora_weights": "gaussian",
    "model.target_modules": ["q_proj"],
    "model.exclude_modules": ["q_proj"],
}


FOLDER = str(Path(__file__).parent)


def ppo(changes: dict[str, Any]) -> Experiment:
    found: Experiment = experiment_from_dict(merged(PPO, changes))
    return found


@for_each(
    "name, value, without, with_it",
    [
        ("model.value_head_std", 0.1, {"model.value_adapter": "v"}, {}),
        ("data.evaluation_split", "test", {}, {"data.evaluation": "e"}),
        ("run.evaluation_samples", 4, {}, {"data.evaluation": "e"}),
        ("run.keep_best", True, {}, {"data.evaluation": "e"}),
        ("reward.passes_at", 1.0, {}, {"data.evaluation": "e"}),
        ("reward.kwargs", {"a": 1}, ADAPTER_ONLY, {**ADAPTER_ONLY, "reward.function": "f:f"}),
        ("reward.adapter_weight", 0.5, {}, {"reward.adapter": "a"}),
        ("reward.model_weight", 0.5, {}, {"reward.model": "m"}),
        ("reward.model_revision", "v1", {}, {"reward.model": "m"}),
        ("reward.model_revision", "v1", {"reward.model": FOLDER}, {"reward.model": "m"}),
        ("model.revision", "v1", {"model.name": FOLDER}, {"model.name": "m"}),
        ("reward.overlong_penalty", 0.5, {}, {"reward.overlong_buffer": 4}),
        ("rollout.max_turns", 2, {}, {"rollout.environment": "e:e"}),
        ("rollout.max_turn_tokens", 2, {}, {"rollout.environment": "e:e"}),
        ("ppo.importance_cap", 3.0, {}, {"ppo.importance_correction": "token"}),
        ("ppo.importance_floor", 0.1, {}, {"ppo.importance_correction": "token_mask"}),
        (
            "ppo.importance_floor",
            0.1,
            {"ppo.importance_correction": "sequence"},
            {"ppo.importance_correction": "sequence_mask"},
        ),
        ("ppo.kl_horizon", 500, {}, {"ppo.kl_target": 0.1}),
        ("ppo.kl_target", 0.1, {"ppo.kl_coef": 0.0}, {"ppo.kl_coef": 0.001}),
        ("alarms.kl_above", 5.0, {"ppo.kl_coef": 0.0}, {"ppo.kl_coef": 1e-6}),
        ("run.wandb", "online", {"run.trackers": ["mlflow"]}, {"run.trackers": ["mlflow", "wandb"]}),
        ("alarms.stop", True, NO_ALARM, {**NO_ALARM, "alarms.cut_above": 0.5}),
    ],
)
def test_ppo_refuses_what_would_do_nothing(
    name: str, value: Any, without: dict[str, Any], with_it: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ppo({**without, name: value})
    assert str(caught.value).startswith(f"{name}={value!r} does nothing: ")
    assert any(way_out in str(caught.value) for way_out in ("leave", "start from")), caught.value
    ppo({**with_it, name: value})
    ppo(without)


@for_each(
    "kind, name, value, without, with_it",
    [
        *(
            (kind, name, value, {"model.policy_adapter": "a"}, {})
            for kind in (SFTExperiment, RewardExperiment, DPOExperiment)
            for name, value in NEW_ADAPTER.items()
        ),
        (DPOExperiment, "data.evaluation_split", "test", {}, {"data.evaluation": "e"}),
        (RewardExperiment, "run.keep_best", True, {}, {"data.evaluation": "e"}),
        (SFTExperiment, "data.system_prompt", "s", {"data.chat_template": False}, {"data.chat_template": True}),
        (SFTExperiment, "model.value_head_std", 0.1, {}, None),
        (SFTExperiment, "run.samples", 0, {}, None),
        (SFTExperiment, "model.revision", "v1", {"model.name": FOLDER}, {"model.name": "m"}),
        (SFTExperiment, "run.evaluation_samples", 2, {"data.evaluation": "e"}, None),
        (SFTExperiment, "update.head_lr", 1e-2, {}, None),
        (DPOExperiment, "update.head_lr", 1e-2, {}, None),
    ],
)
def test_supervised_runs_refuse_what_would_do_nothing(
    kind: type[FineTuning], name: str, value: Any, without: dict[str, Any], with_it: dict[str, Any] | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict(merged(SUPERVISED, {**without, name: value}), kind)
    assert str(caught.value).startswith(f"{name}={value!r} does nothing: ") and "leave" in str(caught.value)
    experiment_from_dict(merged(SUPERVISED, without), kind)
    if with_it is not None:
        experiment_from_dict(merged(SUPERVISED, {**with_it, name: value}), kind)


def test_a_reward_model_has_a_head() -> None:
    experiment = experiment_from_dict(merged(SUPERVISED, {"update.head_lr": 1e-2}), RewardExperiment)
    assert experiment.update.head_lr == 1e-2


GRPO = {"ppo.advantage": "grpo", "rollout.responses_per_prompt": 2, "ppo.num_rollouts": 2}


@for_each(
    "changes, name",
    [
        *(({"model.policy_adapter": "a", "model.value_adapter": "v", **{n: v}}, n) for n, v in NEW_ADAPTER.items()),
        ({**GRPO, "model.policy_adapter": "a", "model.lora_rank": 8}, "model.lora_rank"),
        ({"model.value_on": "policy_trunk", "model.policy_adapter": "a", "model.rslora": True}, "model.rslora"),
        ({**GRPO, "model.value_adapter": "v"}, "model.value_adapter"),
        ({**GRPO, "model.value_on": "policy_trunk"}, "model.value_on"),
    ],
)
def test_what_an_estimator_makes_idle_is_refused(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(ppo(changes))
    assert str(caught.value).startswith(f"{name}=") and " does nothing: " in str(caught.value)


def test_a_new_value_adapter_takes_the_settings_of_new_adapters() -> None:
    resolve(ppo({"model.policy_adapter": "a", **NEW_ADAPTER}))


@for_each(
    "changes, names",
    [
        ({"update.value_lr": 1e-3, "ppo.value_coef": 0.5}, []),
        (
            {**GRPO, "update.value_lr": 1e-3, "ppo.value_coef": 0.5},
            ["ppo.advantage=grpo trains no value: ppo.value_coef, update.value_lr"],
        ),
        (
            {"model.value_on": "policy_trunk", "update.value_lr": 1e-3, "ppo.value_coef": 0.5},
            ["model.value_on=policy_trunk gives the value no adapter: update.value_lr"],
        ),
        (
            {"data.evaluation": "e", "reward.passes_at": 1.0},
            ["evaluations sample nothing (run.evaluation_samples=0): reward.passes_at"],
        ),
        ({"data.evaluation": "e", "reward.passes_at": 1.0, "run.evaluation_samples": 2}, []),
    ],
)
def test_numbers_that_nothing_reads_are_named(changes: dict[str, Any], names: list[str]) -> None:
    experiment = ppo(changes)
    found = idle_numbers(experiment, trains_value=resolve(experiment).trains_value)
    assert found == [f"without effect, since {line}" for line in names]


def test_every_name_in_the_tables_is_a_setting() -> None:
    """A name that has been changed in the configs would never be found idle."""
    tables: list[tuple[Any, list[Idle]]] = [(ppo({}), idle_in_ppo(ppo({})))]
    for kind in (SFTExperiment, RewardExperiment, DPOExperiment):
        experiment = experiment_from_dict(SUPERVISED, kind)
        tables.append((experiment, idle_in_fine_tuning(experiment)))
    for experiment, table in tables:
        settings = asdict(experiment)
        for name in (name for _, names, _ in table for name in names):
            section, _, key = name.partition(".")
            assert settings[section][key] == default_value(experiment, name), name
