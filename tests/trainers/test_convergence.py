"""Every estimator and every loss learns: a tiny model, a rule as reward, a bound that a wrong sign does not reach.

The reward is the share of words below w14, about 0.5 before training. What must be caught is in ``tests/mutations.py``.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from rlhf_toolkit.algorithms.advantages import ESTIMATORS
from rlhf_toolkit.algorithms.policy_losses import POLICY_LOSSES
from rlhf_toolkit.config_loading import experiment_from_dict
from rlhf_toolkit.trainers.ppo_run import prepare
from tests.tiny import merged, tiny_llama, write_task

BOUND = 0.85  # the mean score of the last rollouts
LEARNING = {
    "rollout.prompts_per_rollout": 12,
    "rollout.responses_per_prompt": 4,
    "ppo.num_rollouts": 16,
    "ppo.mini_batches": 2,
    "ppo.kl_coef": 0.0,
    "update.micro_batch_tokens": 512,
    "update.policy_lr": 3e-2,
    "update.value_lr": 3e-2,
    "update.value_head_lr": 3e-2,
}
SHARP = tiny_llama(initializer_range=0.3)  # with the default 0.02 no adapter could make one word much likelier
OF_LOSS: dict[str, dict[str, Any]] = {"dro": {"ppo.policy_loss_kwargs": {"beta": 0.1}}}


def scores(folder: Path, changes: dict[str, Any]) -> list[float]:
    """The mean score of each rollout of a run."""
    run = prepare(experiment_from_dict(merged(write_task(folder, model=SHARP), {**LEARNING, **changes})))
    return run.train()["mean_scores"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_learns(tmp_path: Path, estimator: str) -> None:
    found = scores(tmp_path, {"ppo.advantage": estimator})
    assert mean(found[-4:]) > BOUND > mean(found[:2]), found


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_every_loss_learns(tmp_path: Path, loss: str) -> None:
    found = scores(tmp_path, {"ppo.advantage": "grpo", "ppo.policy_loss": loss, **OF_LOSS.get(loss, {})})
    assert mean(found[-4:]) > BOUND > mean(found[:2]), found
