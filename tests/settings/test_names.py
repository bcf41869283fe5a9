"""What an unknown name is taken for: a misspelt one, one of another section, one of another library."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.settings import names
from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, RewardExperiment, SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.offenders import for_each

KINDS: tuple[Any, ...] = (Experiment, SFTExperiment, RewardExperiment, DPOExperiment)


def said(values: dict[str, Any], kind: Any = Experiment) -> str:
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict(values, kind)
    return str(caught.value)


@for_each(
    "kind, name, meant",
    [
        (Experiment, "update.learning_rate", "update.policy_lr"),
        (Experiment, "update.lr", "update.policy_lr"),
        (Experiment, "ppo.lr", "update.policy_lr"),
        (SFTExperiment, "update.learning_rate", "update.lr"),
        (Experiment, "model.load_in_4bit", "model.quantization: nf4"),
        (Experiment, "model.model_name_or_path", "model.name"),
        (Experiment, "ppo.beta", "ppo.kl_coef"),
        (DPOExperiment, "update.beta", "dpo.beta"),
        (SFTExperiment, "sft.num_train_epochs", "sft.epochs"),
        (Experiment, "rollout.num_generations", "rollout.responses_per_prompt"),
        (Experiment, "rollout.max_completion_length", "rollout.max_new_tokens"),
        (Experiment, "reward.reward_funcs", "reward.function"),
        (Experiment, "run.save_steps", "run.save_every"),
        (Experiment, "run.evaluate_evry", "run.evaluate_every"),
        (Experiment, "model.tempature", "rollout.temperature"),
        (Experiment, "ppo.kl_coeff", "ppo.kl_coef"),
        (Experiment, "model.gradient_checkpoint", "model.gradient_checkpointing"),
    ],
)
def test_a_name_is_taken_for_the_setting_that_says_it(kind: Any, name: str, meant: str) -> None:
    section, _, key = name.partition(".")
    assert said({section: {key: 1}}, kind) == f"unknown setting {name}; did you mean {meant}?"


def test_what_is_like_nothing_gets_the_list_and_no_guess() -> None:
    line = said({"update": {"zzz_rank": 1}})
    assert line.startswith("unknown setting update.zzz_rank; known are update.adam_beta1, update.adam_beta2, ")


@for_each(
    "name, meant",
    [
        ("rollouts", "rollout"),
        ("lora", "model"),
        ("dataset", "data"),
        ("optimizer", "update"),
        ("learning_rate", "update.policy_lr"),
        ("temperature", "rollout.temperature"),
        ("model_name_or_path", "model.name"),
    ],
)
def test_an_unknown_section_may_be_a_setting_that_stands_in_none(name: str, meant: str) -> None:
    assert said({name: {}}) == f"unknown section {name!r}; did you mean {meant}?"


def test_whatever_is_proposed_is_a_setting() -> None:
    """Of some kind of run; and no setting of any kind is listed as another library's word for one of its section."""
    known = {
        f"{section}.{setting.name}"
        for kind in KINDS
        for section, config in get_type_hints(kind).items()
        if section in {each.name for each in fields(kind)}
        for setting in fields(config)
    }
    proposed = {each.partition(":")[0] for every in names.ELSEWHERE.values() for each in every}
    assert proposed <= known, proposed - known
    sections = {name.partition(".")[0] for name in known}
    assert set(names.SECTIONS.values()) <= sections and not set(names.SECTIONS) & sections
