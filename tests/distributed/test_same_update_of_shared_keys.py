"""Gemma 4 with layers that read the keys and values of earlier ones: the same updates on one process and on two ranks,
in the window and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.distributed.test_same_update_everywhere import trained
from tests.models.test_architectures import GEMMA4
from tests.support.launch import run_recipe
from tests.support.tiny import merged, write_experiment, write_task
from tests.support.values import named

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "vocab_size_per_layer_input": 32,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "bos_token_id": None,
}
SIZES |= {"initializer_range": 0.1, "final_logit_softcapping": None}  # gradients beyond rounding: Adam takes their sign


def gemma4() -> PreTrainedModel:
    """Four layers, of which the last two have no keys of their own; one of each pair with a window of 4."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma4_text"](**{**GEMMA4, **SIZES}))


@pytest.mark.thorough
def test_parameters_after_four_updates_equal_those_of_one_process(tmp_path: Path) -> None:
    changes = {
        **{"ppo.num_ppo_epochs": 2, "ppo.mini_batches": 2, "ppo.num_rollouts": 1, "ppo.entropy_coef": 0.01},
        **{"rollout.responses_per_prompt": 2, "rollout.max_new_tokens": 8},
    }
    task = merged(write_task(tmp_path, model=gemma4()), changes)
    alone = merged(task, {"run.output_dir": str(tmp_path / "alone")})
    prepare(experiment_from_dict(alone)).train()
    oracle = trained(tmp_path / "alone")
    moved = [tensor.abs().max().item() > 1e-3 for name, tensor in oracle.items() if "lora_B" in name]
    assert moved and all(moved)
    streamed = {"rollout.mode": "stream", "rollout.slots": 2, "model.gradient_checkpointing": True}
    for stage, more in ((3, streamed), (2, {})):
        experiment = merged(task, {**more, "run.output_dir": str(tmp_path / f"stage{stage}")})
        run_recipe(write_experiment(tmp_path / f"{stage}.yaml", experiment), processes=2, stage=stage).succeeded()
        for name, tensor in trained(tmp_path / f"stage{stage}").items():
            # A hundredth of one of Adam's steps, by which it magnifies the rounding of the smallest gradients.
            torch.testing.assert_close(tensor, oracle[name], rtol=1e-5, atol=1e-4, msg=named(name))
