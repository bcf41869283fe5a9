"""Whole runs, from the settings to the saved adapters, end on the pretended GPU with what they end with on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.algorithms import evaluation
from rlhf_toolkit.runs.evaluation import BASE, compare_contestants
from rlhf_toolkit.runs.fine_tuning import prepare_fine_tuning
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.cuda_rules.subjects import on_both, saved, unlike
from tests.rollout.test_model_rewards import write_reward_adapter, write_reward_model
from tests.rollout.test_turns import ENVIRONMENT
from tests.support.tiny import merged, tiny_llama, write_task
from tests.trainers.test_fine_tuning import KINDS
from tests.trainers.test_fine_tuning import sections as fine_tuning_sections

SMOOTH: dict[str, Any] = {"update.adam_epsilon": 1e-3}
"""Adam's first step is the sign of a gradient, which rounding decides where it is next to nothing."""
SMALL = {**SMOOTH, "ppo.num_rollouts": 2, "rollout.prompts_per_rollout": 4}
PPO: dict[str, dict[str, Any]] = {
    "mini-batches, sampled evaluation": {
        "ppo.mini_batches": 2,
        "data.evaluation": "{folder}/heldout.jsonl",
        "run.evaluate_every": 1,
        "run.evaluation_samples": 2,
        "rollout.top_k": 20,
        "rollout.top_p": 0.9,
    },
    "one forward pass completes the experience": {"model.value_on": "policy_trunk", "update.micro_batch_tokens": 512},
    "turns, an environment, merged weights": {
        "rollout.environment": "{folder}/reward.py:tool",
        "rollout.max_turns": 2,
        "rollout.max_new_tokens": 16,
        "rollout.weights": "merged",
    },
    "reward adapter and model, groups": {
        "reward.adapter": "{folder}/adapter",
        "reward.model": "{folder}/rm",
        "rollout.responses_per_prompt": 2,
        "ppo.advantage": "grpo",
        "ppo.policy_loss": "kl_cov",
        "ppo.policy_loss_kwargs": {"share": 0.1},
    },
    "padded, checkpointing, every term of the loss": {
        "update.packing": "off",
        "model.gradient_checkpointing": True,
        "ppo.num_ppo_epochs": 2,
        "ppo.kl_in": "loss",
        "ppo.entropy_coef": 0.1,
        "ppo.importance_correction": "sequence",
        "rollout.repetition_penalty": 1.2,
        "rollout.bad_words": ["w7 w3"],
        "ppo.kl_stop": 0.5,
        "ppo.whiten_over": "mini_batch",
        "rollout.stop_strings": ["w5"],
        "rollout.temperature": 0.7,
    },
    "greedy baselines": {"ppo.advantage": "remax", "rollout.slots": 2},
}
FINE_TUNING: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"update.packing": "off"}),
    "sft of all weights": ("sft", {"sft.full": True}),
    "reward model": ("reward_model", {"reward_model.normalise": True}),
    "dpo": ("dpo", {"model.gradient_checkpointing": True}),
}
NOT_COMPARED = ("timing_s", "perf", "kind")


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(NOT_COMPARED)} for line in lines]


def assert_same(folder: Path) -> None:
    assert unlike(saved(folder / "gpu"), saved(folder / "cpu"), tolerance=1e-3) == []
    assert saved(folder / "cpu")
    for found, expected in zip(records(folder / "gpu"), records(folder / "cpu"), strict=True):
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("case", PPO)
def test_ppo_runs(tmp_path: Path, case: str) -> None:
    def run(folder: Path) -> None:
        task = write_task(folder, model=tiny_llama(initializer_range=0.2))
        with (folder / "reward.py").open("a") as file:
            file.write(ENVIRONMENT)
        if "reward.adapter" in PPO[case]:
            write_reward_adapter(folder / "adapter")
            write_reward_model(folder / "rm")
        changes = json.loads(json.dumps({**SMALL, **PPO[case]}).replace("{folder}", str(folder)))
        prepare(experiment_from_dict(merged(task, changes))).train()

    on_both(run, tmp_path)
    assert_same(tmp_path)


@pytest.mark.parametrize("case", FINE_TUNING)
def test_supervised_runs(tmp_path: Path, case: str) -> None:
    kind, changes = FINE_TUNING[case]

    def run(folder: Path) -> None:
        task = fine_tuning_sections(folder, kind, {f"{kind}.epochs": 1.0, **SMOOTH, **changes})
        if kind == "sft" and "sft.full" in changes:
            for name in ("lora_rank", "lora_alpha", "value_head_std"):
                del task["model"][name]
        prepare_fine_tuning(experiment_from_dict(task, KINDS[kind])).train()

    on_both(run, tmp_path)
    assert_same(tmp_path)


def test_a_resumed_run_and_its_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's state goes to a checkpoint and comes back; ``rlhf evaluate`` loads what was saved."""

    def run(folder: Path) -> list[float]:
        task = write_task(folder, model=tiny_llama(initializer_range=0.2))
        held_out = {"data.evaluation": str(folder / "heldout.jsonl"), "run.save_every": 1, "run.evaluation_samples": 2}
        for rollouts in (1, 2):
            experiment: Any = experiment_from_dict(merged(task, {**SMALL, **held_out, "ppo.num_rollouts": rollouts}))
            prepare(experiment, resume=rollouts > 1).train()
        found = compare_contestants(experiment, [BASE, str(folder / "run/policy")]).estimates
        return [value.mean for ways in found.values() for values in ways.values() for value in values.values()]

    monkeypatch.setattr(evaluation, "DRAWS", 10)  # of the bootstrap, which is the CPU's
    expected, found = on_both(run, tmp_path)
    assert_same(tmp_path)
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-4) and len(found) > 8
