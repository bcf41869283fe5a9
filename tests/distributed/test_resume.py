"""A run that was killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import run_recipe
from tests.tiny import merged, write_experiment, write_task

KILLER = '''
import os
from pathlib import Path

calls = 0


def low_words(prompts, responses, **columns):
    """The reward of the task; the process dies in the call that the file kill_at names."""
    global calls
    calls += 1
    if os.environ.get("RANK", "0") == "0":
        Path(__file__).with_name("calls").write_text(str(calls))
    kill_at = Path(__file__).with_name("kill_at")
    if kill_at.exists() and calls == int(kill_at.read_text()):
        os._exit(9)
    return [float(sum(word < "w5" for word in response.split())) for response in responses]
'''
CHANGES = {
    "ppo.num_rollouts": 4,
    "ppo.num_ppo_epochs": 2,
    "ppo.mini_batches": 2,
    "ppo.kl_target": 0.01,
    "ppo.kl_horizon": 100,
    "update.schedule": "linear",
    "run.save_every": 2,
}


CHEAPEST = {
    "ppo.num_ppo_epochs": 1,
    "ppo.mini_batches": 1,
    "ppo.kl_coef": 0.0,
    "ppo.kl_target": None,
    "model.value_on": "policy_trunk",
}
"""No pass of policy or reference after the first rollout, and no adapter of the value."""
GROUPS = {
    "ppo.advantage": "grpo",
    "rollout.responses_per_prompt": 2,
    "rollout.replace_uniform_groups": 2,
    "rollout.max_new_tokens": 4,
    "ppo.kl_stop": 0.0002,
}
"""Prompts are replaced, updates are left out, and there is no critic."""


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if not k.startswith(("timing_s", "perf"))} for line in lines]
    return [*{line["rollout"]: line for line in timeless}.values()]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("more", [{}, CHEAPEST, GROUPS], ids=["", "cheapest", "groups"])
@pytest.mark.parametrize(("processes", "stage"), [(2, 3), (1, None)], ids=["two ranks, ZeRO-3", "one process"])
def test_killed_and_resumed_equals_straight(
    tmp_path: Path, processes: int, stage: int | None, more: dict[str, Any]
) -> None:
    task = merged(write_task(tmp_path), {**CHANGES, **more})
    (tmp_path / "reward.py").write_text(KILLER)
    straight = write_experiment(
        tmp_path / "straight.yaml", merged(task, {"run.output_dir": str(tmp_path / "straight")})
    )
    run_recipe(straight, processes=processes, stage=stage).succeeded()
    calls = int((tmp_path / "calls").read_text())
    assert calls > 4 if more is GROUPS else calls == 4, "a further call of a rollout is a round of replacements"

    broken = write_experiment(tmp_path / "broken.yaml", merged(task, {"run.output_dir": str(tmp_path / "broken")}))
    (tmp_path / "kill_at").write_text(str(calls))
    assert run_recipe(broken, processes=processes, stage=stage).status != 0
    assert not (tmp_path / "broken/policy").exists(), "the run was to be killed before its end"
    (tmp_path / "kill_at").unlink()
    run_recipe(broken, "--resume", processes=processes, stage=stage).succeeded()

    files = [
        str(path.relative_to(tmp_path / "straight")) for path in (tmp_path / "straight").glob("[pv]*/*.safetensors")
    ]
    assert len(files) == (1 if more is GROUPS else 2 if more else 3)
    for file in files:
        expected, result = load_file(tmp_path / "straight" / file), load_file(tmp_path / "broken" / file)
        assert expected.keys() == result.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, result[name]), f"{file}: {name} differs after the resume"
    assert records(tmp_path / "broken") == records(tmp_path / "straight")
    if more is GROUPS:
        assert any(record["actor/skipped_updates"] for record in records(tmp_path / "straight")[2:])


def test_checkpoints_hold_no_base_weights(tmp_path: Path) -> None:
    """Adapters, heads and optimizer of the tiny model; the base alone would already be larger than any of them."""
    task = merged(write_task(tmp_path), {"ppo.num_rollouts": 1, "run.save_every": 1})
    run_recipe(write_experiment(tmp_path / "run.yaml", task)).succeeded()
    checkpoint = tmp_path / "run/checkpoint-1"
    names = {name for file in checkpoint.rglob("*.safetensors") for name in load_file(file)}
    assert names and all("lora_" in name or name in ("weight", "bias") for name in names)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["kl_coefficient"] == 0.05 and manifest["world_size"] == 1
