"""One skeleton prepares every kind of run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from rlhf_toolkit.checkpoint_files import Checkpoint
from rlhf_toolkit.errors import CheckpointError, ConfigError, ModelError, TopologyError
from rlhf_toolkit.models.loading import load_model_config as real_config
from rlhf_toolkit.run_claims import hold, release
from rlhf_toolkit.runs import start
from rlhf_toolkit.runs.fine_tuning import prepare_fine_tuning
from rlhf_toolkit.runs.ppo import prepare
from rlhf_toolkit.settings.experiment import SFTExperiment
from rlhf_toolkit.settings.loading import experiment_from_dict
from tests.support.processes import environment_of_tests
from tests.support.tiny import SIZES, merged, write_task
from tests.trainers.test_fine_tuning import sections


def test_a_supervised_run_imports_nothing_of_rollout() -> None:
    code = "import json, sys, rlhf_toolkit.runs.fine_tuning; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment_of_tests(), capture_output=True, text=True, check=True
    )
    ours = [name for name in json.loads(found.stdout.splitlines()[-1]) if name.startswith("rlhf_toolkit.")]
    assert "rlhf_toolkit.trainers.fine_tuner" in ours
    assert [name for name in ours if "rollout" in name or name == "rlhf_toolkit.trainers.ppo"] == []


STEPS = ("open_run_folder", "load_model_config", "fingerprint_of", "require_same", "claim_run_folder", "start_trackers")


@pytest.mark.parametrize("kind", ["ppo", "sft"])
def test_every_kind_claims_its_folder_when_all_has_been_looked_at(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str) -> Any:
        real = getattr(start, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(start, name, noted(name))
    if kind == "ppo":
        run: Any = prepare(experiment_from_dict(write_task(tmp_path)))
    else:
        run = prepare_fine_tuning(experiment_from_dict(sections(tmp_path, "sft", {}), SFTExperiment))
    assert order.pop(0) == "require_same", "the settings"
    assert order.count("require_same") == 2, "of what is loaded, before and after the reward models"
    assert tuple(dict.fromkeys(order)) == STEPS
    assert (run.folder / "run.json").exists() and run.checkpoint is None


def test_a_setting_that_does_nothing_costs_no_run_its_folder(tmp_path: Path) -> None:
    task = merged(write_task(tmp_path), {"ppo.advantage": "grpo", "ppo.gamma": 0.9})
    with pytest.raises(ConfigError, match=r"ppo\.gamma=0\.9 does nothing"):
        prepare(experiment_from_dict(task))
    assert not (tmp_path / "run").exists()


def test_what_differs_between_machines_costs_no_run_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that differ are found when everything has been loaded; the old run lies there still."""
    task = write_task(tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("run.json", "summary.json"):
        (tmp_path / "run" / name).write_text("{}")

    def require_same(what: str, mine: Any) -> None:
        if "rows" in mine:
            raise TopologyError(f"{what} rows is another on rank 1")

    monkeypatch.setattr(start, "require_same", require_same)
    with pytest.raises(TopologyError, match="rows is another"):
        prepare(experiment_from_dict(task), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json", "summary.json"]


def test_a_folder_that_another_run_has_claimed_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def load_model_config(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "run/run.json").write_text("{}")
        hold(tmp_path / "run")
        return real_config(*args, **kwargs)

    monkeypatch.setattr(start, "load_model_config", load_model_config)
    with pytest.raises(CheckpointError, match="claimed by another run while this one was loading"):
        prepare(experiment_from_dict(write_task(tmp_path)))
    release(tmp_path / "run")
    assert (tmp_path / "run/run.json").read_text() == "{}"


def test_a_mixture_of_experts_is_told_what_is_adapted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4, bos_token_id=1, eos_token_id=1)
    task = write_task(tmp_path, model=MixtralForCausalLM(config))
    with pytest.raises(
        ModelError, match=r"target_modules names 'experts\.gate_up_proj', which is model\.layers\.0\.mlp"
    ):
        prepare(experiment_from_dict(merged(task, {"model.target_modules": ["experts.gate_up_proj"]})))
    run: Any = prepare(experiment_from_dict(task))
    run.progress.close()
    said = "adapters are on k_proj, o_proj, q_proj, v_proj; the 4 matrices of routed experts, model.layers.0.mlp.exper"
    assert said in capsys.readouterr().out


def test_a_resumed_run_finds_its_trackers_runs_in_the_checkpoint(tmp_path: Path) -> None:
    def found(state: dict[str, Any]) -> dict[str, str]:
        return start.run_ids_in(Checkpoint(tmp_path, 1, state))

    assert found({}) == {}
    assert found({"run_ids": {"wandb": "w", "mlflow": "m", "trackio": 3}}) == {"wandb": "w", "mlflow": "m"}
    assert found({"wandb_id": "w"}) == {"wandb": "w"}, "of a run from before there were others"
    assert found({"wandb_id": None}) == {}
    with pytest.raises(CheckpointError, match="does not hold what this run needs"):
        found({"run_ids": 5})
