"""Everybody who gets a run's metrics beside its own log: W&B, and Trainer's integrations for TensorBoard, trackio and
MLflow.

An integration of ``transformers.integrations`` begins and ends its tracker, by its own environment variables. What is
logged are the records of ``log.jsonl`` under their own names, with the rollout (or step) as x-axis; Trainer would put
``train/`` before each and count optimizer steps. The log is the primary record: a tracker that fails is left.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import MLflowCallback, TensorBoardCallback, TrackioCallback

from rlhf_toolkit.errors import ConfigError, RLHFError, described
from rlhf_toolkit.reporting.tracking import WandbMirror
from rlhf_toolkit.texts import say

Log = Callable[[dict[str, float], int], object]
History = Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]

TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"
MODULES = {
    "wandb": "wandb",
    "tensorboard": "torch.utils.tensorboard",
    "trackio": "trackio",
    "mlflow": "mlflow",
}
"""What a tracker is imported as; the package that brings it has the tracker's name."""


@dataclass(frozen=True)
class Place:
    """Where a tracker writes: the run folder, the run's name and its project. ``run_id`` is what the tracker calls the
    earlier piece of a resumed run, which has logged ``until`` that rollout or step."""

    folder: Path
    name: str
    project: str
    until: int = 0
    run_id: str | None = None


class Integration:
    """A sink for RunLog: one of Trainer's integrations, begun. ``told`` are Trainer's arguments, which speak of
    themselves as the run's settings; ``log`` takes numbers by name, and the x-axis."""

    def __init__(self, name: str, callback: TrainerCallback, log: Log, told: TrainingArguments, axis: str) -> None:
        self.name, self.callback, self.log, self.told, self.axis = name, callback, log, told, axis
        self.run_id: str | None = None
        self.works = True

    def __call__(self, record: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Log the numbers of one record, unless the tracker has failed before."""
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        place = int(numbers.pop(self.axis))
        self._attempt(lambda: self.log(numbers, place))

    def finish(self) -> None:
        """Close the tracker."""
        self._attempt(lambda: self.callback.on_train_end(self.told, state_at(0), TrainerControl()))

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self.works:
            return
        try:
            action()
        except Exception as error:
            self.works = False
            say(
                f"{self.name} has failed ({described(error)}) and gets nothing more; log.jsonl has all of the run",
                sys.stderr,
            )


class Mirrors:
    """All trackers of a run, as one sink for RunLog. Made on rank 0 only."""

    def __init__(self, wandb: WandbMirror | None, others: Sequence[Integration]) -> None:
        self.wandb, self.others = wandb, others

    @property
    def run_ids(self) -> dict[str, str]:
        """What a resumed run passes to continue the same runs, by tracker."""
        ids = {each.name: each.run_id for each in self.others if each.run_id is not None}
        return ids if self.wandb is None else {"wandb": self.wandb.run_id, **ids}

    def __call__(self, record: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Hand one record to each; W&B alone has tables of samples."""
        for sink in (self.wandb, *self.others):
            if sink is not None:
                sink(record, samples)

    def alert(self, title: str, text: str) -> None:
        """Raise an alert in W&B; the others have none."""
        if self.wandb is not None:
            self.wandb.alert(title, text)

    def catch_up(self, history: History) -> None:
        """Log once more in an offline W&B run what a resumed run has logged before."""
        if self.wandb is not None:
            self.wandb.catch_up(history)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close all; W&B gets the run's ``summary`` and adapters."""
        if self.wandb is not None:
            self.wandb.finish(summary)
        for each in self.others:
            each.finish()


def require_trackers(names: Iterable[str]) -> None:
    """Raise ConfigError where one of these trackers is not installed."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:  # a broken installation raises whatever it likes
            way_out = " or set run.wandb: off" if name == "wandb" else " or leave it out of run.trackers"
            raise ConfigError(
                f"run.trackers: {name} cannot be imported ({described(error)}); pip install {name},{way_out}"
            ) from error


def begun(name: str, place: Place, settings: dict[str, Any], arguments: TrainingArguments, axis: str) -> Integration:
    """The integration of that name, begun. Raises ConfigError where it cannot begin."""
    told = copy.copy(arguments)
    vars(told).update(
        run_name=place.name,
        project=place.project,
        to_dict=lambda: {f"{part}.{key}": value for part, values in settings.items() for key, value in values.items()},
        to_json_string=lambda: json.dumps(settings, indent=2),
    )
    try:
        return BEGINNINGS[name](place, told, axis)
    except Exception as error:
        if isinstance(error, RLHFError):
            raise
        raise ConfigError(
            f"run.trackers: {name} cannot be started ({described(error)}); mend that, or leave it out of run.trackers"
        ) from error


def begin_tensorboard(place: Place, told: TrainingArguments, axis: str) -> Integration:
    """Event files in ``tensorboard/`` of the run folder, or where ``TENSORBOARD_LOGGING_DIR`` says. What lies there of
    after ``place.until`` is logged again by a resumed run, and marked as replaced."""
    from torch.utils.tensorboard import SummaryWriter

    folder = os.environ.get(TENSORBOARD_FOLDER) or str(place.folder / "tensorboard")
    writer = SummaryWriter(folder, purge_step=place.until + 1 if place.until else None)

    def log(numbers: dict[str, float], at: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, at)
        writer.flush()

    callback = TensorBoardCallback(writer)
    callback.on_train_begin(told, state_at(0), TrainerControl())
    return Integration("tensorboard", callback, log, told, axis)


def begin_trackio(place: Place, told: TrainingArguments, axis: str) -> Integration:
    """A run of the project. trackio knows a run by its name: a new one has the time behind it, a resumed one has its
    own."""
    trackio = importlib.import_module("trackio")
    told.run_name = place.run_id or f"{place.name} {time.strftime('%Y-%m-%d %H:%M:%S')}"
    callback = TrackioCallback()
    callback.on_train_begin(told, state_at(0), TrainerControl())
    found = Integration(
        "trackio", callback, lambda numbers, at: trackio.log({axis: at, **numbers}, step=at), told, axis
    )
    found.run_id = told.run_name
    return found


def begin_mlflow(place: Place, told: TrainingArguments, axis: str) -> Integration:
    """A run of the experiment named as the project, unless ``MLFLOW_EXPERIMENT_NAME`` says another; a resumed one goes
    on."""
    mlflow = importlib.import_module("mlflow")
    given = {"MLFLOW_EXPERIMENT_NAME": place.project}
    if place.run_id is not None:
        given["MLFLOW_RUN_ID"] = place.run_id
    callback, ours = MLflowCallback(), given.keys() - os.environ.keys()
    os.environ.update({name: given[name] for name in ours})
    try:
        callback.on_train_begin(told, state_at(0), TrainerControl())
    finally:
        for name in ours:  # another run of this process is another one there
            os.environ.pop(name, None)
    found = Integration(
        "mlflow",
        callback,
        lambda numbers, at: callback.on_log(told, state_at(at), TrainerControl(), logs=numbers),
        told,
        axis,
    )
    found.run_id = str(mlflow.active_run().info.run_id)
    return found


BEGINNINGS: dict[str, Callable[[Place, TrainingArguments, str], Integration]] = {
    "tensorboard": begin_tensorboard,
    "trackio": begin_trackio,
    "mlflow": begin_mlflow,
}


def state_at(place: int) -> TrainerState:
    """What an integration reads of Trainer's state: it is asked on rank 0 alone."""
    return TrainerState(global_step=place, is_world_process_zero=True)
