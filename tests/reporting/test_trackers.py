"""Trainer's integrations as sinks of the run log, against modules that note what they are told; TensorBoard's files are
read by its own reader where it is installed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.reporting.trackers import BEGINNINGS, MODULES, Mirrors, Place, begun, require_trackers
from rlhf_toolkit.settings.configs import TRACKERS, RunConfig

SETTINGS = {"model": {"name": "m"}, "ppo": {"kl_coef": 0.1}}
RECORDS: list[dict[str, Any]] = [
    {"kind": "train", "rollout": number, "critic/score/mean": number / 4, "train/loss": -1.0} for number in (1, 2, 3)
]
EVALUATION = {"kind": "eval", "rollout": 3, "eval/score/mean": 0.5}


class Noted(ModuleType):
    """A module whose functions note that they were called, and with what."""

    def __init__(self, name: str, **own: Any) -> None:
        super().__init__(name)
        self.__dict__.update(own)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def called(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for each, args, kwargs in self.calls if each == name]


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)


def begun_with(
    module: Noted, name: str, place: Place, arguments: TrainingArguments, patch: pytest.MonkeyPatch
) -> Mirrors:
    patch.setitem(sys.modules, MODULES[name], module)
    patch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    return Mirrors(None, [begun(name, place, SETTINGS, arguments, "rollout")])


def fill(mirrors: Mirrors) -> None:
    for record in (*RECORDS, EVALUATION):
        mirrors(record, [])
    mirrors.finish({})


def test_every_tracker_of_the_settings_is_known() -> None:
    assert [*MODULES] == [*TRACKERS]
    assert {"wandb", *BEGINNINGS} == {*TRACKERS}


def test_who_gets_the_metrics_follows_from_two_settings() -> None:
    assert RunConfig().watchers == ("wandb",)
    assert RunConfig(wandb="off").watchers == ()
    assert RunConfig(trackers=["mlflow"]).watchers == ("mlflow",)
    assert RunConfig(trackers=["tensorboard"], wandb="off").watchers == ("tensorboard",)
    assert RunConfig(trackers=[]).watchers == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trackers": ["tensorbord"]},
            "run.trackers=['tensorbord'] must name some of wandb, tensorboard, trackio, mlflow",
        ),
        ({"trackers": ["mlflow", "mlflow"]}, "run.trackers=['mlflow', 'mlflow'] must name some of"),
        ({"trackers": ["wandb"], "wandb": "off"}, "run.trackers=['wandb'] with run.wandb=off: leave wandb out of"),
    ],
)
def test_trackers_that_are_none_or_both_on_and_off_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(**settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_with_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    other = "set run.wandb: off" if name == "wandb" else "leave it out of run.trackers"
    with pytest.raises(ConfigError) as caught:
        require_trackers([name])
    assert str(caught.value).startswith(f"run.trackers: {name} cannot be imported (")
    assert str(caught.value).endswith(f"); pip install {name}, or {other}")


def test_tensorboard_gets_our_names_over_rollouts(
    tmp_path: Path, arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Noted("tensorboard")

    def new(*args: Any, **kwargs: Any) -> Noted:
        module.calls.append(("new", args, kwargs))
        return module

    module.__dict__["SummaryWriter"] = new
    fill(begun_with(module, "tensorboard", Place(tmp_path, "n", "p"), arguments, monkeypatch))
    assert module.called("new") == [((str(tmp_path / "tensorboard"),), {"purge_step": None})]
    ((title, text), _) = module.called("add_text")[0]
    assert (title, json.loads(text)) == ("args", SETTINGS), "not Trainer's arguments"
    assert [args for args, _ in module.called("add_scalar")] == [
        *[each for n in (1, 2, 3) for each in (("critic/score/mean", n / 4, n), ("train/loss", -1.0, n))],
        ("eval/score/mean", 0.5, 3),
    ]
    assert len(module.called("close")) == 1


def test_trackio_has_a_name_that_no_other_run_has_and_a_resumed_one_keeps_it(
    tmp_path: Path, arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    config = SimpleNamespace(update=lambda values, **_: told.update(values))
    space = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    module = Noted("trackio", config=config, context_vars=space)
    mirrors = begun_with(module, "trackio", Place(tmp_path, "n", "p"), arguments, monkeypatch)
    fill(mirrors)
    assert told == {"model.name": "m", "ppo.kl_coef": 0.1}
    assert module.called("log")[0] == (
        ({"rollout": 1, "critic/score/mean": 0.25, "train/loss": -1.0},),
        {"step": 1},
    )
    assert len(module.called("finish")) == 1
    name = mirrors.run_ids["trackio"]
    assert name.startswith("n 20")
    begun_with(module, "trackio", Place(tmp_path, "n", "p", 3, name), arguments, monkeypatch)
    assert [(call["project"], call["name"]) for _, call in module.called("init")] == [("p", name)] * 2


def test_mlflow_has_the_project_as_experiment_and_goes_on_in_a_resumed_run(
    tmp_path: Path, arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    active: list[Any] = []
    seen: list[str | None] = []

    def start_run(**options: Any) -> None:
        seen.append(os.environ.get("MLFLOW_RUN_ID"))
        active.append(SimpleNamespace(info=SimpleNamespace(run_id="r1")))

    limits = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=99, MAX_PARAMS_TAGS_PER_BATCH=99))
    module = Noted(
        "mlflow",
        utils=limits,
        __version__="3.0",
        active_run=lambda: active[-1] if active else None,
        start_run=start_run,
        is_tracking_uri_set=lambda: True,
        get_tracking_uri=lambda: "u",
        end_run=lambda: active.pop(),
    )
    mirrors = begun_with(module, "mlflow", Place(tmp_path, "n", "p"), arguments, monkeypatch)
    assert mirrors.run_ids == {"mlflow": "r1"}
    fill(mirrors)
    assert not active, "the run has been ended"
    assert module.called("set_experiment") == [(("p",), {})]
    assert module.called("log_params")[0][0][0] == {"model.name": "m", "ppo.kl_coef": 0.1}
    assert [(call["metrics"], call["step"]) for _, call in module.called("log_metrics")] == [
        *[({"critic/score/mean": n / 4, "train/loss": -1.0}, n) for n in (1, 2, 3)],
        ({"eval/score/mean": 0.5}, 3),
    ]
    begun_with(module, "mlflow", Place(tmp_path, "n", "p", 3, "r1"), arguments, monkeypatch).finish({})
    assert seen == [None, "r1"]
    assert not {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"} & os.environ.keys(), "another run here would go on in it"


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(
    tmp_path: Path, arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    module = Noted("tensorboard", add_scalar=full)
    module.__dict__["SummaryWriter"] = lambda *args, **kwargs: module
    fill(begun_with(module, "tensorboard", Place(tmp_path, "n", "p"), arguments, monkeypatch))
    assert capsys.readouterr().err == (
        "tensorboard has failed (OSError: disk full) and gets nothing more; log.jsonl has all of the run\n"
    )
    module.__dict__["SummaryWriter"] = full
    with pytest.raises(
        ConfigError, match=r"^run\.trackers: tensorboard cannot be started \(OSError: disk full\);.*out"
    ):
        begun_with(module, "tensorboard", Place(tmp_path, "n", "p"), arguments, monkeypatch)


def test_tensorboards_own_reader_finds_every_number_and_a_resumed_run_replaces_what_it_does_again(
    tmp_path: Path, arguments: TrainingArguments
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fill(Mirrors(None, [begun("tensorboard", Place(tmp_path, "n", "p"), SETTINGS, arguments, "rollout")]))
    resumed = begun("tensorboard", Place(tmp_path, "n", "p", until=2), SETTINGS, arguments, "rollout")
    resumed({**RECORDS[2], "train/loss": -2.0}, [])
    resumed.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"critic/score/mean", "train/loss", "eval/score/mean"}
    losses = [(each.step, each.value) for each in events.Scalars("train/loss")]
    assert losses == [(1, -1.0), (2, -1.0), (3, -2.0)]
