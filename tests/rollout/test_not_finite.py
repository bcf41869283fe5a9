"""NaN and infinity stop a run with their cause, and what fails on one rank takes the others along with its message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_toolkit.rollout.sampling import choose_tokens
from tests.rollout.test_model_rewards import write_reward_model
from tests.support.forked import RecipeProcesses
from tests.support.launch import Finished, run_recipe
from tests.support.tiny import merged, tiny_llama, write_experiment, write_task

# Each is planted from inside the reward file, which every rank imports before the model is built.
LAYER = """
import transformers.models.llama.modeling_llama as llama

real = llama.LlamaDecoderLayer.forward


def spoiled(self, hidden_states, *args, **kwargs):
    made = real(self, hidden_states, *args, **kwargs)
    return made * float("nan") if hidden_states.shape[1] == 1 else made


llama.LlamaDecoderLayer.forward = spoiled
"""
ATTENTION = """
import transformers.models.llama.modeling_llama as llama

real = llama.LlamaAttention.forward


def spoiled(self, *args, **kwargs):
    if self.layer_idx == 1:
        self.o_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 0,))
    return real(self, *args, **kwargs)


llama.LlamaAttention.forward = spoiled
"""
VALUE_HEAD = """
import torch
import rlhf_toolkit.runs.ppo as ppo_run

real = ppo_run.build_ppo_roles


def build(*args, **kwargs):
    shared = real(*args, **kwargs)
    torch.nn.init.constant_(shared.scalar_heads["value"].weight, float("inf"))
    return shared


ppo_run.build_ppo_roles = build
"""
GRADIENT = """
import rlhf_toolkit.trainers.ppo as ppo

real = ppo.PPOTrainer.training_step


def step(self, model, inputs, num_items_in_batch=None):
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * float("nan"))
    return real(self, model, inputs, num_items_in_batch)


ppo.PPOTrainer.training_step = step
"""
LOSS = """
import rlhf_toolkit.trainers.ppo as ppo

ppo.PPOTrainer.warming_up = property(lambda self: True)
real = ppo.PPOTrainer._reduction
ppo.PPOTrainer._reduction = lambda self, *args: lambda loss: real(self, *args)(loss) * float("inf")
"""
FAULTS = {
    "a layer": (
        LAYER,
        "rollout 0: the policy's logits are NaN or infinite at token 2 of a response to prompt",
    ),
    "between two layers": (
        ATTENTION,
        "layers.1.self_attn.o_proj is the first layer whose output is not finite, from an input that an operation",
    ),
    "role pass": (
        VALUE_HEAD,
        "rollout 0: the value's values are NaN or infinite for a response to prompt",
    ),
    "the head's weight": (
        VALUE_HEAD,
        "scalar_heads.value is the first layer whose output is not finite, whose weight weight holds NaN or infinity",
    ),
    "a gradient": (GRADIENT, "train/grad_norm is not finite at step 1: "),
    "the loss": (LOSS, "train/loss is nan at step 1: "),
}
ON_ONE_RANK = """
import torch.distributed
import rlhf_toolkit.models.reward_model as reward_model
import rlhf_toolkit.rewards.compose as compose
import rlhf_toolkit.runs.task as task
from rlhf_toolkit.errors import DataError, RewardError

def fail(error):
    def failing(*args, **kwargs):
        raise error
    return failing

if torch.distributed.get_rank() == 1:
"""
FAILURES = {
    "a response handed over": (
        "compose.Rewards.submit = fail(ValueError('no such queue'))",
        "sampling: ValueError: no",
    ),
    "a file that one machine lacks": (
        "task.load_tokenizer_of = fail(DataError('no such file'))",
        "loading: no such file",
    ),
    "a prompt file that one machine lacks": ("task.load_rows = fail(DataError('no rows'))", "loading: no rows"),
    "a text too long for the reward model": (
        "reward_model.RewardModel.check_prompts = lambda *given: None; "  # else the start would find it
        "reward_model.RewardModel._ids = fail(RewardError('513 tokens'))",
        "the reward model: 513 tokens",
    ),
    "the reward model's pass": (
        "reward_model.RewardModel._forward = fail(RuntimeError('no memory'))",
        "the reward model: RuntimeError: no memory",
    ),
    "the reward model's tokenizer": (
        "reward_model.load_tokenizer = fail(DataError('no such file'))",
        "loading: no such file",
    ),
    "logits": (
        LAYER,
        "sampling: the policy's logits are NaN or infinite at token 2",
    ),
}
WHILE_STREAMING = ("logits", "a response handed over")
"""Those that fail between forward passes of which all ranks must run as many."""


def experiment(folder: Path, patch: str, **changes: object) -> Path:
    folder.mkdir()
    task = merged(write_task(folder), {"ppo.num_rollouts": 1, "run.save_every": 1, "run.most_not_finite": 0, **changes})
    reward = folder / "reward.py"
    reward.write_text(reward.read_text() + patch)
    return write_experiment(folder / "run.yaml", task)


def line_of(finished: Finished) -> str:
    lines = [line for line in finished.output.splitlines() if line.startswith("NotFiniteError: ")]
    assert finished.status != 0 and len(lines) == 1, finished.output[-3000:]
    return lines[0]


def test_each_fault_is_named_with_its_place_in_one_line(recipe: RecipeProcesses, tmp_path: Path) -> None:
    wrong = {}
    for name, (patch, words) in FAULTS.items():
        folder = tmp_path / name.replace(" ", "_")
        line = line_of(recipe.run("--config", str(experiment(folder, patch))))
        if words not in line or list(folder.glob("run/checkpoint-*")):
            wrong[name] = line
    assert not wrong, wrong


def test_a_weight_that_is_not_finite_is_named(recipe: RecipeProcesses, tmp_path: Path) -> None:
    path = experiment(tmp_path / "task", "")
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "task/model")
    line = line_of(recipe.run("--config", str(path)))
    assert "at token 1 of a response to prompt" in line
    assert "layers.1.mlp.up_proj is the first layer whose output is not finite, whose weight base_layer.weight" in line
    assert "one of 1 such weights" in line and "take an earlier one" in line


def test_a_weight_that_lies_in_shards_is_named_too(tmp_path: Path) -> None:
    path = experiment(tmp_path / "task", "", **{"rollout.mode": "stream"})
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "task/model")
    line = line_of(run_recipe(path, processes=2, stage=3))
    assert "layers.1.mlp.up_proj is the first layer whose output is not finite, whose weight base_layer.weight" in line


@pytest.mark.parametrize("mode", ["window", "stream"])
def test_what_fails_on_one_rank_ends_both_with_its_message(tmp_path: Path, mode: str) -> None:
    wrong, classifier = {}, write_reward_model(tmp_path / "classifier")
    for name in FAILURES if mode == "window" else WHILE_STREAMING:
        patch, words = FAILURES[name]
        indented = "".join(f"    {line}\n" for line in patch.splitlines())
        path = experiment(
            tmp_path / name.replace(" ", "_").replace("'", ""),
            ON_ONE_RANK + indented,
            **{"rollout.mode": mode, "reward.model": str(classifier)},
        )
        finished = run_recipe(path, processes=2, stage=3, seconds=120)
        if finished.status != 1 or f"rank 1 failed in {words}" not in finished.output:
            wrong[name] = (finished.status, [line for line in finished.output.splitlines() if "Error" in line])
    assert not wrong, wrong


def test_a_row_that_is_not_finite_gives_a_token_of_the_vocabulary_and_no_log_prob() -> None:
    logits, uniforms = torch.randn(4, 257), torch.tensor([0.1, 0.9, 0.999999, 0.5], dtype=torch.float64)
    logits[0, 3], logits[1, 4], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, :256] = float("-inf")  # a vocabulary that a model has masked is no fault
    for drawn in (uniforms, None):
        for restriction in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}):
            tokens, logprobs, _ = choose_tokens(logits, drawn, temperature=0.7, **restriction)
            assert ((tokens >= 0) & (tokens < 257)).all()
            assert logprobs[:3].isnan().all() and logprobs[3] == 0 and tokens[3] == 256
