"""Alarms: on the right side of a limit, once for each crossing, in words, with a stop where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from rlhf_toolkit.reporting.alarms import ALARMS, Alarms
from rlhf_toolkit.settings.alarms import AlarmsConfig
from tests.support.forked import RecipeProcesses
from tests.support.offenders import for_each
from tests.support.tiny import merged, write_experiment, write_task

ARGUMENTS = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
SOUND = {
    "actor/ref_kl": 12.0,
    "actor/entropy": 2.5,
    "response_length/mean": 40.0,
    "response_length/repetition": 0.1,
    "response_length/clip_ratio": 1.0,
}
"""The demo's, whose budget cuts every response."""


class Told:
    """Alarms with what they have told, and whether they have asked for a checkpoint and for the end."""

    def __init__(self, limits: dict[str, float], *, stop: bool = False) -> None:
        self.lines: list[tuple[str, str]] = []
        self.control = TrainerControl()
        self.alarms = Alarms(limits, stop=stop, notify=lambda title, text: self.lines.append((title, text)))

    def log(self, **metrics: float) -> dict[str, Any]:
        logs = {name.replace("__", "/"): value for name, value in metrics.items()}
        self.alarms.on_log(ARGUMENTS, TrainerState(global_step=4), self.control, logs=logs)
        return logs


def test_every_limit_of_the_settings_is_an_alarm_and_none_rings_for_sound_numbers() -> None:
    names = {name for name in vars(AlarmsConfig()) if name != "stop"}
    assert names == set(ALARMS)
    told = Told(AlarmsConfig().limits)
    assert told.log(**{name.replace("/", "__"): value for name, value in SOUND.items()}).keys() == SOUND.keys()
    assert told.lines == [] and AlarmsConfig().limits and not AlarmsConfig().stop


@for_each("name", sorted(ALARMS))
def test_a_limit_is_crossed_on_its_own_side_only(name: str) -> None:
    metric, limit = ALARMS[name].metric, 0.5
    above, below = (Told({name: limit}).log(**{metric.replace("/", "__"): value}) for value in (0.6, 0.4))
    rings = [f"alarm/{name}" in logs for logs in (above, below)]
    assert rings == ([True, False] if name.endswith("_above") else [False, True])
    assert f"alarm/{name}" not in Told({name: limit}).log(**{metric.replace("/", "__"): limit})


def test_an_alarm_is_told_once_a_crossing_and_noted_in_every_record() -> None:
    told = Told({"kl_above": 10.0})
    noted = ["alarm/kl_above" in told.log(actor__ref_kl=kl) for kl in (9.0, 11.0, 12.0)]
    assert noted == [False, True, True] and len(told.lines) == 1
    assert "alarm/kl_above" not in told.log(eval__ref_kl=99.0), "an evaluation is no rollout, and does not re-arm it"
    told.log(actor__ref_kl=13.0)
    assert len(told.lines) == 1
    told.log(actor__ref_kl=9.0)
    told.log(actor__ref_kl=14.0)
    assert len(told.lines) == 2
    title, text = told.lines[1]
    assert title == "alarm kl_above"
    assert text.startswith("actor/ref_kl is 14 at step 4, above alarms.kl_above=10: usually the policy has left the ")
    assert text.endswith("raise ppo.kl_coef, or lower update.policy_lr")
    assert not (told.control.should_save or told.control.should_training_stop)


def test_a_stop_asks_for_a_checkpoint_first() -> None:
    told = Told({"entropy_below": 0.1}, stop=True)
    told.log(actor__entropy=0.2)
    assert not (told.control.should_save or told.control.should_training_stop)
    told.log(actor__entropy=0.05)
    assert told.control.should_save and told.control.should_training_stop
    assert told.lines[0][1].endswith("; the run writes a checkpoint and ends, since alarms.stop is set")


@pytest.mark.parametrize("stop", [False, True])
def test_a_run_says_its_alarm_once_and_ends_with_a_checkpoint_where_asked(
    tmp_path: Path, recipe: RecipeProcesses, stop: bool
) -> None:
    changes: dict[str, Any] = {"alarms.length_above": 0.5, "alarms.stop": stop, "run.evaluate_every": 1}
    changes |= {"data.evaluation": str(tmp_path / "heldout.jsonl")}
    finished = recipe.run(
        "--config", str(write_experiment(tmp_path / "run.yaml", merged(write_task(tmp_path), changes)))
    )
    finished.succeeded()
    assert finished.output.count("alarm length_above: response_length/mean is ") == 1
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    noted = [line.get("alarm/length_above") for line in lines if line["kind"] == "train"]
    assert noted == ([1.0] if stop else [1.0] * 3)
    assert [path.name for path in tmp_path.glob("run/checkpoint-*")] == (["checkpoint-1"] if stop else [])
    assert (tmp_path / "run/summary.json").is_file() and (tmp_path / "run/policy").is_dir()
