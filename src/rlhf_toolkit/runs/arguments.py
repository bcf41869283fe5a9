"""From an experiment to ``TrainingArguments``: the only place where the two vocabularies meet."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from rlhf_toolkit.runs.places import saved_every
from rlhf_toolkit.settings.configs import RunConfig
from rlhf_toolkit.settings.optimizer import OptimizerConfig


def training_arguments(
    run: RunConfig,
    update: OptimizerConfig,
    deepspeed: dict[str, Any] | None,
    *,
    rounds: int,
    steps_per_round: int,
    rows_per_rank: int,
    learning_rate: float,
) -> TrainingArguments:
    """Trainer's arguments. Trainer counts optimizer steps; the experiment counts rounds: rollouts of PPO, steps of a
    supervised run."""
    every = saved_every(run, rounds)
    arguments = TrainingArguments(
        output_dir=run.output_dir,
        seed=run.seed % 2**32,  # numpy takes no other; no stream of ours begins with it
        per_device_train_batch_size=rows_per_rank,
        gradient_accumulation_steps=1,
        max_steps=rounds * steps_per_round,
        learning_rate=learning_rate,
        lr_scheduler_type=update.schedule,
        warmup_steps=update.warmup_steps,
        optim=OptimizerNames.ADAMW_TORCH if update.optimizer == "adamw" else update.optimizer,
        weight_decay=update.weight_decay,
        adam_beta1=update.adam_beta1,
        adam_beta2=update.adam_beta2,
        adam_epsilon=update.adam_epsilon,
        max_grad_norm=update.max_grad_norm,
        logging_steps=steps_per_round,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if run.evaluate_every else "no",
        eval_steps=max(1, run.evaluate_every) * steps_per_round,
        save_strategy="steps" if every else "no",
        save_steps=max(1, every) * steps_per_round,
        save_total_limit=run.keep_checkpoints,
        ignore_data_skip=True,  # the loader starts at the right round by itself
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": True},
    )
    # One process is one device: with several GPUs in sight Trainer would wrap the model in DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
