"""Value-only warm-up leaves the policy where it was, to the bit, and trains the value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch import run_recipe
from tests.support.tiny import merged, write_experiment, write_task


@pytest.mark.parametrize("value_on", ["adapter", "policy_trunk"])
def test_the_policy_adapter_is_bit_identical_after_warmup_on_two_ranks(tmp_path: Path, value_on: str) -> None:
    changes = {
        "model.value_on": value_on,
        "ppo.num_rollouts": 3,
        "ppo.num_ppo_epochs": 2,
        "ppo.mini_batches": 2,
        "ppo.value_warmup_rollouts": 2,
        "ppo.entropy_coef": 0.01,
        "ppo.kl_in": "loss",
        "run.save_every": 1,
        "run.keep_checkpoints": 5,
    }
    task = merged(write_task(tmp_path), changes)
    run_recipe(write_experiment(tmp_path / "run.yaml", task), processes=2, stage=3).succeeded()
    steps = [load_file(tmp_path / f"run/checkpoint-{step}/policy/adapter_model.safetensors") for step in (4, 8, 12)]
    file = "adapter_model" if value_on == "adapter" else "value_head"
    values = [load_file(tmp_path / f"run/checkpoint-{step}/value/{file}.safetensors") for step in (4, 8)]
    for name, start in steps[0].items():
        assert torch.equal(start, steps[1][name]), f"{name} moved during warm-up"
        if "lora_B" in name:
            assert not start.any(), f"{name} left zero during warm-up"
            assert not torch.equal(start, steps[2][name]), f"{name} did not move after warm-up"
    assert all(not torch.equal(tensor, values[1][name]) for name, tensor in values[0].items())
