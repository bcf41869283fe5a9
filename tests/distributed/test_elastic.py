"""A run that is stopped between two mini-batches of a rollout goes on to the same bits on the same ranks, and to the
same numbers on any others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_toolkit.data.templates import render_as_of
from rlhf_toolkit.errors import CheckpointError
from rlhf_toolkit.rollout import evaluated
from rlhf_toolkit.runs import start
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.experiment import Experiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.trainers import ppo
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
    """Stopped after 3 steps, each time within an update: to the same bits on the same two ranks under ZeRO-3; and by
    way of ZeRO-2, one process without DeepSpeed and four ranks under ZeRO-3 to the same numbers."""
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

    go("other", 2, 2, until=6)
    go("other", 1, None, until=9)
    go("other", 4, 3, until=None)
    expected, found = numbers(tmp_path / "straight"), numbers(tmp_path / "other")
    assert found.keys() == expected.keys() and len(found) > 20
    furthest = {name: float((found[name] - tensor).abs().max()) for name, tensor in expected.items()}
    assert max(furthest.values()) <= 1e-5, max(furthest.items(), key=lambda each: each[1])
    for line, other in zip(records(tmp_path / "straight"), records(tmp_path / "other"), strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert other == pytest.approx(line, rel=1e-3, abs=1e-4)


STATEFUL = """
import torch


class Growing:
    def __init__(self):
        self.calls, self.total = 0, torch.zeros(2)

    def __call__(self, prompts, responses, **columns):
        self.calls += 1
        self.total += 0.5
        return [self.calls + float(self.total[0]) * len(response.split()) for response in responses]

    def state_dict(self):
        return {"calls": self.calls, "total": self.total}

    def load_state_dict(self, state):
        self.calls, self.total = state["calls"], state["total"]


low_words = Growing()
"""


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
    prepare(experiment_from_dict(merged(task, {"run.output_dir": str(tmp_path / "straight")}))).train()
    broken: Experiment = experiment_from_dict(merged(task, {"run.output_dir": str(tmp_path / "broken")}))
    for number, step in enumerate(steps):
        stopped_at(broken, step, monkeypatch, resume=number > 0)
        assert [path.name for path in (tmp_path / "broken").glob("*checkpoint*")] == [f"checkpoint-{step}"]
    prepare(broken, resume=True).train()
    assert_same_tensors(tmp_path / "straight", tmp_path / "broken", files=3)
    assert records(tmp_path / "broken") == records(tmp_path / "straight")


def test_a_plugin_goes_on_where_it_was_and_the_best_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward of each rollout depends on the calls before it; of the evaluations the first scores best."""
    task = merged(
        write_task(tmp_path),
        {
            **CHANGES,
            "run.keep_checkpoints": 1,
            "run.keep_best": True,
            "run.evaluate_every": 1,
            "data.evaluation": str(tmp_path / "heldout.jsonl"),
        },
    )
    values = iter([0.0, 3.0, 1.0, 2.0, 1.0, 0.0])
    monkeypatch.setattr("rlhf_toolkit.runs.callbacks.SCORE", "eval/planted")
    greedy = evaluated.greedy_metrics
    monkeypatch.setattr(ppo, "greedy_metrics", lambda *args: {**greedy(*args), "eval/planted": next(values)})
    folders = []
    for name in ("straight", "broken"):
        (tmp_path / f"{name}.py").write_text(STATEFUL)
        changes = {"run.output_dir": str(tmp_path / name), "reward.function": f"{tmp_path}/{name}.py:low_words"}
        experiment: Experiment = experiment_from_dict(merged(task, changes))
        if name == "broken":
            values = iter([0.0, 3.0])
            stopped_at(experiment, 6, monkeypatch)
            assert {path.name for path in (tmp_path / name).glob("*checkpoint*")} == {"checkpoint-4", "checkpoint-6"}
            (tmp_path / f"{name}.py").write_text(STATEFUL + "# another module, which has counted nothing\n")
            values = iter([1.0, 2.0, 1.0])
        prepare(experiment, resume=name == "broken").train()
        folders.append(tmp_path / name)
    assert {path.name for path in folders[0].glob("*checkpoint*")} == {"checkpoint-4"}
    assert_same_tensors(*folders, files=3)
    assert records(folders[1]) == records(folders[0])


def test_what_a_checkpoint_is_tied_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that has been edited; a chat template's file that has been; the same prompts rendered otherwise."""
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    changes = {**CHANGES, "data.chat_template": str(template)}
    experiment: Experiment = experiment_from_dict(merged(write_task(tmp_path), changes))
    stopped_at(experiment, 1, monkeypatch)
    tokenizer, rows = tmp_path / "model/tokenizer.json", tmp_path / "prompts.jsonl"
    assert (tmp_path / "run/checkpoint-1/policy/chat_template.jinja").read_text() == template.read_text()
    for path, change, words in (
        (rows, ("w7", "w8"), "a row of data.train has been edited"),
        (template, ("{{ m.content }} ", "{{ m.content }}  "), "the file of data.chat_template has been edited"),
        (tokenizer, ('"w1":', '"w_1":'), "rendered otherwise now"),
    ):
        before = path.read_text()
        assert change[0] in before
        path.write_text(before.replace(*change, 1))
        with pytest.raises(CheckpointError, match=words):
            prepare(experiment, resume=True)
        path.write_text(before)
    for other in (True, False, str(tmp_path / "copy.jinja")):
        shutil.copy(template, tmp_path / "copy.jinja")
        with pytest.raises(CheckpointError, match=r"data\.chat_template"):
            prepare(replace(experiment, data=replace(experiment.data, chat_template=other)), resume=True)
    prepare(experiment, resume=True).train()


class Tomorrow:
    """The clock of the next day."""

    @staticmethod
    def now() -> datetime:
        return datetime.now() + timedelta(days=1)


def test_a_template_that_writes_the_date_writes_the_same_the_next_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, today = tmp_path / "own.jinja", datetime.now().strftime("%d")
    day = f"{{{{ 'w1' if strftime_now('%d') == '{today}' else 'w2' }}}} "
    template.write_text(day + "{% for m in messages %}{{ m.content }} {% endfor %}")
    changes = {**CHANGES, "data.chat_template": str(template)}
    experiment: Experiment = experiment_from_dict(merged(write_task(tmp_path), changes))
    stopped_at(experiment, 1, monkeypatch)
    monkeypatch.setattr(start, "datetime", Tomorrow)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="or because the template writes the dat"):
        patch.setattr(start, "render_as_of", lambda began: render_as_of(Tomorrow.now().isoformat()))
        prepare(experiment, resume=True)
    run: Any = prepare(experiment, resume=True)
    assert {prompt.text[:3] for prompt in run.trainer.maker.source.prompts} == {"w1 "}
    run.progress.close()
