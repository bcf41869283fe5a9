"""Results do not depend on how the work is cut: the same three updates on every topology, budget and with checkpointing
on or off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch import run_recipe
from tests.support.tiny import merged, write_experiment, write_task
from tests.support.values import named

# What each run changes; the first, which packs, is the oracle. Prompts and responses have uneven lengths.
RUNS: dict[str, tuple[int, int | None, dict[str, Any]]] = {
    "one process": (1, None, {}),
    "one process, half the micro-batch budget": (1, None, {"update.micro_batch_tokens": 32}),
    "one process, gradient checkpointing": (1, None, {"model.gradient_checkpointing": True}),
    "one process, three slots": (1, None, {"rollout.slots": 3}),
    "two ranks, ZeRO-2": (2, 2, {}),
    "two ranks, ZeRO-3": (2, 3, {}),
    "two ranks, ZeRO-3, checkpointing, half the budget": (
        2,
        3,
        {"model.gradient_checkpointing": True, "update.micro_batch_tokens": 32},
    ),
    "two ranks, ZeRO-3, streamed through two slots": (2, 3, {"rollout.mode": "stream", "rollout.slots": 2}),
    "one process, padded rows": (1, None, {"update.packing": "off"}),
    "two ranks, ZeRO-3, padded rows": (2, 3, {"update.packing": "off"}),
}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    files = ("policy/adapter_model.safetensors", "value/adapter_model.safetensors", "value/value_head.safetensors")
    return {f"{file}:{name}": tensor for file in files for name, tensor in load_file(folder / file).items()}


def begin_alike(prompts: Path) -> None:
    """Twelve words before every prompt, so that packed micro-batches have something to share."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    template = " ".join(f"w{i}" for i in range(12))
    prompts.write_text("".join(json.dumps({"prompt": f"{template} {row['prompt']}"}) + "\n" for row in rows))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("same_update")
    task = merged(write_task(folder), {"data.max_prompt_tokens": 20})
    begin_alike(folder / "prompts.jsonl")
    task = merged(
        task, {"ppo.num_ppo_epochs": 2, "ppo.mini_batches": 2, "ppo.entropy_coef": 0.01, "ppo.num_rollouts": 1}
    )
    task = merged(
        task, {"rollout.responses_per_prompt": 2, "ppo.truncated": "bootstrap", "update.loraplus_lr_ratio": 2.0}
    )
    found = {}
    for number, (name, (processes, stage, changes)) in enumerate(RUNS.items()):
        experiment = merged(task, {**changes, "run.output_dir": str(folder / f"run{number}")})
        path = write_experiment(folder / f"{number}.yaml", experiment)
        run_recipe(path, processes=processes, stage=stage).succeeded()
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
    """LoRA's B starts at zero: one that still is zero was never trained, and the comparison above would say nothing."""
    moved = [tensor.abs().max().item() > 1e-3 for name, tensor in results["one process"].items() if "lora_B" in name]
    assert moved and all(moved)
