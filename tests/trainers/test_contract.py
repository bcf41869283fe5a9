"""What we override in Trainer still has the shape Trainer calls it with, so that an upgrade that changes it is seen."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from rlhf_toolkit.trainers.base import RoleTrainer
from rlhf_toolkit.trainers.ppo import PPOTrainer

EXPECTED = {
    "create_optimizer": ["self", "model"],
    "_prepare_input": ["self", "data"],
    "log": ["self", "logs", "start_time"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_init_training_state": [
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "get_train_dataloader": ["self"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
}
UNTOUCHED = (
    "train",
    "_inner_training_loop",
    "_run_epoch",
    "create_scheduler",
)


def overridden() -> set[str]:
    own = {**vars(RoleTrainer), **vars(PPOTrainer)}
    return {name for name, value in own.items() if inspect.isfunction(value) and hasattr(Trainer, name)} - {"__init__"}


def test_the_list_of_overridden_methods_is_complete() -> None:
    assert overridden() == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_trainer_calls_it_with_the_arguments_we_take(name: str) -> None:
    theirs = list(inspect.signature(getattr(Trainer, name)).parameters)
    ours = list(inspect.signature(getattr(PPOTrainer, name)).parameters)
    assert theirs == EXPECTED[name]
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", UNTOUCHED)
def test_the_loop_and_saving_are_trainers_own(name: str) -> None:
    assert getattr(PPOTrainer, name) is getattr(Trainer, name)
