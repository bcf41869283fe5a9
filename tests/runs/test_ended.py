"""A run that has had all its rollouts and is resumed keeps what it came to; one that is given more goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_toolkit.runs.fine_tuning import prepare_fine_tuning
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.experiment import SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.tiny import merged, write_task


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_that_is_resumed_keeps_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = {"data.evaluation": str(tmp_path / "heldout.jsonl")}
    task = merged(write_task(tmp_path), {"ppo.num_rollouts": 2, "run.save_every": 1, **held_out})
    summary = prepare(experiment_from_dict(task)).train()
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert prepare(experiment_from_dict(task), resume=True).train() == summary
    assert contents(tmp_path / "run") == before, "not a byte is another"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{tmp_path}/run has had its 2 rollouts: nothing is done anew"

    longer = merged(task, {"ppo.num_rollouts": 3})
    assert len(prepare(experiment_from_dict(longer), resume=True).train()["mean_scores"]) == 3

    (tmp_path / "run/summary.json").write_text("{}")  # as messages say: the run ends once more
    assert prepare(experiment_from_dict(longer), resume=True).train()["mean_scores"][:2] == summary["mean_scores"]


def test_so_does_a_supervised_one(tmp_path: Path) -> None:
    task: dict[str, Any] = write_task(tmp_path)
    rows = "".join(f'{{"prompt": "w{i} w1", "completion": " w2 w{i}"}}\n' for i in range(4))
    (tmp_path / "rows.jsonl").write_text(rows)
    data = {"train": str(tmp_path / "rows.jsonl"), "chat_template": False, "max_tokens": 16}
    sections = {"model": {k: v for k, v in task["model"].items() if k != "value_head_std"}, "data": data}
    sections |= {
        "run": {**task["run"], "save_every": 1},
        "sft": {"batch_size": 2},
        "update": {"micro_batch_tokens": 64},
    }
    experiment = experiment_from_dict(sections, SFTExperiment)
    summary = prepare_fine_tuning(experiment).train()
    before = contents(tmp_path / "run")
    assert prepare_fine_tuning(experiment, resume=True).train() == summary
    assert contents(tmp_path / "run") == before
