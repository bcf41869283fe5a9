"""A model with recurrent states makes the same updates on every topology, in the window and streamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.test_same_update_everywhere import trained
from tests.support.launch import run_recipe
from tests.support.tiny import merged, tiny_recurrent, write_experiment, write_task
from tests.support.values import named

CHECKPOINTING = {"model.gradient_checkpointing": True}
STREAMED = {"rollout.mode": "stream", "rollout.slots": 2}
OBSTACLE = "qwen3_5_text keeps recurrent state, which packing and shared prefixes would mix up"
RUNS: dict[str, tuple[int, int | None, dict[str, Any]]] = {
    "one process": (1, None, {}),
    "one process, half the budget, checkpointing": (1, None, {**CHECKPOINTING, "update.micro_batch_tokens": 32}),
    "two ranks, ZeRO-2, three slots": (2, 2, {"rollout.slots": 3}),
    "two ranks, ZeRO-3, checkpointing": (2, 3, CHECKPOINTING),
    "two ranks, ZeRO-3, streamed through two slots": (2, 3, STREAMED),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("recurrent")
    task = write_task(folder, model=tiny_recurrent())
    task = merged(task, {"ppo.num_ppo_epochs": 2, "ppo.mini_batches": 2, "ppo.num_rollouts": 1})
    found = {}
    for number, (name, (processes, stage, changes)) in enumerate(RUNS.items()):
        experiment = merged(task, {**changes, "run.output_dir": str(folder / f"run{number}")})
        path = write_experiment(folder / f"{number}.yaml", experiment)
        run = run_recipe(path, processes=processes, stage=stage).succeeded()
        assert f"micro-batches: padded rows ({OBSTACLE})" in run.output
        found[name] = trained(folder / f"run{number}")
    return found


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one process"])
def test_parameters_after_four_updates_equal_those_of_one_process(
    results: dict[str, dict[str, torch.Tensor]], name: str
) -> None:
    oracle, result = results["one process"], results[name]
    assert oracle.keys() == result.keys()
    for key, tensor in oracle.items():
        torch.testing.assert_close(result[key], tensor, rtol=1e-5, atol=1e-5, msg=named(key))


def test_the_updates_moved_every_adapter(results: dict[str, dict[str, torch.Tensor]]) -> None:
    moved = {name: tensor.abs().max().item() for name, tensor in results["one process"].items() if "lora_B" in name}
    assert any("linear_attn.out_proj" in name for name in moved) and min(moved.values()) > 1e-3, moved
