"""A run whose sampling, training and reference passes do not see one policy stops at once and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import Finished, run_recipe
from tests.tiny import merged, write_experiment, write_task

# Each breaks one path from inside the reward file, which every rank imports before the model is built.
DROPOUT = """
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

real = LlamaMLP.forward
LlamaMLP.forward = lambda self, x: nn.functional.dropout(real(self, x), 0.1, self.training)
"""
TEMPERATURE_IN_SAMPLING = """
from dataclasses import replace
import rlhf_toolkit.rollout.sampler as sampler

real = sampler.decode
sampler.decode = lambda model, tokenizer, batch, sampling, **kw: real(model, tokenizer, batch, replace(sampling,
temperature=2.0), **kw)
"""
TEMPERATURE_IN_UPDATE = """
from rlhf_toolkit.trainers.ppo import PPOTrainer

real = PPOTrainer._passes


def passes(self, model, batch):
    object.__setattr__(self.loss, "temperature", 2.0)
    return real(self, model, batch)


PPOTrainer._passes = passes
"""
REFERENCE = """
import torch
import rlhf_toolkit.models.loading as loading
import rlhf_toolkit.trainers.ppo_run as ppo_run

real = loading.build_ppo_roles


def build(*args, **kwargs):
    shared = real(*args, **kwargs)
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if "lora_B.policy" in name:
                parameter.normal_(std=0.1)
    return shared


ppo_run.build_ppo_roles = build
"""
BREAKS = {
    "dropout": (DROPOUT, "before any update a log-prob differs"),
    "temperature in sampling only": (TEMPERATURE_IN_SAMPLING, "between sampling and the training pass"),
    "temperature in the update only": (TEMPERATURE_IN_UPDATE, "before any update a log-prob differs"),
    "a policy that does not start as the reference": (REFERENCE, "before the first update policy and reference differ"),
}


def broken_run(folder: Path, patch: str, **launch: int) -> Finished:
    task = merged(write_task(folder), {"ppo.num_rollouts": 1})
    reward = folder / "reward.py"
    reward.write_text(reward.read_text() + patch)
    return run_recipe(write_experiment(folder / "run.yaml", task), **launch)


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_path_stops_the_run_with_one_line(tmp_path: Path, name: str) -> None:
    patch, words = BREAKS[name]
    finished = broken_run(tmp_path, patch)
    assert finished.status != 0
    lines = [line for line in finished.output.splitlines() if line.startswith("TrainingPathError: ")]
    assert len(lines) == 1 and words in lines[0]


@pytest.mark.timeout(200)
def test_both_ranks_stop_when_a_path_is_broken_under_zero3(tmp_path: Path) -> None:
    patch, words = BREAKS["dropout"]
    finished = broken_run(tmp_path, patch, processes=2, stage=3, seconds=120)
    assert finished.status not in (0, -9), finished.output[-3000:]
    assert "TrainingPathError: " in finished.output and words in finished.output
