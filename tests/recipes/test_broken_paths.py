"""A run whose sampling, training and reference passes do not see one policy stops at once and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.forked import RecipeProcesses
from tests.support.launch import Finished, run_recipe
from tests.support.tiny import merged, write_experiment, write_task

# Each breaks one path from inside the reward file, which every rank imports before the model is built.
DROPOUT = """
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

real = LlamaMLP.forward
LlamaMLP.forward = lambda self, x: nn.functional.dropout(real(self, x), 0.05, self.training)
"""
TEMPERATURE_IN_SAMPLING = """
from dataclasses import replace
import rlhf_toolkit.rollout.sampler as sampler

real = sampler.decode
sampler.decode = lambda model, tokenizer, batch, sampling, **kw: real(model, tokenizer, batch, replace(sampling,
temperature=0.9), **kw)
"""
TEMPERATURE_IN_UPDATE = """
from rlhf_toolkit.trainers.ppo import PPOTrainer

real = PPOTrainer.role_outputs


def say(self, *inputs):
    object.__setattr__(self.loss, "temperature", 0.9)
    return real(self, *inputs)


PPOTrainer.role_outputs = say
"""
ADAPTER_IN_UPDATE = """
from rlhf_toolkit.trainers.ppo import PPOTrainer

real = PPOTrainer.role_outputs


def say(self, *inputs):
    for module in self.model.modules():
        if "policy" in getattr(module, "lora_A", ()):
            module.scaling["policy"] *= {factor}
    return real(self, *inputs)


PPOTrainer.role_outputs = say
"""
ADAPTER_IN_SAMPLING = """
import rlhf_toolkit.rollout.sampler as sampler

real = sampler.decoding_weights
sampler.decoding_weights = lambda model, role, kind, **options: real(model, "value", kind, **options)
"""
START = """
import torch
import rlhf_toolkit.models.loading as loading
import rlhf_toolkit.runs.ppo as ppo_run

real_build = loading.build_ppo_roles


def build(*args, **kwargs):
    shared = real_build(*args, **kwargs)
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if {condition}:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return shared


ppo_run.build_ppo_roles = build
"""
REFERENCE = START.format(condition="'lora_B.policy' in name")
START_OF_BOTH = START.format(condition="'lora_B.policy' in name or 'lora_B.reference' in name")
SAMPLING, RATIO = "between sampling and the training pass", "before any update the policy's log-probs differ"
BREAKS = {
    "dropout": (DROPOUT, "the same rows give other log-probs while the model trains"),
    "temperature in sampling only": (TEMPERATURE_IN_SAMPLING, SAMPLING),
    "temperature in the update only": (TEMPERATURE_IN_UPDATE, RATIO),
    "no adapter in the update": (START_OF_BOTH + ADAPTER_IN_UPDATE.format(factor=0), RATIO),
    "another adapter in the update": (START_OF_BOTH + ADAPTER_IN_UPDATE.format(factor=-1), RATIO),
    "the value's adapter in sampling": (START_OF_BOTH + ADAPTER_IN_SAMPLING, SAMPLING),
    "a policy that does not start as the reference": (REFERENCE, "the log-probs of policy and reference differ"),
}


def broken(folder: Path, patch: str, dtype: str) -> Path:
    """An experiment whose policy starts from an adapter, which the reference has too, with ``patch`` in its reward."""
    folder.mkdir(exist_ok=True)
    task = merged(write_task(folder), {"ppo.num_rollouts": 1, "model.dtype": dtype})
    if "lora_B.reference" in patch:
        task["model"]["policy_adapter"] = str(adapter(folder, task["model"]["name"]))
    reward = folder / "reward.py"
    reward.write_text(reward.read_text() + patch)
    return write_experiment(folder / "run.yaml", task)


def adapter(folder: Path, base: str) -> Path:
    """A LoRA folder to start from; its numbers are replaced when it has been loaded."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(str(folder / "start"))
    return folder / "start"


def message(finished: Finished) -> str:
    lines = [line for line in finished.output.splitlines() if line.startswith("TrainingPathError: ")]
    assert len(lines) == 1, finished.output[-3000:]
    return lines[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_path_stops_the_first_rollout_with_one_line(
    recipe: RecipeProcesses, tmp_path: Path, dtype: str
) -> None:
    wrong = {}
    for name, (patch, words) in BREAKS.items():
        finished = recipe.run("--config", str(broken(tmp_path / name.replace(" ", "_"), patch, dtype)))
        if finished.status == 0 or words not in message(finished):
            wrong[name] = finished.output[-1500:]
    assert not wrong, wrong
    sound = recipe.run("--config", str(broken(tmp_path / "sound", START_OF_BOTH, dtype)))
    assert sound.succeeded()


def test_both_ranks_stop_when_a_path_is_broken_under_zero3(tmp_path: Path) -> None:
    patch, words = BREAKS["dropout"]
    finished = run_recipe(broken(tmp_path, patch, "float32"), processes=2, stage=3)
    assert finished.status not in (0, -9), finished.output[-3000:]
    assert "TrainingPathError: " in finished.output and words in finished.output
