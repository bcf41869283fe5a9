"""Weights & Biases as a mirror of the JSONL log: one run, from the true rank 0, with the rollout as its x-axis."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from rlhf_toolkit.errors import ConfigError, described, shortened
from rlhf_toolkit.reporting.sample_rows import table
from rlhf_toolkit.texts import say

START_TIMEOUT_SECONDS = 60
"""W&B tries for so long before the run goes offline; the environment's WANDB_INIT_TIMEOUT replaces it."""
FINISH_TIMEOUT_SECONDS = 300
"""At the end of a run W&B sends for so long; what is left then lies in the run folder for ``wandb sync``."""


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
        wandb = self._wandb = imported(mode)
        self._axis = axis
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

    def finish(self) -> None:
        """Send what is left and close the run."""
        self.run.finish()


def imported(mode: str) -> Any:
    """The module ``wandb``: only a run that is mirrored needs it. Raises ConfigError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"run.wandb={mode}, but wandb cannot be imported ({described(error)}); install it, or set run.wandb: off"
        ) from error
    return wandb


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
