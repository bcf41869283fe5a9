"""A run that was killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.runs.fine_tuning import prepare_fine_tuning
from rlhf_toolkit.settings.experiment import SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.launch import ROOT, run_recipe
from tests.support.tiny import merged, write_experiment, write_task
from tests.trainers.test_fine_tuning import sections

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
    "ppo.kl_horizon": 10000,
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
EIGHT_BIT = {"update.optimizer": "adamw_8bit", "update.loraplus_lr_ratio": 4.0, "model.lora_rank": 128}
"""Matrices of 4,096 elements and more, whose moments bitsandbytes keeps in 8 bits; smaller ones stay in float32."""


def records(folder: Path, axis: str = "rollout") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if not k.startswith(("timing_s", "perf"))} for line in lines]
    return [*{(line["kind"], line[axis]): line for line in timeless}.values()]


def assert_same_tensors(straight: Path, broken: Path, *, files: int) -> None:
    """Adapters and heads, bit for bit."""
    names = [str(path.relative_to(straight)) for path in straight.glob("[pvr]*/*.safetensors")]
    assert len(names) == files
    for file in names:
        expected, result = load_file(straight / file), load_file(broken / file)
        assert expected.keys() == result.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, result[name]), f"{file}: {name} differs after the resume"


@pytest.mark.parametrize("more", [{}, CHEAPEST, GROUPS, EIGHT_BIT], ids=["", "cheapest", "groups", "8 bits"])
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

    files = 1 if more is GROUPS else 2 if more is CHEAPEST else 3
    assert_same_tensors(tmp_path / "straight", tmp_path / "broken", files=files)
    assert records(tmp_path / "broken") == records(tmp_path / "straight")
    if more is EIGHT_BIT:
        kept = load_file(max((tmp_path / "broken").glob("checkpoint-*")) / "optimizer.safetensors")
        assert any(name.startswith("absmax.exp_avg_sq.") for name in kept)
    if more is GROUPS:
        assert any(record["actor/skipped_updates"] for record in records(tmp_path / "straight")[2:])


MORTAL = """
import os
import runpy
import time
from pathlib import Path

from rlhf_toolkit.trainers.fine_tuner import FineTuner

real_step = FineTuner.training_step


def training_step(self, *args, **kwargs):
    if self.state.global_step == 5:
        while not Path(self.args.output_dir, "checkpoint-4/manifest.json").is_file():  # a thread writes it meanwhile
            time.sleep(0.05)
        os._exit(9)
    return real_step(self, *args, **kwargs)


FineTuner.training_step = training_step
runpy.run_path({recipe!r}, run_name="__main__")
"""
"""A recipe that dies in its sixth step, before that step has moved anything."""
SUPERVISED = {
    "run.save_every": 2,
    "run.evaluate_every": 3,
    "update.schedule": "linear",
    "update.weight_decay": 0.1,
}


@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
@pytest.mark.parametrize(("processes", "stage"), [(2, 3), (1, None)], ids=["two ranks, ZeRO-3", "one process"])
def test_a_supervised_run_killed_and_resumed_equals_straight(
    tmp_path: Path, processes: int, stage: int | None, kind: str
) -> None:
    """Eight steps; the sixth kills the run, which goes on from the fourth. Evaluations lie on both sides."""
    more = {"reward_model.normalise": True} if kind == "reward_model" else {}
    task = sections(tmp_path, kind, {**SUPERVISED, f"{kind}.batch_size": 5, f"{kind}.epochs": 4.0, **more})
    paths = {
        name: write_experiment(tmp_path / f"{name}.yaml", merged(task, {"run.output_dir": str(tmp_path / name)}))
        for name in ("straight", "broken")
    }
    recipe = f"recipes/{kind}.py"
    (tmp_path / "mortal.py").write_text(MORTAL.format(recipe=str(ROOT / recipe)))
    ranks: dict[str, Any] = {"processes": processes, "stage": stage}
    run_recipe(paths["straight"], recipe=recipe, **ranks).succeeded()
    assert run_recipe(paths["broken"], recipe=str(tmp_path / "mortal.py"), **ranks).status != 0
    assert (tmp_path / "broken/checkpoint-4/manifest.json").is_file()
    assert not list((tmp_path / "broken").glob("[pr]*/*.safetensors")), "the run was to be killed before its end"
    run_recipe(paths["broken"], "--resume", recipe=recipe, **ranks).succeeded()

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert_same_tensors(straight, broken, files=2 if kind == "reward_model" else 1)
    assert records(broken, "step") == records(straight, "step")
    assert {(r["kind"], r["step"]) for r in records(straight, "step")} == {
        *(("train", step) for step in range(1, 9)),
        *(("eval", step) for step in (0, 3, 6, 8)),
    }
    timed = ("seconds", "peak_memory_gib", "evaluations", "sha256")
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (straight, broken))
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_a_supervised_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    """In the words that PPO has."""
    settings = sections(tmp_path, "sft", {"run.save_every": 0})
    experiment = experiment_from_dict(settings, SFTExperiment)
    with pytest.raises(CheckpointError, match=r"--resume, but run\.output_dir=.* holds no run; start without --resume"):
        prepare_fine_tuning(experiment, resume=True)
    prepare_fine_tuning(experiment).train()
    with pytest.raises(CheckpointError, match=r"has no checkpoint to resume from; set run\.save_every, or start"):
        prepare_fine_tuning(experiment, resume=True)
    assert (tmp_path / "run/policy/adapter_model.safetensors").is_file(), "what the run left stays"


def test_checkpoints_hold_no_base_weights(tmp_path: Path) -> None:
    """Adapters, heads and optimizer of the tiny model; the base alone would already be larger than any of them."""
    task = merged(write_task(tmp_path), {"ppo.num_rollouts": 1, "run.save_every": 1})
    run_recipe(write_experiment(tmp_path / "run.yaml", task)).succeeded()
    checkpoint = tmp_path / "run/checkpoint-1"
    names = {name for file in checkpoint.rglob("*.safetensors") for name in load_file(file)}
    assert names and all("lora_" in name or name.endswith(("weight", "bias")) for name in names)
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["progress"]["kl_coefficient"] == 0.05 and state["ranks"] == 1
