"""What an unknown name may mean: a setting of another section, a misspelt one, or what other libraries call it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

RATES = ("update.policy_lr", "update.lr")
KL = ("ppo.kl_coef", "dpo.beta")
BUDGET = ("rollout.max_new_tokens", "data.max_tokens")
GROUP = ("rollout.responses_per_prompt",)
ROUNDS = ("ppo.num_rollouts", "sft.epochs", "reward_model.epochs", "dpo.epochs")
EPOCHS = ("ppo.num_ppo_epochs", "sft.epochs", "reward_model.epochs", "dpo.epochs")
BATCH = ("rollout.prompts_per_rollout", "sft.batch_size", "reward_model.batch_size", "dpo.batch_size")
BASE, DTYPE, DATA, HELD_OUT = ("model.name",), ("model.dtype",), ("data.train",), ("data.evaluation",)
MICRO, FUNCTION, TARGETS = ("update.micro_batch_tokens",), ("reward.function",), ("model.target_modules",)

ELSEWHERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model_name_or_path", "model_name", "model_path", "base_model", "pretrained", "path"), BASE),
    **dict.fromkeys(("torch_dtype", "precision", "bf16", "fp16"), DTYPE),
    "load_in_4bit": ("model.quantization: nf4",),
    "load_in_8bit": ("model.quantization: int8",),
    **dict.fromkeys(("attn_implementation", "flash_attention", "flash_attn"), ("model.attention",)),
    **dict.fromkeys(("r", "rank", "lora_r"), ("model.lora_rank",)),
    "alpha": ("model.lora_alpha",),
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_modules"), TARGETS),
    "use_rslora": ("model.rslora",),
    **dict.fromkeys(("adapter", "lora_path", "peft_model", "adapter_name_or_path"), ("model.policy_adapter",)),
    **dict.fromkeys(("dataset", "dataset_name", "train_dataset", "train_file", "train_files"), DATA),
    **dict.fromkeys(("eval_dataset", "eval_file", "val_files", "validation", "test"), HELD_OUT),
    "split": ("data.train_split",),
    **dict.fromkeys(("max_prompt_length", "prompt_max_len"), ("data.max_prompt_tokens", "data.max_tokens")),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"), BUDGET[::-1]),
    "system": ("data.system_prompt",),
    **dict.fromkeys(("reward_funcs", "reward_func", "reward_functions", "reward_fn", "func"), FUNCTION),
    **dict.fromkeys(("reward_model", "reward_model_path", "reward_pretrain"), ("reward.model",)),
    "reward_weights": ("reward.functions",),
    **dict.fromkeys(("max_completion_length", "max_response_length", "response_length", "max_tokens"), BUDGET),
    **dict.fromkeys(("num_generations", "n", "num_return_sequences", "group_size", "n_samples_per_prompt"), GROUP),
    **dict.fromkeys(("batch_size", "train_batch_size", "rollout_batch_size"), BATCH),
    **dict.fromkeys(("stop", "stop_sequences", "stop_token"), ("rollout.stop_strings",)),
    **dict.fromkeys(("total_episodes", "max_steps", "total_steps", "num_steps", "num_iterations", "steps"), ROUNDS),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs", "total_epochs"), ROUNDS),
    **dict.fromkeys(("ppo_epochs", "update_epochs", "noptepochs"), EPOCHS),
    **dict.fromkeys(("num_mini_batches", "mini_batch_size", "ppo_mini_batch_size"), ("ppo.mini_batches",)),
    **dict.fromkeys(("beta", "init_kl_coef", "kl_penalty", "kl_loss_coef", "kl_beta", "kl_ctl"), KL),
    **dict.fromkeys(("target_kl", "target"), ("ppo.kl_target",)),
    **dict.fromkeys(("cliprange", "clip_range", "clip_ratio", "epsilon", "eps_clip"), ("ppo.clip_range_low",)),
    **dict.fromkeys(("epsilon_high", "clip_ratio_high"), ("ppo.clip_range_high",)),
    **dict.fromkeys(("cliprange_value", "value_clip"), ("ppo.value_clip_range",)),
    **dict.fromkeys(("vf_coef", "critic_coef"), ("ppo.value_coef",)),
    **dict.fromkeys(("lam", "lambda", "lambd"), ("ppo.gae_lambda",)),
    **dict.fromkeys(("adv_estimator", "advantage_estimator"), ("ppo.advantage",)),
    "loss_type": ("ppo.policy_loss", "dpo.loss"),
    **dict.fromkeys(("learning_rate", "lr", "actor_lr", "actor_learning_rate"), RATES),
    **dict.fromkeys(("critic_lr", "critic_learning_rate", "vf_lr"), ("update.value_lr",)),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps"), MICRO),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), ("update.schedule",)),
    **dict.fromkeys(("warmup_ratio", "num_warmup_steps"), ("update.warmup_steps",)),
    "optim": ("update.optimizer",),
    **dict.fromkeys(("grad_clip", "clip_grad", "max_norm", "gradient_clipping"), ("update.max_grad_norm",)),
    **dict.fromkeys(("eval_steps", "eval_every", "test_freq", "eval_freq"), ("run.evaluate_every",)),
    **dict.fromkeys(("save_steps", "save_freq", "checkpoint_every", "save_interval"), ("run.save_every",)),
    "save_total_limit": ("run.keep_checkpoints",),
    **dict.fromkeys(("report_to", "trackers", "loggers"), ("run.trackers",)),
    "use_wandb": ("run.wandb",),
    **dict.fromkeys(("project", "project_name"), ("run.wandb_project",)),
    **dict.fromkeys(("run_name", "experiment_name", "exp_name"), ("run.name",)),
    "output": ("run.output_dir",),
}
"""What TRL, verl, Axolotl, LLaMA-Factory and OpenRLHF call it, and what it is here: the first that the kind of run has,
perhaps with the value that says the same."""
SECTIONS = {
    **dict.fromkeys(("dataset", "datasets", "prompts"), "data"),
    **dict.fromkeys(("lora", "peft", "actor", "policy"), "model"),
    **dict.fromkeys(("optimizer", "optim", "training", "train", "trainer"), "update"),
    **dict.fromkeys(("sampling", "generation"), "rollout"),
    **dict.fromkeys(("algorithm", "grpo"), "ppo"),
    **dict.fromkeys(("logging", "output"), "run"),
}
ALIKE_HERE, ALIKE_ELSEWHERE = 0.7, 0.8
"""How like a name is to one of its own section, and of another one, that it may be a misspelling of that. Sections are
compared by their names alone, settings without their sections: what all have in common says nothing."""


def meant(section: str, key: str, known: Mapping[str, Iterable[str]]) -> str:
    """``; did you mean ...?`` for the unknown ``section.key``, where ``known`` are the settings of each section; else
    the section's settings."""
    found = (
        next((f"{other}.{key}" for other, settings in known.items() if key in settings), None)
        or elsewhere(key, known)
        or _alike(key, [(name, f"{section}.{name}") for name in known[section]], ALIKE_HERE)
        or _alike(key, [(name, f"{other}.{name}") for other in known for name in known[other]], ALIKE_ELSEWHERE)
    )
    settings = ", ".join(sorted(f"{section}.{name}" for name in known[section]))
    return f"; did you mean {found}?" if found else f"; known are {settings}"


def section_meant(name: str, known: Mapping[str, Iterable[str]]) -> str:
    """The same for a section that is not known; it may be a setting that stands in none."""
    found = (
        _alike(name, [(section, section) for section in known], ALIKE_HERE)
        or next((each for each in [SECTIONS.get(name.lower())] if each in known), None)
        or next((f"{section}.{name}" for section, settings in known.items() if name in settings), None)
        or elsewhere(name, known)
    )
    return f"; did you mean {found}?" if found else f"; known are {', '.join(sorted(known))}"


def elsewhere(key: str, known: Mapping[str, Iterable[str]]) -> str | None:
    """What other libraries' ``key`` is here, as ``section.setting`` and perhaps ``: value``; None for no such key."""
    for name in ELSEWHERE.get(key.lower(), ()):
        section, _, setting = name.partition(":")[0].partition(".")
        if setting in known.get(section, ()):
            return name
    return None


def _alike(key: str, names: Iterable[tuple[str, str]], least: float) -> str | None:
    there = dict(reversed(list(names)))  # of two settings of one name, the first
    close = difflib.get_close_matches(key[:200], there, n=1, cutoff=least)
    return there[close[0]] if close else None
