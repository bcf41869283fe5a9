"""Values of settings: legal ones that keep a run tiny, those at the border of what is legal, and plain mistakes."""

from __future__ import annotations

import random
from dataclasses import Field, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from rlhf_toolkit.settings.configs import AGGREGATIONS, CORRECTIONS
from rlhf_toolkit.settings.experiment import DPOExperiment, Experiment, FineTuning, RewardExperiment, SFTExperiment
from rlhf_toolkit.settings.optimizer import SCHEDULES

KINDS: dict[str, type[Experiment] | type[FineTuning]] = {
    "ppo": Experiment,
    "sft": SFTExperiment,
    "reward_model": RewardExperiment,
    "dpo": DPOExperiment,
}
ESTIMATORS = (
    "gae",
    "vapo",
    "grpo",
    "dr_grpo",
    "rloo",
    "opo",
    "remax",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "HERE/plugins.py:own_advantage",
)
LOSSES = ("vanilla", "gspo", "sapo", "cispo", "gpg", "dro", "geo_mean", "kl_cov", "clip_cov")
SMALLEST, LARGEST = 5e-324, 1.7976931348623157e308

LEGAL: dict[str, tuple[Any, ...]] = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.quantization": ("none", "nf4", "int8", "float8"),
    "model.attention": ("sdpa", "eager"),
    "model.trust_remote_code": (False, True),
    "model.lora_rank": (1, 2, 4, 7, 64),
    "model.lora_alpha": (1, 8, 10**6),
    "model.revision": (None,),
    "model.eos_token": (None, "</s>", "w3", ["</s>", "w5"]),
    "model.lora_dropout": (0.0,),
    "model.rslora": (True,),
    "model.init_lora_weights": ("gaussian",),
    "model.target_modules": ("all-linear", ["q_proj"], ["q_proj", "down_proj"]),
    "model.exclude_modules": ([], ["k_proj"], ["v_proj", "o_proj"]),
    "model.policy_adapter": (None, "HERE/adapter"),
    "model.value_adapter": (None, "HERE/reward_adapter"),
    "model.value_on": ("adapter", "policy_trunk"),
    "model.value_head_std": (0.0, 0.1, 1),
    "model.gradient_checkpointing": (True,),
    "data.evaluation": (None, "ROWS"),
    "data.train_split": ("train", "train[:4]", "other"),
    "data.evaluation_split": ("train", "train[:2]"),
    "data.streaming": (False, True),
    "data.max_rows": (1, 3, 4, 10**9),
    "data.chat_template": (False, True, "HERE/template.jinja"),
    "data.system_prompt": ("w1 w2", "", "\U0001f600 w3"),
    "data.chat_template_kwargs": ({}, {"enable_thinking": False}),
    "data.max_prompt_tokens": (1, 4, 8, 12),
    "data.max_tokens": (2, 8, 16, 32),
    "data.curriculum": (None, "near_target", "HERE/plugins.py:first_ones"),
    "data.curriculum_kwargs": ({}, {"target": 0.3}),
    "reward.function": ("HERE/plugins.py:low_words", "HERE/plugins.py:by_token", "HERE/plugins.py:not_a_number"),
    "reward.kwargs": ({}, {"factor": 2.0}),
    "reward.functions": (
        [],
        [{"function": "HERE/plugins.py:low_words", "weight": 0.5}],
        [{"function": "HERE/plugins.py:low_words"}, {"function": "HERE/plugins.py:now_and_then", "on_failure": "drop"}],
        [{"function": "HERE/plugins.py:now_and_then", "on_failure": "score", "failure_score": -1.0}],
    ),
    "reward.adapter": (None, "HERE/reward_adapter"),
    "reward.adapter_weight": (1.0, 0.5),
    "reward.model": (None,),
    "reward.model_revision": (None,),
    "reward.model_weight": (1.0,),
    "reward.missing_eos_penalty": (0.0, 0.5),
    "reward.overlong_buffer": (0, 1, 2),
    "reward.overlong_penalty": (0.5, 1.0),
    "reward.clip": (None, 0.5),
    "reward.scale": (1.0, 0.0, -2.0),
    "reward.whiten": (True,),
    "reward.passes_at": (None, 0.5),
    "reward.answer": (None, "HERE/plugins.py:first_word"),
    "rollout.prompts_per_rollout": (1, 2, 3, 4),
    "rollout.responses_per_prompt": (1, 2, 3),
    "rollout.max_new_tokens": (1, 2, 4),
    "rollout.temperature": (1.0, 0.7, 1e-4, 1e4),
    "rollout.top_k": (0, 1, 5, 10**9),
    "rollout.top_p": (1.0, 0.5, 1e-9),
    "rollout.stop_strings": ([], ["w3"], ["w3", "w4 w5"]),
    "rollout.min_p": (0.0, 0.1, 1.0),
    "rollout.repetition_penalty": (1.0, 1.2, 0.5, 100.0),
    "rollout.logit_bias": ({}, {"5": 3.0, "6": -100.0}),
    "rollout.bad_words": ([], ["w3"], ["w4 w5", "w6"]),
    "rollout.keep_special_tokens": (False, True),
    "rollout.environment": (None, "HERE/plugins.py:answering"),
    "rollout.max_turns": (1, 2, 4),
    "rollout.max_turn_tokens": (None, 1, 2),
    "rollout.mode": ("auto", "window", "stream"),
    "rollout.slots": (None, 1, 2, 10**6),
    "rollout.replace_uniform_groups": (0, 1, 10**9),
    "rollout.weights": ("exact", "merged"),
    "ppo.num_rollouts": (1, 2, 10**9),
    "ppo.num_ppo_epochs": (1, 2, 10**6),
    "ppo.mini_batches": (1, 2, 3, 4),
    "ppo.advantage": ESTIMATORS,
    "ppo.advantage_kwargs": ({}, {"epsilon": 1e-3}, {"alpha": 0.1}),
    "ppo.gamma": (1.0, 0.0, 0.9),
    "ppo.gae_lambda": (0.95, 0.0, 1.0),
    "ppo.whiten_advantages": (None, True, False),
    "ppo.whiten_over": ("rollout", "mini_batch"),
    "ppo.policy_loss": LOSSES,
    "ppo.policy_loss_kwargs": ({}, {"tau_pos": 1.0}, {"ratio": 0.5}),
    "ppo.clip_range_low": (0.2, 0.99, 1e-9),
    "ppo.clip_range_high": (0.28, 1e-9, 1e9),
    "ppo.dual_clip": (None, 3.0),
    "ppo.value_clip_range": (None, 0.2),
    "ppo.value_coef": (0.0, 1.0, 10.0),
    "ppo.entropy_coef": (0.0, 0.01),
    "ppo.importance_correction": CORRECTIONS,
    "ppo.importance_cap": (1.0, 2.0),
    "ppo.importance_floor": (0.0, 0.5, 1.0),
    "ppo.loss_aggregation": (None, *AGGREGATIONS),
    "ppo.kl_in": ("reward", "loss"),
    "ppo.kl_estimator": ("k1", "k2", "k3"),
    "ppo.kl_coef": (0.0, 0.05, 1.0),
    "ppo.kl_target": (None, 0.01),
    "ppo.kl_horizon": (1, 100, 10000),
    "ppo.kl_stop": (None, 1e-9, 10.0),
    "ppo.value_warmup_rollouts": (0, 1),
    "ppo.truncated": ("terminal", "bootstrap", "mask"),
    "ppo.first_ratio_tolerance": (None, 0.1),
    "update.micro_batch_tokens": (16, 32, 64, 4096, 10**9),
    "update.packing": ("auto", "on", "off"),
    "update.schedule": SCHEDULES,
    "update.warmup_steps": (0, 1, 10**6),
    "update.max_grad_norm": (1.0, 1e-9, 1e9),
    "update.optimizer": ("adamw_8bit",),
    "update.loraplus_lr_ratio": (1.0, 16.0, 0.5),
    "update.weight_decay": (0.0, 0.1),
    "update.adam_beta1": (0.0, 0.9),
    "update.adam_beta2": (0.0, 0.95),
    "update.adam_epsilon": (1e-8, 1e-5),
    "update.policy_lr": (0.0, 1e-3, 1),
    "update.value_lr": (0.0, 1e-3),
    "update.value_head_lr": (0.0, 1e-3),
    "update.lr": (None, 0.0, 1e-3),
    "update.head_lr": (0.0, 1e-3),
    "sft.full": (False, True),
    "sft.turns": ("all", "last"),
    "sft.epochs": (0.01, 1.0, 2, 1e6),
    "sft.batch_size": (1, 3, 4, 10**6),
    "reward_model.epochs": (0.01, 1.0, 2, 1e6),
    "reward_model.batch_size": (1, 3, 4, 10**6),
    "reward_model.centring": (0.0, 0.01),
    "reward_model.normalise": (True, False),
    "dpo.epochs": (0.01, 1.0, 2, 1e6),
    "dpo.batch_size": (1, 3, 4, 10**6),
    "dpo.beta": (0.1, 10.0),
    "dpo.loss": ("sigmoid", "ipo"),
    "dpo.label_smoothing": (0.0, 0.3),
    "run.seed": (0, -1, 1, 2**31, 2**63, 10**30),
    "run.save_every": (0, 1, 2, None),
    "run.keep_best": (False, True),
    "run.keep_checkpoints": (1, 2, 10**9),
    "run.evaluate_every": (0, 1),
    "run.evaluation_samples": (0, 1, 2),
    "run.samples": (0, 1, 10**9),
    "run.most_not_finite": (0, 3),
    "run.stall_minutes": (1, 60),
    "run.timeout_minutes": (1, 120),
    "run.trackers": (None, []),
    "run.name": (None, "a name"),
    "run.wandb_project": ("rlhf_toolkit",),
    "alarms.kl_above": (None, 1e-6, 200.0),
    "alarms.entropy_below": (None, 0.0, 10.0),
    "alarms.entropy_above": (None, 0.1),
    "alarms.length_below": (None, 10.0),
    "alarms.length_above": (None, 0.5),
    "alarms.repetition_above": (None, 0.01),
    "alarms.cut_above": (None, 0.01),
    "alarms.stop": (False, True),
}
"""What a tiny run can be told. HERE is the folder of ``task.Task``, ROWS a file of held-out rows."""

LEFT_ALONE = ("model.name", "data.train", "data.prompt_column", "run.output_dir", "run.wandb")
"""Set by the case itself: files, and what would reach a network."""

MISTAKEN_FOR: tuple[Any, ...] = (
    {},
    {"a": 1},
    ["x", 1],
    [[]],
    "nonsense \U0001f600",
    -1,
    0,
    10**400,
    True,
    float("nan"),
    float("inf"),
)
BORDERS: dict[type, tuple[Any, ...]] = {
    int: (0, 1, -1, 2**31, 2**63, 10**30, -(10**30)),
    float: (0, 1, -1, SMALLEST, -SMALLEST, 1e-45, 1e-30, 1e30, LARGEST, -LARGEST, "1e-4", 10**400),
    str: ("", " ", "none", "x" * 5000, "../../etc/passwd", "\x1b[31m", "\n", "é\u202e\U0001f600", "a:b:c"),
    bool: (0, 1, "true", "off"),
    NoneType: (None, "none", "null"),
    list: ([], [""], ["x"], [[]], [None], ["w1"] * 3),
    dict: ({}, {"": 1}, {"unknown": 1}, {"epsilon": "x"}, {"epsilon": -1.0}),
}
WORK = (
    "rollout.responses_per_prompt",
    "rollout.max_new_tokens",
    "rollout.max_turns",
    "run.evaluation_samples",
    "data.max_prompt_tokens",
    "model.lora_rank",
)
"""Larger values of these are not wrong: they make a run long."""


def knobs(kind: str) -> dict[str, tuple[Field[Any], Any]]:
    """Every knob of a kind of run by its dotted name, with its type."""
    found = {}
    for name, section in get_type_hints(KINDS[kind]).items():
        if isinstance(section, type) and hasattr(section, "SECTION"):
            hints = get_type_hints(section)
            found.update({f"{name}.{each.name}": (each, hints[each.name]) for each in fields(section)})
    return found


def kinds_of(hint: Any) -> tuple[type, ...]:
    """The plain types that a hint allows."""
    return tuple(get_origin(option) or option for option in (get_args(hint) if _is_union(hint) else (hint,)))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) is not None and get_origin(hint) not in (list, dict)


def legal(name: str, random: random.Random) -> Any:
    """One of the legal values."""
    return random.choice(LEGAL[name])


def border(name: str, hint: Any, random: random.Random) -> Any:
    """A value of the right type, at the border of what is legal or past it."""
    value = random.choice(BORDERS[random.choice(kinds_of(hint))])
    too_much = name in WORK and isinstance(value, int) and value > 4
    return 1 if too_much else value


BROKEN_RULES: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({"x": 1.0}, {"5": 101.0}, {"05": 1.0}, {"5": "1"}, {"-1": 0.0}),
    "bad_words": ([" "], ["w3", ""]),
}
"""Values of lists and dicts that have the type and break the rule."""


def mistake(setting: Field[Any], hint: Any, random: random.Random) -> Any:
    """A value that no setting of this type and rule may have; the run must be refused."""
    kinds, rule = kinds_of(hint), setting.metadata["rule"]
    choices: list[Any] = [value for value in MISTAKEN_FOR if _never_fits(value, kinds)]
    if rule is not None and {int, float} & {*kinds}:
        numbers = (-1, 0, 1, 2, 0.5, -SMALLEST, 1e9)
        choices += [each for each in numbers if not rule.holds(each) and (isinstance(each, int) or float in kinds)]
    if setting.metadata["choices"]:
        choices += [setting.metadata["choices"][0].upper() + "x", ""]
    choices += BROKEN_RULES.get(setting.name, ())
    return random.choice(choices)


def _never_fits(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool not in kinds and str not in kinds  # on and off are choices of some text
    if isinstance(value, int | float):
        if isinstance(value, float):
            return True  # NaN and infinity
        return abs(value) > 10**300 or not {int, float} & set(kinds)
    if isinstance(value, str):
        return str not in kinds
    if isinstance(value, list):
        return list not in kinds or value != []
    return dict not in kinds
