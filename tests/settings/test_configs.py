"""Every rule of the settings and its message, what stands in a file, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from transformers import SchedulerType, get_scheduler

from rlhf_toolkit.algorithms.aggregation import AGGREGATION_MODES
from rlhf_toolkit.algorithms.importance import NO_CORRECTION, WEIGHTS
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL
from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.models.decoding_weights import DecodingKind
from rlhf_toolkit.models.shared_base import ValueSite
from rlhf_toolkit.planning.memory import RolloutMode
from rlhf_toolkit.settings.configs import (
    AGGREGATIONS,
    CORRECTIONS,
    KINDS,
    MODES,
    VALUE_SITES,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, RewardExperiment, SFTExperiment
from rlhf_toolkit.settings.knobs import Section
from rlhf_toolkit.settings.loading import experiment_from_dict, load_experiment, parse_overrides
from rlhf_toolkit.settings.optimizer import SCHEDULES
from tests.support.offenders import for_each

EXPERIMENTS = (Experiment, SFTExperiment, RewardExperiment, DPOExperiment)
PPO_RATES = ("policy_lr", "value_lr", "value_head_lr")
REQUIRED = {"model": {"name": "m"}, "data": {"train": "t.jsonl"}, "reward": {"function": "r.py:f"}}


def experiment(**sections: dict[str, Any]) -> Experiment:
    """The smallest experiment, with the settings in ``sections`` changed."""
    names = {**REQUIRED, **sections}
    return experiment_from_dict({name: {**REQUIRED.get(name, {}), **names[name]} for name in names})


def supervised(kind: Any = SFTExperiment, **sections: dict[str, Any]) -> Any:
    """The smallest supervised experiment, with the settings in ``sections`` changed."""
    names = {"model": {"name": "m"}, "data": {"train": "t.jsonl"}}
    for section, settings in sections.items():
        names[section] = {**names.get(section, {}), **settings}
    return experiment_from_dict(names, kind)


def error_of(section: str, **settings: Any) -> str:
    """The message, of one line, that these settings of one section get."""
    return error_in({section: settings})


def error_in(sections: dict[str, dict[str, Any]]) -> str:
    with pytest.raises(ConfigError) as caught:
        experiment(**sections)
    return line_of(caught)


def line_of(caught: pytest.ExceptionInfo[ConfigError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- defaults --------------------------------------------------------------------------------------------------------

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "name": "m",
        "revision": None,
        "eos_token": None,
        "dtype": "auto",
        "quantization": "none",
        "attention": "sdpa",
        "trust_remote_code": False,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "rslora": False,
        "init_lora_weights": "kaiming",
        "target_modules": "all-linear",
        "exclude_modules": [],
        "policy_adapter": None,
        "value_adapter": None,
        "value_on": "adapter",
        "value_head_std": 0.0,
        "gradient_checkpointing": False,
    },
    "data": {
        "train": "t.jsonl",
        "train_split": "train",
        "evaluation": None,
        "evaluation_split": "train",
        "streaming": False,
        "max_rows": None,
        "prompt_column": "prompt",
        "chat_template": True,
        "system_prompt": None,
        "chat_template_kwargs": {},
        "max_prompt_tokens": 512,
        "curriculum": None,
        "curriculum_kwargs": {},
    },
    "reward": {
        "function": "r.py:f",
        "kwargs": {},
        "functions": [],
        "adapter": None,
        "adapter_weight": 1.0,
        "model": None,
        "model_revision": None,
        "model_weight": 1.0,
        "missing_eos_penalty": 0.0,
        "overlong_buffer": 0,
        "overlong_penalty": 1.0,
        "clip": None,
        "scale": 1.0,
        "whiten": False,
        "passes_at": None,
        "answer": None,
    },
    "rollout": {
        "prompts_per_rollout": 32,
        "responses_per_prompt": 1,
        "max_new_tokens": 256,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "bad_words": [],
        "stop_strings": [],
        "keep_special_tokens": False,
        "mode": "auto",
        "slots": None,
        "replace_uniform_groups": 0,
        "environment": None,
        "max_turns": 4,
        "max_turn_tokens": None,
        "weights": "exact",
    },
    "ppo": {
        "num_rollouts": 100,
        "num_ppo_epochs": 1,
        "mini_batches": 1,
        "advantage": "gae",
        "advantage_kwargs": {},
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "whiten_advantages": None,
        "whiten_over": "rollout",
        "policy_loss": "vanilla",
        "policy_loss_kwargs": {},
        "clip_range_low": 0.2,
        "clip_range_high": 0.2,
        "dual_clip": None,
        "importance_correction": "none",
        "importance_cap": 2.0,
        "importance_floor": 0.5,
        "value_clip_range": 0.2,
        "value_coef": 1.0,
        "entropy_coef": 0.0,
        "loss_aggregation": None,
        "kl_in": "reward",
        "kl_estimator": "k1",
        "kl_coef": 0.05,
        "kl_target": None,
        "kl_horizon": 10000,
        "kl_stop": None,
        "value_warmup_rollouts": 0,
        "truncated": "terminal",
        "first_ratio_tolerance": None,
    },
    "update": {
        "micro_batch_tokens": 4096,
        "packing": "auto",
        "policy_lr": 0.0001,
        "value_lr": 0.0001,
        "value_head_lr": 0.001,
        "schedule": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "optimizer": "adamw",
        "loraplus_lr_ratio": 1.0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-05,
    },
    "run": {
        "output_dir": "runs/ppo",
        "seed": 0,
        "save_every": None,
        "keep_checkpoints": 2,
        "keep_best": False,
        "evaluate_every": 0,
        "evaluation_samples": 0,
        "samples": 4,
        "most_not_finite": 3,
        "timeout_minutes": 120,
        "stall_minutes": 30.0,
        "trackers": None,
        "wandb": "offline",
        "wandb_project": "rlhf_toolkit",
        "name": None,
    },
    "alarms": {
        "kl_above": 200.0,
        "entropy_below": 0.01,
        "entropy_above": None,
        "length_below": None,
        "length_above": None,
        "repetition_above": 0.6,
        "cut_above": None,
        "stop": False,
    },
}


def test_the_defaults_are_these() -> None:
    """A changed default changes what people's experiments do: change it here too, and say so in the commit."""
    assert experiment().as_dict() == DEFAULTS


def test_defaults_of_supervised_runs() -> None:
    """The sections that PPO has too are listed above."""
    update = {name: value for name, value in DEFAULTS["update"].items() if name not in PPO_RATES}
    data: dict[str, Any] = {"train": "t.jsonl", "train_split": "train", "evaluation": None, "evaluation_split": "train"}
    data |= {"chat_template": True, "system_prompt": None, "max_tokens": 1024, "streaming": False, "max_rows": None}
    data["chat_template_kwargs"] = {}
    common = {"model": DEFAULTS["model"], "run": DEFAULTS["run"], "data": data}
    common["update"] = {**update, "lr": None, "head_lr": 1e-3}
    own: dict[Any, dict[str, Any]] = {
        SFTExperiment: {"sft": {"full": False, "turns": "all", "epochs": 1.0, "batch_size": 32}},
        RewardExperiment: {"reward_model": {"epochs": 1.0, "batch_size": 32, "centring": 0.01, "normalise": True}},
        DPOExperiment: {
            "dpo": {"epochs": 1.0, "batch_size": 32, "beta": 0.1, "loss": "sigmoid", "label_smoothing": 0.0}
        },
    }
    for kind, section in own.items():
        built = supervised(kind)
        assert built.as_dict() == {**common, **section}
        assert (built.lr, built.full) == (1e-4, False)


def test_every_setting_has_one_line_of_help() -> None:
    kinds = {
        kind for experiment in EXPERIMENTS for kind in get_type_hints(experiment).values() if isinstance(kind, type)
    }
    for kind in kinds:
        if not issubclass(kind, Section):
            continue
        for setting in fields(kind):
            text = setting.metadata["help"]
            assert text, f"{kind.__name__}.{setting.name}"
            assert "\n" not in text


def test_as_dict_builds_the_same_experiment() -> None:
    built = experiment(ppo={"dual_clip": 3.0}, rollout={"stop_strings": ["\n"]}, reward={"kwargs": {"a": [1]}})
    assert experiment_from_dict(built.as_dict()) == built


def test_instances_do_not_share_their_lists() -> None:
    RolloutConfig().stop_strings.append("x")
    RewardConfig().kwargs["x"] = 1
    assert RolloutConfig().stop_strings == []
    assert RewardConfig().kwargs == {}


# ---- sft.full --------------------------------------------------------------------------------------------------------


def test_full_fine_tuning_takes_what_is_about_the_model() -> None:
    built = supervised(sft={"full": True}, update={"lr": 1e-5}, model={"dtype": "float32"})
    assert (built.full, built.lr) == (True, 1e-5)
    assert supervised(sft={"full": True}, update={"lr": 1e-4}).lr == 1e-4, "said is meant"


@for_each(
    "section, settings, message",
    [
        (
            "model",
            {name: value},
            f"model.{name}={value!r} does nothing: sft.full trains no adapter; leave one of them out",
        )
        for name, value in {
            "lora_rank": 8,
            "lora_alpha": 8,
            "rslora": True,
            "init_lora_weights": "gaussian",
            "target_modules": ["q_proj"],
            "exclude_modules": ["q_proj"],
        }.items()
    ]
    + [
        (
            "model",
            {"policy_adapter": "runs/a/policy"},
            "model.policy_adapter=runs/a/policy is an adapter to go on with, but sft.full trains none; add it to its "
            "base with rlhf merge and name the merged model in model.name",
        ),
        (
            "model",
            {"quantization": "nf4"},
            "model.quantization=nf4 freezes the base's weights, and sft.full trains them; drop sft.full to train an "
            "adapter on it, or set model.quantization to none",
        ),
        (
            "model",
            {"dtype": "float16"},
            "model.dtype=float16 under sft.full: gradients of float16 products may vanish; set it to bfloat16 or "
            "float32",
        ),
        (
            "update",
            {"lr": None},
            "update.lr is missing: its default, 0.0001, suits adapters and is too high for sft.full; set it, to 1e-5 "
            "for a start",
        ),
    ],
)
def test_what_full_fine_tuning_refuses(section: str, settings: dict[str, Any], message: str) -> None:
    sections: dict[str, Any] = {"sft": {"full": True}, "update": {"lr": 1e-5}}
    sections[section] = {**sections.get(section, {}), **settings}
    with pytest.raises(ConfigError) as caught:
        supervised(**sections)
    assert line_of(caught) == message
    supervised(**{**sections, "sft": {}})  # the same is fine for an adapter


# ---- names -----------------------------------------------------------------------------------------------------------


def test_unknown_section() -> None:
    assert error_in({"rolout": {}}) == "unknown section 'rolout'; did you mean rollout?"
    assert error_in({"zzz": {}}) == (
        "unknown section 'zzz'; known are alarms, data, model, ppo, reward, rollout, run, update"
    )


def test_unknown_setting_offers_the_nearest() -> None:
    assert error_of("ppo", gama=1.0) == "unknown setting ppo.gama; did you mean ppo.gamma?"
    assert error_of("reward", qqqqqqqqqqqq=1) == (
        "unknown setting reward.qqqqqqqqqqqq; known are "
        + ", ".join(sorted(f"reward.{name}" for name in DEFAULTS["reward"]))
    )


@pytest.mark.parametrize(
    ("section", "key", "elsewhere"),
    [
        ("ppo", "temperature", "rollout.temperature"),
        ("run", "kl_coef", "ppo.kl_coef"),
        ("ppo", "policy_lr", "update.policy_lr"),
    ],
)
def test_a_setting_of_another_section_names_it(section: str, key: str, elsewhere: str) -> None:
    assert error_of(section, **{key: 1.0}) == f"unknown setting {section}.{key}; did you mean {elsewhere}?"


def test_names_that_are_no_strings() -> None:
    sections: Any = {1: {}}
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict(sections)
    assert line_of(caught).startswith("unknown section 1; known are alarms, data, ")
    settings: Any = {**REQUIRED, "reward": {False: 1}}
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict(settings)
    assert line_of(caught).startswith("unknown setting reward.False; ")


@pytest.mark.parametrize("section", [3, "gamma", ["gamma"], False])
def test_a_section_that_holds_no_settings(section: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict({**REQUIRED, "ppo": section})
    assert line_of(caught) == (f"section ppo holds {section!r}, not settings; write them as name: value below it")


def test_an_empty_section_has_its_defaults() -> None:
    assert experiment_from_dict({**REQUIRED, "ppo": None}) == experiment()


@pytest.mark.parametrize(("section", "name"), [("model", "name"), ("data", "train"), ("reward", "function")])
def test_required_settings(section: str, name: str) -> None:
    absent: list[dict[str, Any]] = [{}, {section: {}}, {section: {name: ""}}]
    for values in absent:
        with pytest.raises(ConfigError) as caught:
            experiment_from_dict({**{key: value for key, value in REQUIRED.items() if key != section}, **values})
        assert line_of(caught) == (
            f"{section}.{name} is missing; set it in the YAML file or as {section}.{name}=... on the command line"
        )


# ---- types -----------------------------------------------------------------------------------------------------------


@for_each(
    "section, settings, message",
    [
        ("model", {"lora_rank": "big"}, "model.lora_rank='big' is not int; the default is 16"),
        ("model", {"lora_rank": 8.0}, "model.lora_rank=8.0 is not int; the default is 16"),
        ("run", {"seed": True}, "run.seed=True is not int; the default is 0"),
        ("ppo", {"gamma": True}, "ppo.gamma=True is not float; the default is 1.0"),
        ("ppo", {"gamma": "high"}, "ppo.gamma='high' is not float; the default is 1.0"),
        ("ppo", {"gamma": None}, "ppo.gamma=None is not float; the default is 1.0"),
        ("ppo", {"gamma": "none"}, "ppo.gamma='none' is not float; the default is 1.0"),
        ("ppo", {"gamma": [1.0]}, "ppo.gamma=[1.0] is not float; the default is 1.0"),
        ("ppo", {"dual_clip": "three"}, "ppo.dual_clip='three' is not float or none; the default is none"),
        ("ppo", {"whiten_advantages": 1}, "ppo.whiten_advantages=1 is not bool or none; the default is none"),
        ("ppo", {"kl_in": True}, "ppo.kl_in=True is not str; known are reward, loss"),
        ("run", {"wandb": True}, "run.wandb=True is not str; known are online, offline, off"),
        ("run", {"name": 7}, "run.name=7 is not str or none; put text in quotes, in a shell as \"'7'\""),
        ("run", {"name": ["a"]}, "run.name=['a'] is not str or none; the default is none"),
        ("run", {"output_dir": None}, "run.output_dir=None is not str; the default is runs/ppo"),
        ("model", {"name": None}, "model.name=None is not str; it has no default, so give it a value"),
        (
            "model",
            {"target_modules": [1]},
            "model.target_modules=[1] is not str or list of str; the default is all-linear",
        ),
        ("rollout", {"stop_strings": "x"}, "rollout.stop_strings='x' is not list of str; write a list: ['x']"),
        ("rollout", {"stop_strings": "a, b"}, "rollout.stop_strings='a, b' is not list of str; write a list: ['a, b']"),
        (
            "model",
            {"exclude_modules": "q_proj,v_proj"},
            "model.exclude_modules='q_proj,v_proj' is not list of str; write a list: ['q_proj', 'v_proj']",
        ),
        (
            "rollout",
            {"stop_strings": [1, None]},
            "rollout.stop_strings=[1, None] is not list of str; the default is []",
        ),
        ("reward", {"kwargs": [1]}, "reward.kwargs=[1] is not dict with str keys; the default is {}"),
        ("reward", {"kwargs": {1: 2}}, "reward.kwargs has the key 1, which is not text; put it in quotes"),
    ],
)
def test_a_value_of_another_type_is_refused(section: str, settings: dict[str, Any], message: str) -> None:
    assert error_of(section, **settings) == message


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(error_of("ppo", gamma="x" * 10_000)) < 300
    assert len(error_of("ppo", gamma=10**400)) < 300, "more than a float holds"


@for_each("value, expected", [("1e-4", 1e-4), ("5E-6", 5e-6), (1, 1.0), (0, 0.0), (0.5, 0.5)])
def test_what_reads_as_float(value: Any, expected: float) -> None:
    lr = experiment(update={"policy_lr": value}).update.policy_lr
    assert lr == expected
    assert isinstance(lr, float)


def test_optional_floats_read_numbers_too() -> None:
    assert experiment(ppo={"kl_target": "1e1"}).ppo.kl_target == 10.0
    for none in (None, "none", "None"):
        assert experiment(ppo={"value_clip_range": none}).ppo.value_clip_range is None


def test_none_is_a_string_where_there_is_no_none() -> None:
    assert experiment(data={"train": "none"}).data.train == "none"


def test_off_and_none_as_yaml_reads_them() -> None:
    assert experiment(run={"wandb": False}).run.wandb == "off"
    assert experiment(run={"wandb": "off", "name": "none"}).run == RunConfig(wandb="off", name=None)


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]])
def test_either_of_two_types(modules: Any) -> None:
    assert experiment(model={"target_modules": modules}).model.target_modules == modules


# ---- one section -----------------------------------------------------------------------------------------------------


def default(section: str, name: str) -> str:
    """The end of a message about a setting."""
    value = DEFAULTS[section][name]
    return f"the default is {'none' if value is None else value}"


@for_each(
    "section, name, bad, smallest",
    [
        ("model", "lora_rank", 0, 1),
        ("model", "lora_alpha", -1, 1),
        ("data", "max_prompt_tokens", 0, 1),
        ("rollout", "prompts_per_rollout", 0, 1),
        ("rollout", "responses_per_prompt", 0, 1),
        ("rollout", "max_new_tokens", 0, 1),
        ("rollout", "temperature", 0.0, 0.01),
        ("ppo", "clip_range_high", 0.0, 5.0),
        ("ppo", "num_rollouts", 0, 1),
        ("ppo", "num_ppo_epochs", 0, 1),
        ("ppo", "mini_batches", 0, 1),
        ("update", "micro_batch_tokens", 0, 768),
        ("update", "max_grad_norm", 0.0, 0.01),
        ("update", "adam_epsilon", 0.0, 1e-12),
        ("run", "keep_checkpoints", 0, 1),
    ],
)
def test_what_must_be_above_zero(section: str, name: str, bad: float, smallest: float) -> None:
    assert error_of(section, **{name: bad}) == f"{section}.{name}={bad} must be above 0; {default(section, name)}"
    experiment(**{section: {name: smallest}})


@for_each("name", ["kl_target", "value_clip_range", "first_ratio_tolerance"])
@for_each("bad", [0.0, -0.2])
def test_what_must_be_above_zero_or_none(name: str, bad: float) -> None:
    assert error_of("ppo", **{name: bad}) == f"ppo.{name}={bad} must be above 0 or none; {default('ppo', name)}"
    for good in (0.01, None):
        experiment(ppo={name: good})


@for_each(
    "section, name, bad",
    [
        ("model", "value_head_std", -1.0),
        ("reward", "missing_eos_penalty", -0.5),
        ("rollout", "top_k", -1),
        ("ppo", "value_coef", -0.5),
        ("ppo", "entropy_coef", -0.5),
        ("ppo", "kl_coef", -0.5),
        ("ppo", "value_warmup_rollouts", -1),
        ("update", "policy_lr", -0.5),
        ("update", "value_lr", -0.5),
        ("update", "value_head_lr", -0.5),
        ("update", "warmup_steps", -1),
        ("update", "weight_decay", -0.5),
        ("run", "save_every", -1),
        ("run", "evaluate_every", -1),
        ("run", "samples", -1),
    ],
)
def test_what_must_not_be_negative(section: str, name: str, bad: float) -> None:
    assert error_of(section, **{name: bad}) == f"{section}.{name}={bad} must not be negative; {default(section, name)}"
    experiment(**{section: {name: 0}})


@for_each(
    "section, name, close, nearest, known",
    [
        ("model", "dtype", "float23", "float32", ("auto", "bfloat16", "float16", "float32")),
        ("model", "quantization", "nf44", "nf4", ("none", "nf4", "int8", "float8")),
        ("ppo", "kl_in", "rewards", "reward", ("reward", "loss")),
        ("ppo", "kl_estimator", "k11", "k1", ("k1", "abs", "k2", "k3", "k1+", "abs+", "k2+", "k3+")),
        ("model", "value_on", "policy_trunks", "policy_trunk", ("adapter", "policy_trunk")),
        (
            "ppo",
            "importance_correction",
            "tokens",
            "token",
            ("none", "token", "sequence", "token_mask", "sequence_mask"),
        ),
        ("ppo", "truncated", "terminate", "terminal", ("terminal", "bootstrap", "mask")),
        (
            "ppo",
            "loss_aggregation",
            "token_mean",
            "token-mean",
            ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
        ),
        ("update", "schedule", "constant-with-warmup", "constant_with_warmup", SCHEDULES),
        ("run", "wandb", "ofline", "offline", ("online", "offline", "off")),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    section: str, name: str, close: str, nearest: str, known: tuple[str, ...]
) -> None:
    listed = f"known are {', '.join(known)}"
    assert error_of(section, **{name: close}) == f"{section}.{name}={close!r}; did you mean {nearest}?; {listed}"
    assert error_of(section, **{name: "ZZZ"}) == f"{section}.{name}='ZZZ'; {listed}"
    for choice in known:
        experiment(**{section: {name: choice}})


def test_an_importance_cap_is_at_least_the_weight_of_equal_samplers() -> None:
    assert error_of("ppo", importance_cap=0.9) == "ppo.importance_cap=0.9 must be at least 1; the default is 2.0"
    experiment(ppo={"importance_cap": 1.0, "importance_correction": "token"})


@for_each(
    "settings, asked",
    [
        ({}, True),
        ({"kl_coef": 0.0}, False),
        ({"kl_coef": 0.01, "kl_target": 0.1}, True),
        ({"kl_in": "loss"}, True),
        ({"kl_in": "loss", "kl_coef": 0.0}, False),
    ],
)
def test_whether_a_kl_is_asked_for(settings: dict[str, Any], asked: bool) -> None:
    assert experiment(ppo=settings).kl_asked is asked


def test_choices_are_what_the_arithmetic_knows() -> None:
    assert set(AGGREGATIONS) == set(AGGREGATION_MODES)
    assert set(CORRECTIONS) == {NO_CORRECTION, *WEIGHTS}
    assert set(MODES) == set(RolloutMode) and set(KINDS) == set(DecodingKind)
    assert set(VALUE_SITES) == set(ValueSite) - {ValueSite.NOWHERE}


WITH_ARGUMENTS = {
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
}
"""Schedules that steps alone do not make."""


def test_schedules_are_those_of_transformers_without_arguments() -> None:
    """A new one in transformers: add it to ``SCHEDULES``, or here if it takes arguments of its own."""
    assert set(SCHEDULES) == {kind.value for kind in SchedulerType} - WITH_ARGUMENTS
    for schedule in SCHEDULES:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
        get_scheduler(schedule, optimizer, num_warmup_steps=1, num_training_steps=4)


FLOATS = [(s, n) for s, values in DEFAULTS.items() for n, value in values.items() if isinstance(value, float)]
FLOATS += [("ppo", name) for name in ("dual_clip", "kl_target", "first_ratio_tolerance")]


@for_each("value", [float("nan"), float("inf"), float("-inf"), "nan", "inf"])
@for_each("section, name", FLOATS)
def test_a_number_that_is_not_finite_is_refused(section: str, name: str, value: Any) -> None:
    message = error_of(section, **{name: value})
    assert message.startswith(f"{section}.{name}={float(value)} must be a finite number")
    assert message.endswith(default(section, name))


def test_rules_hold_without_a_file_too() -> None:
    with pytest.raises(ConfigError, match=r"^ppo\.gamma=nan must be a finite number; the default is 1\.0$"):
        PPOConfig(gamma=float("nan"))


def test_lora_dropout_is_refused() -> None:
    assert error_of("model", lora_dropout=0.1) == (
        "model.lora_dropout=0.1 must be 0: dropout makes the ratio differ from 1 before any update; the default is 0.0"
    )


def test_a_system_prompt_needs_the_chat_template() -> None:
    assert error_of("data", system_prompt="be brief", chat_template=False) == (
        "data.system_prompt is set but data.chat_template is false; set chat_template: true or drop the system prompt"
    )
    experiment(data={"system_prompt": "be brief"})


@for_each(
    "section, name, bad, good, rule",
    [
        ("rollout", "top_p", [0.0, -0.1, 1.1], [0.01, 1.0], "be in (0, 1]"),
        ("rollout", "min_p", [-0.1, 1.1], [0.0, 0.05, 1.0], "be in [0, 1]"),
        ("rollout", "repetition_penalty", [0.0, -1.0, 101.0, 1e-30], [0.01, 1.05, 100.0], "be from 0.01 to 100"),
        (
            "rollout",
            "logit_bias",
            [{"x": 1.0}, {"-1": 1.0}, {"05": 1.0}, {"5": 101.0}, {"5": True}, {"5": "1"}, {"9" * 10: 1.0}, {"": 0.0}],
            [{"5": 1.0, "0": -100, "999999999": 100.0}],
            "map token ids, in quotes, to numbers from -100 to 100",
        ),
        ("rollout", "bad_words", [["a", " "], [""]], [["a", " b"]], "hold texts with more than white space"),
        ("ppo", "gamma", [-0.1, 1.1], [0.0, 1.0], "be in [0, 1]"),
        ("ppo", "gae_lambda", [-0.1, 1.1], [0.0, 1.0], "be in [0, 1]"),
        ("ppo", "clip_range_low", [0.0, 1.0, -0.1], [0.01, 0.99], "be above 0 and below 1"),
        ("ppo", "dual_clip", [1.0, -3.0], [1.01, None], "be above 1 or none"),
        ("update", "adam_beta1", [1.0, 1.5, -0.1], [0.0, 0.99], "be in [0, 1)"),
        ("update", "adam_beta2", [1.0, 1.5, -0.1], [0.0, 0.99], "be in [0, 1)"),
    ],
)
def test_what_must_lie_within_a_range(section: str, name: str, bad: list[float], good: list[Any], rule: str) -> None:
    for value in bad:
        assert error_of(section, **{name: value}) == f"{section}.{name}={value} must {rule}; {default(section, name)}"
    for value in good:
        experiment(**{section: {name: value}})


def test_a_kl_target_adapts_the_penalty_in_the_reward() -> None:
    assert error_of("ppo", kl_target=6.0, kl_in="loss") == (
        "ppo.kl_target adapts the penalty in the reward; set kl_in: reward or drop kl_target"
    )
    experiment(ppo={"kl_target": 6.0})


def test_warmup_steps_need_a_schedule_that_has_them() -> None:
    assert error_of("update", warmup_steps=5) == (
        "update.warmup_steps=5 with schedule constant has no effect; use constant_with_warmup"
    )
    experiment(update={"warmup_steps": 5, "schedule": "constant_with_warmup"})


# ---- sections together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mini_batches", "better"), [(5, "4 or 8"), (7, "4 or 8"), (3, "2 or 4"), (100, "32")])
def test_mini_batches_divide_a_rollout(mini_batches: int, better: str) -> None:
    message = error_in(
        {"rollout": {"prompts_per_rollout": 16, "responses_per_prompt": 2}, "ppo": {"mini_batches": mini_batches}}
    )
    assert message == (f"a rollout of 32 responses does not divide into ppo.mini_batches={mini_batches}; try {better}")
    for fits in better.split(" or "):
        experiment(rollout={"prompts_per_rollout": 16, "responses_per_prompt": 2}, ppo={"mini_batches": int(fits)})


def test_a_micro_batch_holds_the_longest_sequence() -> None:
    sizes = {"data": {"max_prompt_tokens": 100}, "rollout": {"max_new_tokens": 50}}
    assert error_in({**sizes, "update": {"micro_batch_tokens": 149}}) == (
        "update.micro_batch_tokens=149 cannot hold one sequence of 150 tokens (data.max_prompt_tokens + "
        "rollout.max_new_tokens); set it to 150 or more"
    )
    experiment(**sizes, update={"micro_batch_tokens": 150})


def test_weight_decay_during_value_warmup() -> None:
    assert error_in({"ppo": {"value_warmup_rollouts": 3}, "update": {"weight_decay": 0.1}}) == (
        "update.weight_decay=0.1 would move the policy during ppo.value_warmup_rollouts=3; set one of them to 0"
    )
    experiment(ppo={"value_warmup_rollouts": 3})
    experiment(update={"weight_decay": 0.1})


def test_warmup_leaves_rollouts_for_the_policy() -> None:
    assert error_of("ppo", value_warmup_rollouts=4, num_rollouts=4) == (
        "ppo.value_warmup_rollouts=4 leaves none of ppo.num_rollouts=4 for the policy; set it to 3 or less"
    )
    experiment(ppo={"value_warmup_rollouts": 3, "num_rollouts": 4})


@pytest.mark.parametrize(("prompts", "least"), [(32, 7), (50, 11), (1, 1)])
def test_the_kl_horizon_is_long_enough_for_the_controller(prompts: int, least: int) -> None:
    def settings(horizon: int) -> dict[str, Any]:
        return {"rollout": {"prompts_per_rollout": prompts}, "ppo": {"kl_target": 0.1, "kl_horizon": horizon}}

    experiment(**settings(least))
    AdaptiveKL(0.1, target=0.1, horizon=least).update(0.2, prompts)
    if least == 1:
        return
    assert error_in(settings(least - 1)) == (
        f"ppo.kl_horizon={least - 1} is too short for rollouts of {prompts} responses under ppo.kl_target; "
        f"set it to {least} or more"
    )
    with pytest.raises(ConfigError):
        AdaptiveKL(0.1, target=0.1, horizon=least - 1).update(0.2, prompts)
    assert error_of("ppo", kl_target=0.1, kl_horizon=0).startswith("ppo.kl_horizon=0 must be above 0")


def test_a_stop_by_the_kl_needs_a_second_update() -> None:
    assert error_of("ppo", kl_stop=0.1) == (
        "ppo.kl_stop=0.1 does nothing where a rollout has one update; set ppo.mini_batches or ppo.num_ppo_epochs to 2 "
        "or more, or drop it"
    )
    experiment(ppo={"kl_stop": 0.1, "mini_batches": 2})
    experiment(ppo={"kl_stop": 0.1, "num_ppo_epochs": 2})


def test_an_overlong_buffer_fits_into_the_response() -> None:
    assert error_in({"reward": {"overlong_buffer": 9}, "rollout": {"max_new_tokens": 8}}) == (
        "reward.overlong_buffer=9 begins before the response: rollout.max_new_tokens=8; set it to 8 or less"
    )
    experiment(reward={"overlong_buffer": 8}, rollout={"max_new_tokens": 8})


def test_replacing_uniform_groups_needs_groups() -> None:
    assert error_of("rollout", replace_uniform_groups=2) == (
        "rollout.replace_uniform_groups=2 with one response for each prompt would replace every prompt; set "
        "responses_per_prompt to 2 or more"
    )
    experiment(rollout={"replace_uniform_groups": 2, "responses_per_prompt": 2})


def test_rewards_are_named_in_one_way() -> None:
    both = {"functions": [{"function": "r.py:g"}]}
    assert error_of("reward", **both) == (
        "reward.functions and reward.function are both set; put the one function into the list of functions"
    )
    experiment(reward={**both, "function": ""})


# ---- derived ---------------------------------------------------------------------------------------------------------


def test_derived_sizes() -> None:
    built = experiment(
        rollout={"prompts_per_rollout": 6, "responses_per_prompt": 4}, ppo={"mini_batches": 3, "num_ppo_epochs": 2}
    )
    assert built.rollout.sequences == 24
    assert built.mini_batch_rows == 8
    assert built.updates_per_rollout == 6


def test_processes_that_fit() -> None:
    built = experiment(rollout={"prompts_per_rollout": 8, "responses_per_prompt": 2}, ppo={"mini_batches": 4})
    for processes in (1, 2, 4):
        built.check_processes(processes)


@pytest.mark.parametrize(("prompts", "better"), [(2, "4"), (6, "4 or 8"), (9, "8 or 12")])
def test_prompts_divide_among_processes(prompts: int, better: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(rollout={"prompts_per_rollout": prompts}).check_processes(4)
    assert line_of(caught) == (f"rollout.prompts_per_rollout={prompts} does not divide among 4 processes; try {better}")
    for fits in better.split(" or "):
        experiment(rollout={"prompts_per_rollout": int(fits)}).check_processes(4)


@pytest.mark.parametrize(
    ("prompts", "mini_batches", "rows", "better"),
    [(12, 2, 6, "1 or 3"), (8, 4, 2, "2"), (4, 2, 2, "1"), (48, 8, 6, "6 or 12")],
)
def test_mini_batches_divide_among_processes(prompts: int, mini_batches: int, rows: int, better: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(rollout={"prompts_per_rollout": prompts}, ppo={"mini_batches": mini_batches}).check_processes(4)
    assert line_of(caught) == (
        f"ppo.mini_batches={mini_batches} makes mini-batches of {rows} responses, which do not divide among 4 "
        f"processes; try {better}"
    )
    for fits in better.split(" or "):
        experiment(rollout={"prompts_per_rollout": prompts}, ppo={"mini_batches": int(fits)}).check_processes(4)


# ---- files and overrides ---------------------------------------------------------------------------------------------

YAML = """
model: {name: m}
data: {train: t.jsonl}
reward:
  function: r.py:f
update: {policy_lr: 1e-4, value_head_lr: 3.0e-3}
ppo:
  gae_lambda: 1  # Monte-Carlo
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file(tmp_path: Path) -> None:
    built: Experiment = load_experiment(write(tmp_path / "x.yaml", YAML))
    assert built.update.policy_lr == 1e-4, "YAML itself reads 1e-4 as a string"
    assert built.update.value_head_lr == 3e-3
    assert built.ppo.gae_lambda == 1.0
    assert built.reward.function == "r.py:f"


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment("no/such.yaml")
    assert line_of(caught) == (
        "cannot read the experiment no/such.yaml: No such file or directory; give the path of a YAML file"
    )
    assert isinstance(caught.value.__cause__, OSError)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Is a directory; give the path of a YAML file$"):
        load_experiment(tmp_path)


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", "model: {name: m}\nppo: [1,\nrun: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert line_of(caught).startswith(f"{path} is not valid YAML: ")
    assert "line 2" in line_of(caught)


@pytest.mark.parametrize(("text", "kind"), [("- model\n", "list"), ("[]", "list"), ("model\n", "str"), ("0", "int")])
def test_yaml_that_holds_no_sections(tmp_path: Path, text: str, kind: str) -> None:
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert line_of(caught) == f"{path} holds a {kind}, not sections such as model: and ppo:"


def test_an_empty_file_lacks_the_required_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.name is missing; set it in the YAML file"):
        load_experiment(write(tmp_path / "x.yaml", "# nothing yet\n"))


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", YAML + "rollout:\n")
    built: Experiment = load_experiment(
        path, {"ppo.gae_lambda": 0.5, "update.policy_lr": "2e-5", "run.seed": 7, "rollout.top_k": 3, "model.name": "n"}
    )
    assert (built.ppo.gae_lambda, built.update.policy_lr, built.run.seed) == (0.5, 2e-5, 7)
    assert (built.rollout.top_k, built.model.name) == (3, "n")
    assert built.update.value_head_lr == 3e-3


def test_overrides_alone_make_an_experiment(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", "")
    built: Experiment = load_experiment(path, {"model.name": "m", "data.train": "t.jsonl", "reward.function": "r.py:f"})
    assert built == experiment()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ppo.gama", "unknown setting ppo.gama; did you mean ppo.gamma?"),
        ("pp.gamma", "unknown section 'pp'; did you mean ppo?"),
        ("reward.kwargs.a", "unknown setting reward.kwargs.a; did you mean reward.kwargs?"),
    ],
)
def test_overrides_of_unknown_names(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path / "x.yaml", YAML), {name: 1})
    assert line_of(caught) == message


def test_overrides_are_read_as_yaml() -> None:
    arguments = ["a.b=1", "a.c=0.5", "a.d=", "a.e=[x, y]", "a.f=true", "a.g=r.py:f=1", "a.h={k: 2}", "a.b=3"]
    assert parse_overrides(arguments) == {
        "a.b": 3,
        "a.c": 0.5,
        "a.d": None,
        "a.e": ["x", "y"],
        "a.f": True,
        "a.g": "r.py:f=1",
        "a.h": {"k": 2},
    }
    assert parse_overrides([]) == {}


def test_what_the_command_line_says_is_what_is_meant(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", YAML + "run: {wandb: off}\n")
    assert load_experiment(path).run.wandb == "off"
    arguments = ["ppo.value_clip_range=none", "run.wandb=off", "run.name='7'", "update.policy_lr=1e-5"]
    built: Experiment = load_experiment(path, parse_overrides(arguments))
    assert (built.ppo.value_clip_range, built.run.wandb, built.run.name) == (None, "off", "7")
    assert built.update.policy_lr == 1e-5


@for_each("argument", ["ppo.kl_coef", "kl_coef=0.1", "--resume", "=1", ""])
def test_an_override_that_cannot_be_read(argument: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([argument])
    shown = argument.removesuffix("0.1").removesuffix("1")  # the value, which may be a secret, is not quoted
    assert line_of(caught) == (f"cannot read the override {shown!r}; write section.key=value, such as ppo.kl_coef=0.1")


@pytest.mark.parametrize(
    ("section", "name"),
    [("ppo", "dual_clip"), ("ppo", "kl_target"), ("data", "evaluation"), ("model", "policy_adapter")],
)
def test_none_as_the_help_says(tmp_path: Path, section: str, name: str) -> None:
    path = write(tmp_path / "x.yaml", YAML)
    assert load_experiment(path, parse_overrides([f"{section}.{name}=none"])) == load_experiment(path)


@pytest.mark.parametrize("section", ["3", "[gamma]", "gamma"])
def test_an_override_in_a_section_that_holds_no_settings(tmp_path: Path, section: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(tmp_path / "x.yaml", f"ppo: {section}\n"), {"ppo.gamma": 1})
    assert line_of(caught).startswith("section ppo holds ")


@pytest.mark.parametrize(
    "argument", ["ppo.gamma=[1,", "reward.function=a: b: c", "run.name=2024-13-45", "run.seed=!!int ''"]
)
def test_an_override_whose_value_is_not_yaml(argument: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([argument])
    assert line_of(caught).startswith(f"the value of the override {argument.partition('=')[0]} is not valid YAML: ")
    assert line_of(caught).endswith("; repair it, or put text in quotes")


def test_a_file_with_a_date_that_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", "run: {name: 2024-13-45}\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert line_of(caught).startswith(f"{path} is not valid YAML: ValueError: month must be in 1..12")


def test_files_are_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes((YAML + "run: {name: \u00e9}\n").encode())
    assert load_experiment(path).run.name == "\u00e9"
    path.write_bytes(b"model: {name: \xe9}")
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert line_of(caught) == f"{path} is not UTF-8 (at byte 14); save the file as UTF-8"


# ---- what run.json can keep ------------------------------------------------------------------------------------------


def test_what_json_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    """At load, long before a run folder is looked at."""
    path = tmp_path / "e.yaml"
    wrong: list[Any] = []
    values = [
        "2024-01-01",
        "2024-01-01 10:00:00",
        "!!set {a, b}",
        "!!binary aGk=",
        ".nan",
        "-.inf",
        "{1: a}",
        "1" * 5000,
    ]
    values += [
        "{true: 1}",
        "{null: 1}",
        "[[{a: [.nan]}]]",
        "!!omap [a: 1]",
        "[2024-01-01]",
        "{2024-01-01: 1}",
        "&a [*a]",
    ]
    values += ["[" * 60 + "]" * 60]
    for value in values:
        path.write_text(
            f"model: {{name: m}}\ndata: {{train: t}}\nreward: {{function: 'f.py:f', kwargs: {{since: {value}}}}}\n"
        )
        try:
            wrong.append((value, load_experiment(path)))
        except ConfigError as error:
            if "reward.kwargs" not in str(error) and "not valid YAML" not in str(error):
                wrong.append((value, error))
    assert not wrong


def test_a_bomb_of_aliases_is_refused() -> None:
    bomb: Any = ["x"] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    with pytest.raises(ConfigError, match="more than 100000 values"):
        experiment_from_dict({"reward": {"functions": bomb}})


def test_plain_settings_come_back_equal_from_json() -> None:
    kwargs = {"a": [1, 2.5, None, True, "é", {"b": []}], "c": -(2**80)}
    built = experiment(reward={"kwargs": kwargs})
    assert json.loads(json.dumps(built.as_dict())) == built.as_dict()
    with pytest.raises(ConfigError, match=r"reward\.functions\[0\]\.kwargs\.a=\(1, 2\) is a tuple"):
        RewardConfig(functions=[{"function": "f.py:f", "kwargs": {"a": (1, 2)}}])


@pytest.mark.parametrize("kind", [SFTExperiment, RewardExperiment, DPOExperiment])
@pytest.mark.parametrize(("section", "told"), [("run", "unknown setting run.quiet"), ("JOB", "unknown section 'JOB'")])
def test_what_a_supervised_run_does_not_know_is_named(kind: Any, section: str, told: str) -> None:
    """Its class has constants beside its sections."""
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict({"model": {"name": "m"}, "data": {"train": "d"}, section: {"quiet": 1}}, kind)
    assert str(caught.value).startswith(told)


def test_numbers_that_no_run_could_hold_are_refused() -> None:
    told = error_of("ppo", num_rollouts=10**9, num_ppo_epochs=10**9)
    assert told.startswith(
        "ppo.num_rollouts=1000000000 with ppo.num_ppo_epochs=1000000000 and ppo.mini_batches=1 is more"
    )
    with pytest.raises(ConfigError, match=r"^sft\.epochs=1e\+30 of 10 rows is more than 9e\+15 updates"):
        supervised(sft={"epochs": 1e30}).steps(10)
    assert error_of("reward", clip=1e39).startswith("reward.clip=1e+39 is beyond float32")
    assert experiment(reward={"clip": 3.4e38}).reward.clip == 3.4e38


@pytest.mark.parametrize("evaluation", [{}, {"evaluation": ""}])
def test_an_evaluation_needs_held_out_rows(evaluation: dict[str, Any]) -> None:
    told = "run.evaluate_every=2 has nothing to evaluate; name held-out rows in data.evaluation, or set it to 0"
    assert error_in({"run": {"evaluate_every": 2}, "data": {"train": "t.jsonl", **evaluation}}) == told
    with pytest.raises(ConfigError) as caught:
        supervised(run={"evaluate_every": 2}, data=evaluation)
    assert line_of(caught) == told
    assert experiment(run={"evaluate_every": 2}, data={"train": "t.jsonl", "evaluation": "e"}).run.evaluate_every == 2


@for_each(
    "name", ["model.name", "model.attention", "model.policy_adapter", "data.train", "run.output_dir", "reward.adapter"]
)
@for_each("value", ["x" * 256, "\u00e9" * 128, "a/" * 2049, f"a/{'x' * 256}/b"])
def test_a_name_longer_than_any_path_is_refused(name: str, value: str) -> None:
    section, setting = name.split(".")
    said = error_of(section, **{setting: value})
    assert (
        said.startswith(f"{name}='") and "is longer than any path (255 bytes a name, 4096 in all); give a sho" in said
    )
    assert len(said) < 400


def test_long_texts_that_are_no_path_are_taken() -> None:
    layers = "|".join(["q_proj"] * 60)
    found = experiment(data={"system_prompt": "be kind " * 600}, model={"target_modules": layers})
    assert len(found.data.system_prompt or "") == 4800 and len(found.model.target_modules) > 256


@for_each("value", [[], "", "q_proj", "q_proj,v_proj", "q_proj, v_proj", "gate-up", "all_linear"])
def test_what_can_name_no_layer_is_refused(value: Any) -> None:
    """Whole names of layers have dots."""
    assert error_of("model", target_modules=value) == (
        f"model.target_modules={value} must be all-linear, a list of name endings such as [q_proj, v_proj], or a "
        "regular expression of whole names; the default is all-linear"
    )


@for_each("value", ["all-linear", "All-Linear", ".*_proj", r".*\.(q|v)_proj", "model.layers.0.mlp", ["q_proj"]])
def test_what_can_name_layers_is_taken(value: Any) -> None:
    assert experiment(model={"target_modules": value}).model.target_modules == value


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(name="m", target_modules="x" * 3000)
    assert len(str(caught.value)) < 500 and str(caught.value).startswith("model.target_modules='xxx")
