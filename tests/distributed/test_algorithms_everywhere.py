"""What has a name or a knob gives the same run on every topology: parameters and log lines of two ranks under ZeRO-3,
and of half the micro-batch budget, are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_toolkit.data.prompts import PromptSchedule
from tests.support.forked import RecipeProcesses
from tests.support.launch import run_recipe
from tests.support.tiny import merged, write_experiment, write_task
from tests.support.values import named

COARSE = '''

def coarse(prompts, responses, **columns):
    """Whether most words are below w14: the responses to one prompt often have one score."""
    return [float(share > 0.5) for share in low_words(prompts, responses)]
'''
BASE = {
    "ppo.num_rollouts": 2,
    "ppo.num_ppo_epochs": 2,
    "ppo.mini_batches": 2,
    "rollout.responses_per_prompt": 2,
    "run.samples": 16,
}
EPOCHS, UPDATES, RATE = 2, 4, 1e-2
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"ppo.advantage": "grpo"},
    "gspo": {"ppo.advantage": "grpo", "ppo.policy_loss": "gspo", "ppo.clip_range_low": 0.01},
    "kl_cov": {"ppo.advantage": "rloo", "ppo.policy_loss": "kl_cov", "ppo.policy_loss_kwargs": {"share": 0.1}},
    "clip_cov": {
        "ppo.policy_loss": "clip_cov",
        "ppo.policy_loss_kwargs": {"share": 0.1, "lowest": -9.0, "highest": 9.0},
    },
    "whiten_over": {"ppo.whiten_over": "mini_batch", "ppo.truncated": "bootstrap"},
    "remax": {"ppo.advantage": "remax", "reward.missing_eos_penalty": 0.1},
    "replace_uniform_groups": {"ppo.advantage": "grpo", "rollout.replace_uniform_groups": 2},
    "kl_stop": {"ppo.kl_stop": 0.0006, "ppo.num_rollouts": 3, "update.schedule": "linear"},
}


def experiment(folder: Path, case: str, **changes: Any) -> Path:
    folder.mkdir()
    task = merged(write_task(folder), {**BASE, **CASES[case], **changes})
    with (folder / "reward.py").open("a") as file:
        file.write(COARSE)
    if case == "replace_uniform_groups":
        task = merged(task, {"reward.function": f"{folder}/reward.py:coarse"})
    return write_experiment(folder / "run.yaml", task)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "run").glob("*/*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("timing_s", "perf", "kind"))} for line in lines]


def prompts_of(folder: Path, rollout: int) -> list[str]:
    """What the responses of a rollout, from 0, answer; sorted."""
    lines = [json.loads(line) for line in (folder / "run/samples.jsonl").read_text().splitlines()]
    return sorted(line["prompt"] for line in lines if line["rollout"] == rollout + 1)


def assert_same(found: Path, expected: Path) -> None:
    assert trained(found).keys() == trained(expected).keys()
    for name, tensor in trained(expected).items():
        torch.testing.assert_close(trained(found)[name], tensor, rtol=1e-5, atol=1e-5, msg=named(name))
    for one, other in zip(records(found), records(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_and_half_the_budget_end_where_one_process_does(
    recipe: RecipeProcesses, tmp_path: Path, case: str
) -> None:
    recipe.run("--config", str(experiment(tmp_path / "alone", case))).succeeded()
    half = experiment(tmp_path / "half", case, **{"update.micro_batch_tokens": 32})
    recipe.run("--config", str(half)).succeeded()
    run_recipe(experiment(tmp_path / "ranks", case), processes=2, stage=3).succeeded()
    assert_same(tmp_path / "half", tmp_path / "alone")
    assert_same(tmp_path / "ranks", tmp_path / "alone")
    moved = [
        tensor.abs().max().item() > 1e-3 for name, tensor in trained(tmp_path / "alone").items() if "lora_B" in name
    ]
    assert moved and all(moved)
    for folder in ("alone", "ranks"):
        SAYS_SOMETHING.get(case, lambda folder: None)(tmp_path / folder)


def prompts_were_replaced(folder: Path) -> None:
    texts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for rollout in range(2):
        without = sorted(2 * [texts[i] for i in PromptSchedule(24, 8, 0).indices(rollout)])
        assert len(prompts_of(folder, rollout)) == 16 and prompts_of(folder, rollout) != without


def updates_were_left_out(folder: Path) -> None:
    """In some rollouts, not in all; and the learning rate falls as if none had been."""
    shares = [record["actor/skipped_updates"] for record in records(folder)]
    assert any(shares) and not all(shares), shares
    total = UPDATES * len(shares)
    for rollout, (share, record) in enumerate(zip(shares, records(folder), strict=True)):
        made = range(UPDATES * rollout, UPDATES * rollout + round((1 - share) * UPDATES))
        rates = [RATE * (1 - step / total) for step in made]
        assert record["actor/lr"] == pytest.approx(sum(rates) / len(rates), rel=1e-6)


SAYS_SOMETHING = {"replace_uniform_groups": prompts_were_replaced, "kl_stop": updates_were_left_out}
