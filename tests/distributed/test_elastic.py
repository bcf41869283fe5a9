"""A run that is stopped between two mini-batches of a rollout goes on to the same bits on the same ranks, and to the
same numbers on any others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.trainers.ppo import PPOTrainer
from tests.distributed.test_resume import assert_same_tensors, records
from tests.support.launch import ROOT, run_recipe
from tests.support.tiny import merged, write_experiment, write_task

STOPPED = '''
"""The recipe, stopped after as many optimizer steps as the file stop_at says: with a checkpoint, and at once."""

import os
import runpy
from pathlib import Path

from rlhf_toolkit.trainers.ppo import PPOTrainer

real_step, stop_at = PPOTrainer.micro_batch_loss, Path(__file__).with_name("stop_at")


def micro_batch_loss(self, *args, first=False, **kwargs):
    loss = real_step(self, *args, first=first, **kwargs)
    if stop_at.exists() and self.state.global_step == int(stop_at.read_text()):
        self.write_checkpoint()
        self.writer.finish()
        os._exit(9)
    return loss


PPOTrainer.micro_batch_loss = micro_batch_loss
runpy.run_path({recipe!r}, run_name="__main__")
'''
CHANGES = {
    "ppo.num_rollouts": 3,
    "ppo.num_ppo_epochs": 2,
    "ppo.mini_batches": 2,
    "ppo.kl_target": 0.01,
    "ppo.kl_horizon": 100,
    "update.schedule": "linear",
    "update.policy_lr": 1e-3,
    "update.value_lr": 1e-3,
    "update.value_head_lr": 1e-3,
}
"""Twelve optimizer steps, four on each rollout."""


def numbers(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in folder.glob("[pv]*/*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.timeout(600)
def test_any_ranks_and_any_stage_go_on_with_one_another_s_runs(tmp_path: Path) -> None:
    """Stopped after 3 steps, each time within an update: to the same bits on the same two ranks; and by way of one
    process, four ranks and ZeRO-2 to the same numbers."""
    task = merged(write_task(tmp_path), CHANGES)
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED.format(recipe=str(ROOT / "recipes/ppo.py")))

    def go(name: str, processes: int, stage: int | None, *, until: int | None, resume: bool = True) -> None:
        (tmp_path / "stop_at").unlink(missing_ok=True)
        if until is not None:
            (tmp_path / "stop_at").write_text(str(until))
        path = write_experiment(tmp_path / f"{name}.yaml", merged(task, {"run.output_dir": str(tmp_path / name)}))
        more = ["--resume"] if resume else []
        ended = run_recipe(path, *more, processes=processes, stage=stage, recipe=str(script))
        assert (ended.status == 0) == (until is None), ended.output[-6000:]
        assert until is None or (tmp_path / name / f"checkpoint-{until}/manifest.json").is_file(), ended.output[-6000:]

    go("straight", 2, 3, until=None, resume=False)
    go("same", 2, 3, until=3, resume=False)
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    go("same", 2, 3, until=None)
    assert_same_tensors(tmp_path / "straight", tmp_path / "same", files=3)
    assert records(tmp_path / "same") == records(tmp_path / "straight")

    go("other", 1, None, until=6)
    go("other", 4, 2, until=9)
    go("other", 2, 3, until=None)
    expected, found = numbers(tmp_path / "straight"), numbers(tmp_path / "other")
    assert found.keys() == expected.keys() and len(found) > 20
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    for line, other in zip(records(tmp_path / "straight"), records(tmp_path / "other"), strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-4)


class Stop(Exception):
    """Ends a run in the middle."""


def stopped_at(experiment: Experiment, step: int, monkeypatch: pytest.MonkeyPatch, *, resume: bool = False) -> None:
    real = PPOTrainer.get_batch_samples

    def get_batch_samples(self: PPOTrainer, *args: Any) -> Any:
        if self.state.global_step == step:
            self.write_checkpoint()
            raise Stop
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(PPOTrainer, "get_batch_samples", get_batch_samples)
        prepare(experiment, resume=resume).train()


@pytest.mark.parametrize("steps", [(0,), (1, 2, 3), (4, 11)])
def test_one_process_stopped_anywhere_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]
) -> None:
    task = merged(write_task(tmp_path), {**CHANGES, "run.keep_checkpoints": 1})
    straight, broken = (
        experiment_from_dict(merged(task, {"run.output_dir": str(tmp_path / name)})) for name in ("straight", "broken")
    )
    prepare(straight).train()
    for number, step in enumerate(steps):
        stopped_at(broken, step, monkeypatch, resume=number > 0)
        assert [path.name for path in (tmp_path / "broken").glob("*checkpoint*")] == [f"checkpoint-{step}"]
    prepare(broken, resume=True).train()
    assert_same_tensors(tmp_path / "straight", tmp_path / "broken", files=3)
    assert records(tmp_path / "broken") == records(tmp_path / "straight")


def test_what_a_checkpoint_is_tied_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another base; a prompt that has been edited; the same prompts rendered otherwise."""
    experiment = experiment_from_dict(merged(write_task(tmp_path), CHANGES))
    stopped_at(experiment, 1, monkeypatch)
    tokenizer, rows = tmp_path / "model/tokenizer.json", tmp_path / "prompts.jsonl"
    for path, change, words in (
        (rows, ("w7", "w8"), "a row of data.train has been edited"),
        (tokenizer, ('"w1":', '"w_1":'), "rendered otherwise now"),
    ):
        before = path.read_text()
        assert change[0] in before
        path.write_text(before.replace(*change, 1))
        with pytest.raises(CheckpointError, match=words):
            prepare(experiment, resume=True)
        path.write_text(before)
    prepare(experiment, resume=True).train()
