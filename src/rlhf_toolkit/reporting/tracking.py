"""Weights & Biases as a mirror of the JSONL log: one run, from the true rank 0, with the rollout as its x-axis."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf_toolkit.errors import ConfigError, described, shortened
from rlhf_toolkit.reporting.sample_rows import table
from rlhf_toolkit.texts import say

START_TIMEOUT_SECONDS = 60
"""W&B tries for so long before the run goes offline; the environment's WANDB_INIT_TIMEOUT replaces it."""
FINISH_TIMEOUT_SECONDS = 300
"""At the end of a run W&B sends for so long; what is left then lies in the run folder for ``wandb sync``."""


ROLES = ("policy", "value", "reward")
"""Folders of what a run has trained."""
LOGS_MODELS = "WANDB_LOG_MODEL"
"""The environment variable in which W&B's users say that weights are not to be logged: false."""


class WandbMirror:
    """A sink for RunLog. Made on rank 0 only, after the process group, so that a run of many ranks is one run in W&B.

    ``mode`` is online or offline. Where W&B cannot be reached or knows no key the run goes offline and says so.
    ``run_id`` continues an earlier run; ``axis`` is the x-axis of all metrics.
    """

    def __init__(
        self,
        *,
        mode: Literal["online", "offline"],
        project: str,
        name: str,
        folder: Path,
        config: dict[str, Any],
        run_id: str | None = None,
        axis: str = "rollout",
    ) -> None:
        options: dict[str, Any] = {
            "project": project,
            "name": name,
            "dir": str(folder),
            "config": config,
            "id": run_id,
            "resume": "allow",
        }
        wandb = self._wandb = importlib.import_module("wandb")
        self.folder, self._axis = folder, axis
        try:
            self.run = wandb.init(mode=mode, settings=_settings(wandb), **options)
        except (wandb.errors.Error, OSError) as error:
            say(
                f"W&B could not be started online ({described(error)}); this run is logged offline in {folder}/wandb, "
                "send it later with wandb sync",
                sys.stderr,
            )
            self.run = wandb.init(mode="offline", settings=_settings(wandb), **options)
            mode = "offline"
        self.offline = mode == "offline"
        self.run.define_metric(axis)
        self.run.define_metric("*", step_metric=axis)

    @property
    def run_id(self) -> str:
        """What a resumed run passes to continue this one."""
        return str(self.run.id)

    def __call__(self, record: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Log one record and a table of its samples. No ``step`` is passed: W&B would drop points that come out of
        order."""
        values = {name: value for name, value in record.items() if name != "kind"}
        heading, rows = table(samples, self._axis)
        shown = {f"samples/{record['kind']}": self._wandb.Table(columns=heading, data=rows)} if rows else {}
        self.run.log({**values, **shown})

    def alert(self, title: str, text: str) -> None:
        """Raise an alert, which W&B sends on as the project's owner has asked; offline it waits for ``wandb sync``."""
        self.run.alert(title=title, text=text, level="WARN")

    def catch_up(self, history: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
        """Log once more what a resumed run has logged before, as ``(record, samples)``. Only offline: there each start
        makes a piece of its own, and what W&B is sent last takes the place of earlier pieces of the run."""
        for record, samples in history if self.offline else ():
            self(record, samples)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Give the run the numbers of ``summary`` and the adapters it has trained, send what is left and close it."""
        try:
            self.run.summary.update({f"run/{name}": value for name, value in numbers_of(summary).items()})
            if os.environ.get(LOGS_MODELS, "").lower() != "false":
                self._log_adapters()
            self.run.finish()
        except Exception as error:  # the run itself has ended well
            say(f"W&B has failed at the end of the run ({described(error)}); {self.folder} has all of it", sys.stderr)

    def _log_adapters(self) -> None:
        """Make each adapter an artifact. Its files are sent from where they lie, not from a copy."""
        for role in ROLES:
            if (self.folder / role / "adapter_config.json").is_file():
                artifact = self._wandb.Artifact(f"{role}-{self.run_id}", type="model")
                for path in sorted(path for path in (self.folder / role).iterdir() if path.is_file()):
                    artifact.add_file(str(path), policy="immutable", skip_cache=True)
                self.run.log_artifact(artifact)


def numbers_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """What W&B compares runs by: the numbers of a run's summary, and the best of its curves."""
    numbers = {name: value for name, value in summary.items() if isinstance(value, (int, float))}
    evaluations = [each for each in summary.get("evaluations", []) if isinstance(each, dict)]
    for name, values, best in (
        ("best_score", summary.get("mean_scores", []), max),
        ("best_evaluation_score", [each.get("eval/score/mean") for each in evaluations], max),
        ("least_evaluation_loss", [each.get("eval/loss") for each in evaluations], min),
    ):
        there = [value for value in values if value is not None]
        if there:
            numbers[name] = best(there)
    return numbers


def _settings(wandb: Any) -> Any:
    given = os.environ.get("WANDB_INIT_TIMEOUT", str(START_TIMEOUT_SECONDS))
    try:
        seconds = float(given)
    except ValueError as error:
        raise ConfigError(
            f"the environment's WANDB_INIT_TIMEOUT={shortened(given, 40)} is no number of seconds; set one, or unset it"
        ) from error
    return wandb.Settings(
        init_timeout=seconds,
        finish_timeout=FINISH_TIMEOUT_SECONDS,
        silent=True,
        console="off",
    )
