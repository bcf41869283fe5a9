"""A training step of PPO, from the loader's mini-batch to the watched quantities, waits for the GPU no more than it
did. A number that is read back in every micro-batch would leave the GPU idle while the CPU launches the next one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rlhf_toolkit.algorithms.importance import Correction
from rlhf_toolkit.trainers.mini_batches import cut
from tests.cuda_rules.device import Rules
from tests.cuda_rules.subjects import TERMS, a_gpu, ppo_trainer


class Case(NamedTuple):
    """Settings; into how many micro-batches they cut; and upper bounds, which may only fall. ``copies`` to the GPU are
    each micro-batch's columns and layout and, once, the sum that ``kl_stop`` decides by; ``reads`` of numbers are that
    decision, what transformers asks of padded rows, and what the rollout needs of its only update."""

    changes: dict[str, Any]
    micro_batches: int
    copies: int
    reads: int


TWICE: dict[str, Any] = {"ppo.num_ppo_epochs": 2, "update.micro_batch_tokens": 32}
PADDED = {"update.packing": "off", "model.gradient_checkpointing": True}
CASES = {
    "packed": Case(TWICE, 3, copies=3 * 23 + 1, reads=1),
    "padded, checkpointed": Case(TWICE | PADDED, 3, copies=3 * 16 + 1, reads=3 * 1 + 1),
    "giving the old log-probs": Case(
        {"ppo.kl_in": "loss", "update.micro_batch_tokens": 32}, 3, copies=3 * 22 + 1, reads=3 * 6 + 1
    ),
    "giving the rewards": Case(
        {"model.value_on": "policy_trunk", "update.micro_batch_tokens": 512}, 1, copies=24, reads=4 + 1
    ),
}


def a_step(folder: Path, changes: dict[str, Any]) -> tuple[int, Rules]:
    """The micro-batches of a training step in the second rollout, and what it did. Every term of the loss and every
    quantity that is watched is on; what is only compared once, with the rollout's first update, is not."""
    with a_gpu():
        trainer = ppo_trainer(folder, changes)
        trainer.loss = replace(trainer.loss, kl_stop=0.5, correction=Correction("sequence"), **TERMS)
        trainer.create_optimizer()
        trainer.state.global_step = trainer.schedule.updates_per_rollout
        rows = {**next(iter(trainer.get_train_dataloader())), "fresh": torch.tensor(False)}
        with Rules(traced=True) as rules:
            trainer.training_step(trainer.model, rows)
    return len(cut(rows)), rules


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_waits_no_more_than_it_did(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    micro_batches, rules = a_step(tmp_path, case.changes)
    assert micro_batches == case.micro_batches
    copies = rules.waits.pop("copy to the GPU")
    assert copies <= case.copies and rules.waits.total() <= case.reads, f"{copies} copies; {rules.table()}"
