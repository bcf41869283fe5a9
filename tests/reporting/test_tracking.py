"""The mirror in W&B, against a module that notes what it is told: nothing leaves this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.reporting import tracking
from rlhf_toolkit.reporting.tracking import WandbMirror, numbers_of

SAMPLE = {"rollout": 3, "kind": "train", "prompt": "p", "response": "r", "score": 0.5, "rewards": {"a": 1.0}}


class Wandb:
    """W&B's part that is used. ``refuses`` is what going online raises."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.started: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, Any]] = []
        self.alerts: list[dict[str, str]] = []
        self.finished, self.refuses = 0, refuses
        self.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.Settings = SimpleNamespace
        self.Table = lambda columns, data: ("table", columns, data)
        self.id = "abc"
        self.summary: dict[str, Any] = {}
        self.artifacts: dict[str, list[str]] = {}
        self.Artifact = Artifact

    def init(self, **options: Any) -> Wandb:
        self.started.append(options)
        if options["mode"] == "online" and self.refuses is not None:
            raise self.refuses
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any], **more: Any) -> None:
        assert not more, "a step would have W&B drop what comes out of order"
        self.logged.append(values)

    def alert(self, **what: str) -> None:
        self.alerts.append(what)

    def log_artifact(self, artifact: Artifact) -> None:
        self.artifacts[artifact.name] = artifact.files

    def finish(self) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.finished += 1


class Artifact:
    def __init__(self, name: str, type: str) -> None:
        assert type == "model"
        self.name, self.files = name, list[str]()

    def add_file(self, path: str, policy: str, skip_cache: bool) -> None:
        assert (policy, skip_cache) == ("immutable", True), "a copy of every adapter"
        self.files.append(Path(path).name)


def mirror_of(wandb: Wandb, monkeypatch: pytest.MonkeyPatch, **options: Any) -> WandbMirror:
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    settings = {"mode": "online", "project": "p", "name": "n", "folder": Path("f"), "config": {"a": 1}}
    return WandbMirror(**{**settings, **options})


def test_a_run_is_started_with_its_settings_and_its_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    mirror = mirror_of(wandb, monkeypatch, axis="step", run_id="old")
    (options,) = wandb.started
    assert {name: options[name] for name in ("mode", "project", "name", "dir", "config")} == {
        "mode": "online",
        "project": "p",
        "name": "n",
        "dir": "f",
        "config": {"a": 1},
    }
    assert (options["id"], options["resume"]) == ("old", "allow"), "a resumed run goes on in the same one"
    assert wandb.metrics == [("step", None), ("*", "step")]
    assert mirror.run_id == "abc"


def test_an_alarm_is_an_alert(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    mirror_of(wandb, monkeypatch, mode="offline").alert("alarm kl_above", "actor/ref_kl is 14")
    assert wandb.alerts == [{"title": "alarm kl_above", "text": "actor/ref_kl is 14", "level": "WARN"}]


def test_a_record_is_logged_without_its_kind_and_with_a_table_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    mirror = mirror_of(wandb, monkeypatch)
    mirror({"kind": "train", "rollout": 3, "critic/score/mean": 0.5}, [SAMPLE])
    mirror({"kind": "eval", "rollout": 3, "eval/score/mean": 0.7}, [])
    heading = ["rollout", "kind", "prompt", "response", "score", "reward/a", "dropped"]
    table = ("table", heading, [[3, "train", "p", "r", 0.5, 1.0, None]])
    assert wandb.logged == [
        {"rollout": 3, "critic/score/mean": 0.5, "samples/train": table},
        {"rollout": 3, "eval/score/mean": 0.7},
    ]
    mirror.finish({})
    assert wandb.finished == 1


def test_an_ended_run_leaves_its_numbers_and_its_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("policy", "value"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "weights").touch()
    (tmp_path / "policy/adapter_config.json").touch()  # the value is a model of its own, which may be large
    summary = {"seconds": 2.5, "mean_scores": [0.1, None, 0.4, 0.3], "versions": {"torch": "2"}, "device": "cpu"}
    wandb = Wandb()
    mirror_of(wandb, monkeypatch, folder=tmp_path).finish(summary)
    assert wandb.summary == {"run/seconds": 2.5, "run/best_score": 0.4}
    assert wandb.artifacts == {"policy-abc": ["adapter_config.json", "weights"]}
    monkeypatch.setenv("WANDB_LOG_MODEL", "false")
    mirror_of(without := Wandb(), monkeypatch, folder=tmp_path).finish(summary)
    assert (without.artifacts, without.finished) == ({}, 1)


def test_the_best_of_a_run_is_the_highest_score_or_the_least_loss() -> None:
    scores = {"evaluations": [{"eval/score/mean": 0.1}, {"eval/score/mean": 0.3}, {"eval/score/mean": 0.2}]}
    losses = {"losses": [3.0, 1.0], "evaluations": [{"eval/loss": 2.0}, {"eval/loss": 1.5}, {"eval/loss": 1.7}]}
    assert numbers_of(scores) == {"best_evaluation_score": 0.3}
    assert numbers_of(losses) == {"least_evaluation_loss": 1.5}
    assert numbers_of({"mean_scores": [None], "evaluations": []}) == {}


def test_a_run_that_has_ended_well_is_not_lost_to_wandb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = mirror_of(Wandb(OSError("no space")), monkeypatch, mode="offline")
    mirror.finish({})
    assert "W&B has failed at the end of the run (OSError: no space); f has all of it\n" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "reachable"), [("offline", True), ("online", False), ("online", True)])
def test_only_offline_a_resumed_run_tells_its_history_again(
    mode: str, reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb(None if reachable else OSError("no network"))
    mirror = mirror_of(wandb, monkeypatch, mode=mode, run_id="old")
    mirror.catch_up([({"kind": "train", "rollout": number, "train/loss": 0.5}, []) for number in (1, 2)])
    offline = [] if mode == "online" and reachable else [1, 2]
    assert [values["rollout"] for values in wandb.logged] == offline


@pytest.mark.parametrize("own", [True, False])
def test_where_it_cannot_go_online_it_goes_offline_and_says_so(
    own: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = Wandb()
    wandb.refuses = wandb.errors.Error("no key") if own else OSError("no network")
    mirror_of(wandb, monkeypatch)
    why = "Error: no key" if own else "OSError: no network"
    assert capsys.readouterr().err == (
        f"W&B could not be started online ({why}); this run is logged offline in f/wandb, send it later with wandb "
        "sync\n"
    )
    first, second = wandb.started
    assert (first.pop("mode"), second.pop("mode")) == ("online", "offline")
    assert first == second, "with the same settings"


def test_how_long_it_tries_is_bounded_and_the_users_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in ((None, float(tracking.START_TIMEOUT_SECONDS)), ("7", 7.0)):
        monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
        if said:
            monkeypatch.setenv("WANDB_INIT_TIMEOUT", said)
        wandb = Wandb()
        mirror_of(wandb, monkeypatch)
        assert wandb.started[0]["settings"].init_timeout == expected
        assert wandb.started[0]["settings"].finish_timeout == tracking.FINISH_TIMEOUT_SECONDS
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="WANDB_INIT_TIMEOUT='soon' is no number of seconds; set one, or unset it"):
        mirror_of(Wandb(), monkeypatch)
